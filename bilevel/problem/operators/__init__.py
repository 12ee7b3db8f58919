"""Which matrix stands for the curvature of the inner problem."""

from bilevel.problem.operators.base import BoundOperator as BoundOperator
from bilevel.problem.operators.base import Operator as Operator
from bilevel.problem.operators.gauss_newton import GaussNewton as GaussNewton
from bilevel.problem.operators.hessian import Hessian as Hessian
from bilevel.problem.operators.jacobian import Jacobian as Jacobian
from bilevel.problem.operators.linear_model import LinearModel as LinearModel
