"""Settings of the `many` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment; all of it runs in float64.

    Attributes:
      tasks: two-class problems that come with scikit-learn.
      rows: most rows to fit and tune on; the others test.
      strengths: of the prior, in units of the mean log-loss.
      folds: of the cross-validation that is tuned.
      splits: of the outer cross-validation that chooses the strength.
      start: first log penalties.
      steps, rate: of Adam, on the log penalties.
      tolerance: of the fits, on the gradient.
    """

    tasks: tuple[str, ...] = ("breast_cancer", "digits_3_8")
    rows: int = 150
    strengths: tuple[float, ...] = (float("inf"), 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 0.0)
    folds: int = 5
    splits: int = 3
    start: float = -3.0
    steps: int = 60
    rate: float = 0.2
    tolerance: float = 1e-6


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(
        tasks=("breast_cancer",),
        rows=60,
        strengths=(float("inf"), 1e-2),
        folds=2,
        splits=2,
        steps=4,
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Longer, with more outer folds."""
    return Config(splits=5, steps=200)
