"""``jax.grad`` for hyperparameters.

The modules stand in floors, and each imports only from those below it (see ``README.md`` in
this folder): the problem, the linear solve, the hypergradient, the outer update.
"""

from bilevel.adapters import Split as Split
from bilevel.adapters import split_equinox as split_equinox
from bilevel.adapters import split_linen as split_linen
from bilevel.adapters import split_nnx as split_nnx
from bilevel.check import HypergradCheck as HypergradCheck
from bilevel.check import check_hypergrad as check_hypergrad
from bilevel.diagnose import Diagnosis as Diagnosis
from bilevel.diagnose import diagnose as diagnose
from bilevel.fit import FitResult as FitResult
from bilevel.fit import fit as fit
from bilevel.hypergradient import BestResponse as BestResponse
from bilevel.hypergradient import BestResponseState as BestResponseState
from bilevel.hypergradient import Evolution as Evolution
from bilevel.hypergradient import FiniteDifference as FiniteDifference
from bilevel.hypergradient import Hypergradient as Hypergradient
from bilevel.hypergradient import Implicit as Implicit
from bilevel.hypergradient import MemoryReport as MemoryReport
from bilevel.hypergradient import Response as Response
from bilevel.hypergradient import Unroll as Unroll
from bilevel.hypergradient import hypergrad as hypergrad
from bilevel.hypergradient import hypergrad_init as hypergrad_init
from bilevel.hypergradient import hypergrad_solve as hypergrad_solve
from bilevel.hypergradient import memory_report as memory_report
from bilevel.hypergradient import value_and_hypergrad as value_and_hypergrad
from bilevel.hypergradient import with_response as with_response
from bilevel.inner.network import StructuredResponse as StructuredResponse
from bilevel.linear import CG as CG
from bilevel.linear import Dense as Dense
from bilevel.linear import Diagonal as Diagonal
from bilevel.linear import Identity as Identity
from bilevel.linear import LinearSolution as LinearSolution
from bilevel.linear import LinearSolver as LinearSolver
from bilevel.linear import Lineax as Lineax
from bilevel.linear import Neumann as Neumann
from bilevel.linear import Nystrom as Nystrom
from bilevel.linear import Stochastic as Stochastic
from bilevel.linear import Woodbury as Woodbury
from bilevel.operators import GaussNewton as GaussNewton
from bilevel.operators import Hessian as Hessian
from bilevel.operators import LinearModel as LinearModel
from bilevel.outer import Algorithm as Algorithm
from bilevel.outer import AlternateInfo as AlternateInfo
from bilevel.outer import AlternateState as AlternateState
from bilevel.outer import Free as Free
from bilevel.outer import HyperSchedule as HyperSchedule
from bilevel.outer import Integer as Integer
from bilevel.outer import Interval as Interval
from bilevel.outer import Positive as Positive
from bilevel.outer import SelfTuningInfo as SelfTuningInfo
from bilevel.outer import SelfTuningState as SelfTuningState
from bilevel.outer import Simplex as Simplex
from bilevel.outer import Space as Space
from bilevel.outer import WholeRun as WholeRun
from bilevel.outer import alternate as alternate
from bilevel.outer import scan_run as scan_run
from bilevel.outer import self_tuning as self_tuning
from bilevel.outer import tuned_params as tuned_params
from bilevel.problem import Problem as Problem
from bilevel.status import HypergradientError as HypergradientError
from bilevel.status import Status as Status
from bilevel.status import raise_for_status as raise_for_status
