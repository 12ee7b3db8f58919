"""``jax.grad`` for hyperparameters.

The modules stand in floors, and each imports only from those below it (see ``README.md`` in
this folder): the problem, the linear solve, the hypergradient, the outer update.
"""

from types import ModuleType as _Module

from bilevel import objectives as objectives
from bilevel import outer as outer
from bilevel import plot as plot
from bilevel import regularizers as regularizers
from bilevel import testing as testing
from bilevel.ground.status import HypergradientError as HypergradientError
from bilevel.ground.status import Status as Status
from bilevel.ground.status import raise_for_status as raise_for_status
from bilevel.hypergradient import BestResponse as BestResponse
from bilevel.hypergradient import BestResponseState as BestResponseState
from bilevel.hypergradient import Evolution as Evolution
from bilevel.hypergradient import FiniteDifference as FiniteDifference
from bilevel.hypergradient import Hypergradient as Hypergradient
from bilevel.hypergradient import Implicit as Implicit
from bilevel.hypergradient import Response as Response
from bilevel.hypergradient import Unroll as Unroll
from bilevel.hypergradient import UnrollMap as UnrollMap
from bilevel.hypergradient import hypergrad as hypergrad
from bilevel.hypergradient import hypergrad_init as hypergrad_init
from bilevel.hypergradient import hypergrad_solve as hypergrad_solve
from bilevel.hypergradient import value_and_hypergrad as value_and_hypergrad
from bilevel.hypergradient import with_response as with_response
from bilevel.inner.descend import InnerState as InnerState
from bilevel.inner.hypernetwork import Hypernetwork as Hypernetwork
from bilevel.inner.minimize import Minimum as Minimum
from bilevel.inner.minimize import minimize as minimize
from bilevel.inner.minimize import proximal_step as proximal_step
from bilevel.inner.network import StructuredResponse as StructuredResponse
from bilevel.inner.train import descend as descend
from bilevel.linear import CG as CG
from bilevel.linear import EKFAC as EKFAC
from bilevel.linear import KFAC as KFAC
from bilevel.linear import Dense as Dense
from bilevel.linear import Diagonal as Diagonal
from bilevel.linear import DualCG as DualCG
from bilevel.linear import DynamicLanczos as DynamicLanczos
from bilevel.linear import Identity as Identity
from bilevel.linear import LinearSolution as LinearSolution
from bilevel.linear import LinearSolver as LinearSolver
from bilevel.linear import Lineax as Lineax
from bilevel.linear import Neumann as Neumann
from bilevel.linear import Nystrom as Nystrom
from bilevel.linear import Stochastic as Stochastic
from bilevel.linear import Woodbury as Woodbury
from bilevel.outer import Algorithm as Algorithm
from bilevel.outer import Anchored as Anchored
from bilevel.outer import Certificate as Certificate
from bilevel.outer import HyperSchedule as HyperSchedule
from bilevel.outer import Indexed as Indexed
from bilevel.outer import Page as Page
from bilevel.outer import Saga as Saga
from bilevel.outer import Spider as Spider
from bilevel.outer import Storm as Storm
from bilevel.outer import WholeRun as WholeRun
from bilevel.outer import alternate as alternate
from bilevel.outer import amigo as amigo
from bilevel.outer import bo_rep as bo_rep
from bilevel.outer import bome as bome
from bilevel.outer import complex_momentum as complex_momentum
from bilevel.outer import f2sa as f2sa
from bilevel.outer import fedhyper_client as fedhyper_client
from bilevel.outer import fedhyper_global as fedhyper_global
from bilevel.outer import fedhyper_server as fedhyper_server
from bilevel.outer import fsla as fsla
from bilevel.outer import gauss_newton as gauss_newton
from bilevel.outer import global_response as global_response
from bilevel.outer import hoag as hoag
from bilevel.outer import hypergradient_descent as hypergradient_descent
from bilevel.outer import maid as maid
from bilevel.outer import mrbo as mrbo
from bilevel.outer import pbgd as pbgd
from bilevel.outer import saba as saba
from bilevel.outer import scan_run as scan_run
from bilevel.outer import self_tuning as self_tuning
from bilevel.outer import single_loop as single_loop
from bilevel.outer import soba as soba
from bilevel.outer import spaba as spaba
from bilevel.outer import srba as srba
from bilevel.outer import stocbio as stocbio
from bilevel.problem.conditions import Composite as Composite
from bilevel.problem.conditions import FixedPoint as FixedPoint
from bilevel.problem.conditions import Root as Root
from bilevel.problem.microbatches import accumulate as accumulate
from bilevel.problem.operators.gauss_newton import GaussNewton as GaussNewton
from bilevel.problem.operators.hessian import Hessian as Hessian
from bilevel.problem.operators.jacobian import Jacobian as Jacobian
from bilevel.problem.operators.linear_model import LinearModel as LinearModel
from bilevel.problem.two_losses import Problem as Problem
from bilevel.regularizers import prox as prox
from bilevel.run import FitResult as FitResult
from bilevel.run import fit as fit
from bilevel.run.replay import Metagradient as Metagradient
from bilevel.run.replay import metagradient as metagradient
from bilevel.space import Free as Free
from bilevel.space import Integer as Integer
from bilevel.space import Interval as Interval
from bilevel.space import Positive as Positive
from bilevel.space import Simplex as Simplex
from bilevel.space import Space as Space
from bilevel.tools.attribution import Influence as Influence
from bilevel.tools.attribution import influence as influence
from bilevel.tools.attribution import retraining as retraining
from bilevel.tools.datamodels import DatamodelScore as DatamodelScore
from bilevel.tools.datamodels import datamodel_score as datamodel_score
from bilevel.tools.diagnosis import Diagnosis as Diagnosis
from bilevel.tools.diagnosis import diagnose as diagnose
from bilevel.tools.differences import HypergradCheck as HypergradCheck
from bilevel.tools.differences import check_hypergrad as check_hypergrad
from bilevel.tools.memory import MemoryReport as MemoryReport
from bilevel.tools.memory import memory_report as memory_report
from bilevel.tools.models import Split as Split
from bilevel.tools.models import split_equinox as split_equinox
from bilevel.tools.models import split_linen as split_linen
from bilevel.tools.models import split_nnx as split_nnx
from bilevel.tools.smoothness import Metasmoothness as Metasmoothness
from bilevel.tools.smoothness import metasmoothness as metasmoothness

_NAMESPACES = ("objectives", "outer", "plot", "prox", "regularizers", "run", "testing")

# What is imported above is public; the packages that Python adds on the way are not.
__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]
    name
    for name, value in globals().items()
    if not name.startswith("_") and (name in _NAMESPACES or not isinstance(value, _Module))
)


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"]
