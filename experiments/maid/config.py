"""Settings of the `maid` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      tasks: problems to run.
      budget: G that every method may spend on a problem.
      steps: most outer steps.
      rows: of the quadratic problem.
      examples: of MNIST that train, and that validate.
      images, side: denoised images of either part, and their side.
      noise: standard deviation of their noise, where white is 1.
      low, high: range of both logarithms of the denoising penalty, for the searches.
      trials: most trials of a search.
      solved: tolerance of an inner solve of the searches, relative to the first gradient.
      exact: relative tolerance of the solves called exact.
    """

    tasks: tuple[str, ...] = ("quadratic", "multinomial", "denoise")
    budget: float = 3_000.0
    steps: int = 400
    rows: int = 1_000
    examples: int = 3_000
    images: int = 6
    side: int = 96
    noise: float = 0.1
    low: float = -8.0
    high: float = 0.0
    trials: int = 200
    solved: float = 1e-3
    exact: float = 1e-10


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(budget=80.0, steps=8, rows=50, examples=200, images=1, side=32, trials=3)


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """All of MNIST's training part, all Kodak images, ten times the budget."""
    return Config(budget=30_000.0, steps=3_000, examples=30_000, images=12, trials=1_000)
