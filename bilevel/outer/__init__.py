"""How the hyperparameters move: bounds, and loops as triples of pure functions."""

from bilevel.outer.alternate import alternate as alternate
from bilevel.outer.alternation import AlternateState as AlternateState
from bilevel.outer.base import Algorithm as Algorithm
from bilevel.outer.base import Info as Info
from bilevel.outer.global_response import GlobalResponseState as GlobalResponseState
from bilevel.outer.global_response import global_response as global_response
from bilevel.outer.inexact import BoRepState as BoRepState
from bilevel.outer.inexact import Certificate as Certificate
from bilevel.outer.inexact import HoagState as HoagState
from bilevel.outer.inexact import MaidState as MaidState
from bilevel.outer.inexact import bo_rep as bo_rep
from bilevel.outer.inexact import hoag as hoag
from bilevel.outer.inexact import maid as maid
from bilevel.outer.schedule import HyperSchedule as HyperSchedule
from bilevel.outer.self_tuning import SelfTuningState as SelfTuningState
from bilevel.outer.self_tuning import self_tuning as self_tuning
from bilevel.outer.variable import Variable as Variable
from bilevel.outer.whole_run import WholeRun as WholeRun
from bilevel.outer.whole_run import scan_run as scan_run
