"""Settings of the `learning_rate` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      models: which networks.
      steps: T, training steps of a run.
      windows: values of a schedule; each is shared by T / windows steps.
      batch: images of a training batch.
      train: training images.
      outer_batch: training images drawn for every outer gradient.
      updates: moves of the schedule by the full-horizon method; the others get as many as cost
        the same.
      outer_lr: first step size of the Adam that moves log rates and momentum logits; it falls
        to zero like a cosine.
      clip: norm to which a gradient is cut before.
      start_rate, start_momentum: of every layer and window before tuning.
      short: steps between two hypergradients of the greedy methods, for the MLP and the CNN.
      replays: fresh runs of the final schedule, over which its loss is averaged.
      trial: fresh runs of one trial of a search, whose losses are averaged.
      startup: trials of a search that are drawn at random before it models.
      quadratic_updates: moves of the schedule on the noisy quadratic.
    """

    models: tuple[str, ...] = ("mlp", "cnn")
    steps: int = 400
    windows: int = 10
    batch: int = 32
    train: int = 500
    outer_batch: int = 128
    updates: int = 30
    outer_lr: float = 0.1
    clip: float = 0.1
    start_rate: float = 0.03
    start_momentum: float = 0.5
    short: dict[str, tuple[int, ...]] = dataclasses.field(
        default_factory=lambda: {"mlp": (1, 10), "cnn": (10,)}, hash=False
    )
    replays: int = 3
    trial: int = 3
    startup: int = 8
    quadratic_updates: int = 300


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(
        models=("mlp",), steps=20, windows=2, updates=3, train=200, replays=1, quadratic_updates=20
    )


def cpu() -> Config:
    """The experiment, sized for two cores: the CNN takes three times as long as the MLP."""
    return Config(models=("mlp",))


def paper() -> Config:
    """Longer runs and more windows, for an accelerator."""
    return Config(steps=1000, windows=20, train=1000, outer_batch=500, updates=200, replays=8)
