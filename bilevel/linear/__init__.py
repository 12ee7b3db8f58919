"""The adjoint solve: ``H q = g``, by methods that see only products and report their accuracy."""

from bilevel.ground.linear_map import LinearMap as LinearMap
from bilevel.linear.base import CarryingSolver as CarryingSolver
from bilevel.linear.base import LinearSolution as LinearSolution
from bilevel.linear.base import LinearSolver as LinearSolver
from bilevel.linear.cg import CG as CG
from bilevel.linear.dense import Dense as Dense
from bilevel.linear.dual_cg import DualCG as DualCG
from bilevel.linear.dynamic_lanczos import DynamicLanczos as DynamicLanczos
from bilevel.linear.identity import Identity as Identity
from bilevel.linear.kronecker import EKFAC as EKFAC
from bilevel.linear.kronecker import KFAC as KFAC
from bilevel.linear.lineax import Lineax as Lineax
from bilevel.linear.neumann import Neumann as Neumann
from bilevel.linear.nystrom import Nystrom as Nystrom
from bilevel.linear.precondition import Diagonal as Diagonal
from bilevel.linear.stochastic import Stochastic as Stochastic
from bilevel.linear.woodbury import Woodbury as Woodbury
