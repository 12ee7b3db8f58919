"""Settings of the `maid` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      tasks: problems to run.
      budget: G that every method but the grid may spend on a problem.
      steps: most outer steps.
      rows: of the quadratic problem.
      examples: of MNIST that train, and that validate.
      least, most: bounds of its log penalties.
      first_decay: root mean square of the first trial move of their unbounded counterparts.
      images, side: images that denoising is tuned on, and their side.
      tested, tested_side: those that it is tested on.
      noise: standard deviation of their noise, where white is 1.
      weight, smoothing: their logarithms that denoising starts with.
      first_move: length of the first trial move of all that is tuned in denoising.
      unit: what a unit of a filter entry's hyperparameter is: they move with logarithms.
      low, high: range of both logarithms of total variation, for grid and searches.
      points: of the grid, along each of the two.
      trials: most trials of a search.
      solved: tolerance of an inner solve of grid and searches, relative to the first gradient.
      exact: relative tolerance of the solves called exact.
    """

    tasks: tuple[str, ...] = ("quadratic", "multinomial", "variation", "experts")
    budget: float = 3_000.0
    steps: int = 400
    rows: int = 1_000
    examples: int = 3_000
    least: float = -5.0
    most: float = 2.0
    first_decay: float = 1.0
    images: int = 8
    side: int = 64
    tested: int = 24
    tested_side: int = 96
    noise: float = 0.1
    weight: float = -5.0
    smoothing: float = -5.0
    first_move: float = 2.0
    unit: float = 0.02
    low: float = -6.0
    high: float = 0.0
    points: int = 15
    trials: int = 200
    solved: float = 1e-3
    exact: float = 1e-10


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(
        budget=200.0, steps=8, rows=50, examples=200, images=1, side=24, tested=2, tested_side=24,
        points=2, trials=3,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """All of MNIST's training part, more and larger images, ten times the budget."""
    return Config(
        budget=30_000.0, steps=3_000, examples=30_000, images=32, side=128, tested_side=240,
        trials=1_000,
    )  # fmt: skip
