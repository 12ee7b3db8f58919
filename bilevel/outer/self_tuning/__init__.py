"""Self-tuning networks (STN and Delta-STN): weights, their response, hyperparameters together."""

from bilevel.outer.self_tuning.loop import self_tuning as self_tuning
from bilevel.outer.self_tuning.state import SelfTuningState as SelfTuningState
