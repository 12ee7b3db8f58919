"""Settings of the `games` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      rate: step size of every method on the bilinear game, as in the paper's figure.
      steps: of every run.
      points: measurements along a run.
      beta: magnitude of the momentum in the map of spectral radii.
      angles, rates: points of that map along its two axes.
      mixed_rate: step size on the game that rotates and descends at once.
      mixed_steps: steps on it.
    """

    rate: float = 0.06
    steps: int = 500
    points: int = 50
    beta: float = 0.9
    angles: int = 121
    rates: int = 81
    mixed_rate: float = 0.02
    mixed_steps: int = 5_000


def smoke() -> Config:
    """A second: does everything run?"""
    return Config(steps=100, points=5, angles=9, rates=7, mixed_steps=100)


def cpu() -> Config:
    """The experiment: seconds, all of it is linear algebra in a few dimensions."""
    return Config()


def paper() -> Config:
    """The same with a finer map."""
    return Config(angles=481, rates=321)
