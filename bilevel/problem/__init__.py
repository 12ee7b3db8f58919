"""The inner and the outer problem: two losses, what can be wrong with them, their curvature."""

from bilevel.problem.two_losses import Point as Point
from bilevel.problem.two_losses import Problem as Problem
