"""Settings of the `pes` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      sets: which data.
      hidden: units of the hidden layer.
      steps: T, training steps of a run; a run then starts again.
      window: K, steps between two estimates of the gradient.
      batch: images of a training batch.
      train: training images.
      pairs: antithetic pairs N of both evolution strategies.
      sigma: deviation of the perturbations of log rates.
      updates: moves of the schedule by PES; the others get as many as cost the same.
      outer_lr: step size of the Adam that moves the schedule.
      start: log rate at the start and at the end of training, before tuning.
      replays: fresh runs of the final schedule.
      records: how often each method writes a record.
      particles: pairs on the scalar system that has a closed form.
    """

    sets: tuple[str, ...] = ("digits", "fashion")
    hidden: int = 32
    steps: int = 500
    window: int = 10
    batch: int = 16
    train: int = 1000
    pairs: int = 10
    sigma: float = 0.1
    updates: int = 400
    outer_lr: float = 0.03
    start: tuple[float, float] = (-3.5, -3.5)
    replays: int = 5
    records: int = 40
    particles: int = 200_000


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(sets=("digits",), steps=50, updates=20, records=4, replays=2, particles=2000)


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Longer runs, more pairs and a wider network."""
    return Config(hidden=128, steps=2000, pairs=100, updates=4000, batch=64, train=1500)
