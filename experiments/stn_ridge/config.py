"""Settings of the `stn_ridge` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      examples: of each of the two parts.
      features: columns of X.
      truth: standard deviation of the weights that made the data.
      noise: standard deviation of the noise of the targets.
      starts: log decays from which the runs of a method start.
      sigma: scale of the perturbations, fixed.
      cycles: of five training steps and one move of the log decay.
      slower: how many times as many cycles STN gets, whose regression is worse conditioned.
      warm_up: part of the cycles that only train.
      outer_lr: Adam's on the log decay, falling to zero along a cosine.
      delta_lr: of SGD on the weights; on the response, of a unit of variance.
      stn_lr: Adam's on weights and response together, falling to zero along a cosine.
      response_steps: training steps of the second part, the response at a fixed log decay.
      frozen, frozen_sigma: that log decay, and the scale there.
      rate: SGD's in the second part, the same for both.
    """

    examples: int = 40
    features: int = 20
    truth: float = 0.5
    noise: float = 2.0
    starts: tuple[float, ...] = (-5.0, -3.0, -1.0, 1.0, 2.0)
    sigma: float = 0.2
    cycles: int = 4_000
    slower: int = 3
    warm_up: float = 0.1
    outer_lr: float = 0.01
    delta_lr: tuple[float, float] = (0.1, 0.03)
    stn_lr: float = 3e-3
    response_steps: int = 60_000
    frozen: float = -4.0
    frozen_sigma: float = 0.5
    rate: float = 0.02


def smoke() -> Config:
    """Few cycles: does everything run?"""
    return Config(cycles=400, starts=(-3.0, 1.0), response_steps=2_000)


def cpu() -> Config:
    """The experiment; it is small."""
    return Config()


def paper() -> Config:
    """Twice as long."""
    return Config(cycles=8_000, response_steps=120_000)
