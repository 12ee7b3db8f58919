"""Settings of the `many` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment; all of it runs in float64.

    Attributes:
      sets: names of `sets.TITLES`, and how many rows of each are fitted and tuned on.
      test: most of the other rows that test.
      grid, points: ends and number of the log penalties that are searched, for sums of losses.
      repeats, beside, points_beside: of the second search for one penalty, by other folds so many
        times, on so many points within a distance of the first.
      spreads: of the log penalties under the prior, standard deviations s; the strength is
        1 / (n s^2) for n rows, in nats. Beside them, 0: one shared penalty.
      folds: of the cross-validation that is tuned.
      splits: of the outer cross-validation that chooses the strength.
      errors: how many standard errors better than sharing a strength must be.
      steps, rate: of Adam, on the log penalties.
    """

    sets: tuple[tuple[str, int], ...] = (
        ("diabetes", 200),
        ("concrete", 300),
        ("energy", 200),
        ("yacht", 150),
        ("wine", 400),
        ("kin8nm", 400),
        ("california", 400),
        ("power", 300),
        ("breast_cancer", 200),
        ("digits", 150),
        ("covtype", 250),
        ("ijcnn1", 400),
    )
    test: int = 4000
    grid: tuple[float, float] = (-14.0, 9.0)
    points: int = 24
    repeats: int = 30
    beside: float = 3.0
    points_beside: int = 13
    spreads: tuple[float, ...] = (0.5, 1.0, 2.0)
    folds: int = 5
    splits: int = 5
    errors: float = 0.5
    steps: int = 30
    rate: float = 0.35


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        sets=(("diabetes", 60), ("breast_cancer", 60)),
        test=200,
        points=5,
        repeats=2,
        points_beside=3,
        spreads=(1.0,),
        folds=2,
        splits=2,
        steps=3,
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Longer, with more outer folds."""
    return Config(splits=10, steps=200)
