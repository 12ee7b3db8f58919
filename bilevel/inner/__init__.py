"""How the parameters follow the hyperparameters forward: training steps and networks."""

from bilevel.inner.descend import InnerState as InnerState
from bilevel.inner.descend import StepInfo as StepInfo
from bilevel.inner.descend import descend as descend
