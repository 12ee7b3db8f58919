"""How the hyperparameters move: bounds, and loops as triples of pure functions."""

from bilevel.outer.alternate import alternate as alternate
from bilevel.outer.alternation import AlternateState as AlternateState
from bilevel.outer.base import Algorithm as Algorithm
from bilevel.outer.base import Info as Info
from bilevel.outer.global_response import GlobalResponseState as GlobalResponseState
from bilevel.outer.global_response import global_response as global_response
from bilevel.outer.optimizers import complex_momentum as complex_momentum
from bilevel.outer.optimizers import fedhyper_client as fedhyper_client
from bilevel.outer.optimizers import fedhyper_global as fedhyper_global
from bilevel.outer.optimizers import fedhyper_server as fedhyper_server
from bilevel.outer.optimizers import hypergradient_descent as hypergradient_descent
from bilevel.outer.penalty import PenaltyState as PenaltyState
from bilevel.outer.penalty import bome as bome
from bilevel.outer.penalty import f2sa as f2sa
from bilevel.outer.penalty import pbgd as pbgd
from bilevel.outer.schedule import HyperSchedule as HyperSchedule
from bilevel.outer.self_tuning import SelfTuningState as SelfTuningState
from bilevel.outer.self_tuning import self_tuning as self_tuning
from bilevel.outer.variable import Variable as Variable
from bilevel.outer.whole_run import WholeRun as WholeRun
from bilevel.outer.whole_run import scan_run as scan_run
