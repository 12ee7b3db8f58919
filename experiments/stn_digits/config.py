"""Settings of the `stn_digits` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      train, valid: examples of the two parts; the other digits are the test part.
      hidden: units of each of the two hidden layers.
      batch, valid_batch: examples of a batch to train on, and of one to move hyperparameters.
      high: the rates lie in (0, high).
      starts: the rate, of all three places, from which the runs of a method start.
      first: the start of the runs about the width, and from where moves are measured; and of the
        runs that all seeds make, as in the papers.
      wide_seeds: seeds below it also make the runs from all starts, and those about the width.
      lr: of SGD with momentum 0.9 on the weights, the same for every method, and on the response;
        falls to zero.
      outer_lr: of Adam on the rates' logits and on the scales.
      outer_power: of the cosine along which that rate falls, so that the rates settle first.
      sgd_outer_lr: of SGD in Adam's place, in the runs about the width.
      scale: first width of the perturbations, in logits.
      entropy: reward for wide perturbations.
      small_scale: the width at which nothing can be learnt.
      warm_up: part of the cycles that only train.
      budget: G of a whole run of a method.
      trials: settings that a black-box search may try in that budget.
      grid: rates, the same in all three places, of the fixed runs.
      points: measurements along a run, the same number for every method.
    """

    train: int = 400
    valid: int = 600
    hidden: int = 256
    batch: int = 64
    valid_batch: int = 256
    high: float = 0.95
    starts: tuple[float, ...] = (0.05, 0.3, 0.5, 0.7, 0.9)
    first: float = 0.05
    wide_seeds: int = 3
    lr: float = 0.05
    outer_lr: float = 0.04
    outer_power: float = 1.0
    sgd_outer_lr: float = 2.0
    scale: float = 1.0
    entropy: float = 1e-3
    small_scale: float = 0.01
    warm_up: float = 0.05
    budget: int = 15_000
    trials: int = 12
    grid: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    points: int = 25


def smoke() -> Config:
    """Few cycles: does everything run?"""
    return Config(hidden=32, budget=850, trials=3, starts=(0.05, 0.7), grid=(0.0, 0.5), points=5)


def cpu() -> Config:
    """The experiment; it is small."""
    return Config()


def paper() -> Config:
    """Five times as long, and wider networks: the size of the MNIST experiment of Delta-STN."""
    return Config(hidden=1200, budget=75_000)
