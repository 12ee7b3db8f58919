"""Settings of the `unem` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      sets: what is clustered: "mixture" (drawn Gaussians) and "omniglot" (characters).
      classes, effective: classes with support, and those that the queries come from.
      shots, queries: support per class; queries of an episode.
      features: dimension of the features.
      spread: standard deviation of the class means of "mixture", in units of the noise.
      layers: steps of the iteration.
      valid, test: episodes to tune on and to judge on.
      batch, steps, rate: episodes per step of Adam, its steps and its rate.
      grid: values of one coefficient for all layers; ``grid_ends`` are the least and largest.
      temperatures: logarithms of the inverse temperatures of the larger grid.
    """

    sets: tuple[str, ...] = ("mixture", "omniglot")
    classes: int = 20
    effective: int = 5
    shots: int = 1
    queries: int = 75
    features: int = 16
    spread: float = 1.0
    layers: int = 10
    valid: int = 200
    test: int = 400
    batch: int = 20
    steps: int = 200
    rate: float = 0.1
    grid: int = 15
    grid_ends: tuple[float, float] = (0.1, 100.0)
    temperatures: tuple[float, ...] = (-1.5, -1.0, -0.5, 0.0, 0.5)


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        sets=("mixture",), classes=6, effective=2, queries=20, features=4, layers=4, valid=12,
        test=12, batch=4, steps=12, grid=3,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """More episodes, and longer tuning."""
    return Config(valid=1000, test=2000, steps=2000)
