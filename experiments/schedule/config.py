"""Settings of the `schedule` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      images: the data set, `fashion_mnist` or `digits`.
      train, valid: images to train on, and those that metagradients and the grid are judged by.
      hidden: units of the hidden layer.
      batch: images of a training step.
      momentum: of SGD.
      steps: of a training run.
      short: steps of the runs that are differentiated.
      updates: metagradients taken, each of a new run.
      knots: logarithms of the rate along the run that are tuned, over a cosine to zero.
      start: the rate at the start, at every knot.
      move: first step of the outer Adam, in log units; it falls linearly.
      points: peaks of the grid, evenly in the logarithm ...
      low, high: ... from here to there.
      fresh: new runs that judge every schedule.
      trials, startup: whole runs of the search of a peak, and how many of them at random.
    """

    images: str = "fashion_mnist"
    train: int = 5_000
    valid: int = 2_000
    hidden: int = 64
    batch: int = 100
    momentum: float = 0.9
    steps: int = 300
    short: int = 75
    updates: int = 5
    knots: int = 6
    start: float = 0.02
    move: float = 0.8
    points: int = 20
    low: float = 0.002
    high: float = 1.0
    fresh: int = 5
    trials: int = 5
    startup: int = 2


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        images="digits", train=200, valid=100, hidden=8, batch=20, steps=24, short=6, updates=2,
        points=3, fresh=2,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """All images, a wider network, longer runs."""
    return Config(train=50_000, valid=10_000, hidden=512, steps=3_000, short=750)
