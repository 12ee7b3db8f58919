"""Settings of the `protocol` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      train, valid, test: digits of the three parts. The test digits are the same for all seeds;
        the other two are drawn anew, from the rest, by each.
      hidden: units of the hidden layer.
      inner_lr: step size of the Adam that trains.
      steps: full-batch training steps of a network.
      measured: measurements of the validation loss along them, of which the best point is kept.
      trials: settings of the random search: a log decay for each of four tensors.
      low, high: their range.
      start: log decay without tuning, and at the start of the gradient method.
      rounds: outer steps of the gradient method, which tunes a decay per weight.
      inner_steps: training steps of its one network between two of them.
      outer_lr: step size of the Adam that moves log decays.
      products: steps of CG for one hypergradient.
      damping: of the curvature matrix.
      first: the seed 0 is tuned on this one, 1 on the next, and so on.
    """

    train: int = 300
    valid: int = 60
    test: int = 900
    hidden: int = 32
    inner_lr: float = 0.01
    steps: int = 300
    measured: int = 30
    trials: int = 40
    low: float = -12.0
    high: float = 0.0
    start: float = -5.0
    rounds: int = 100
    inner_steps: int = 30
    outer_lr: float = 0.05
    products: int = 10
    damping: float = 1e-3
    first: int = 100


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(hidden=8, steps=40, measured=4, trials=3, rounds=3, inner_steps=10)


def cpu() -> Config:
    """The experiment, sized for two cores: a minute or two for ten seeds."""
    return Config()


def paper() -> Config:
    """The same; the claim is about protocols, not about size."""
    return Config()
