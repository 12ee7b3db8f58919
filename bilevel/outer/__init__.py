"""How the hyperparameters move: bounds, and loops as triples of pure functions."""

from bilevel.outer.alternate import alternate as alternate
from bilevel.outer.alternation import AlternateInfo as AlternateInfo
from bilevel.outer.alternation import AlternateState as AlternateState
from bilevel.outer.base import Algorithm as Algorithm
from bilevel.outer.bounds import Bound as Bound
from bilevel.outer.bounds import Free as Free
from bilevel.outer.bounds import Integer as Integer
from bilevel.outer.bounds import Interval as Interval
from bilevel.outer.bounds import Positive as Positive
from bilevel.outer.bounds import Simplex as Simplex
from bilevel.outer.constrain import Space as Space
from bilevel.outer.global_response import global_response as global_response
from bilevel.outer.schedule import HyperSchedule as HyperSchedule
from bilevel.outer.self_tuning import self_tuning as self_tuning
from bilevel.outer.self_tuning import tuned_params as tuned_params
from bilevel.outer.tuning_state import SelfTuningInfo as SelfTuningInfo
from bilevel.outer.tuning_state import SelfTuningState as SelfTuningState
from bilevel.outer.whole_run import WholeRun as WholeRun
from bilevel.outer.whole_run import scan_run as scan_run
