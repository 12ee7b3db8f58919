"""Settings of the `attribution` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
      activation: of the hidden layer, `tanh`, `softplus` or `relu`.
      rate: learning rate of SGD with momentum 0.9.
      steps: training steps.
    """

    activation: str = "tanh"
    rate: float = 0.05
    steps: int = 200


TEN = (
    Setting("tanh", 0.01),
    Setting("tanh", 0.05),
    Setting("tanh", 0.2),
    Setting("tanh", 0.5),
    Setting("relu", 0.01),
    Setting("relu", 0.05),
    Setting("relu", 0.2),
    Setting("relu", 0.5),
    Setting("softplus", 0.05),
    Setting("softplus", 0.5),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      sets: data sets whose examples are attributed; `concrete` is a regression.
      train, queries: examples to train on, and to explain.
      hidden: units of the hidden layer.
      batch: examples a step reads.
      decay: strength of the penalty on the weights.
      setting: how the models of the first part are trained.
      subsets, removed: retrained runs of the score, and the share of examples each leaves out.
      settings: the ways to train that are ordered by their smoothness, on digits.
      few: retrained runs for each of them.
      step: h of the metasmoothness, on the scale of a weight.
    """

    sets: tuple[str, ...] = ("mnist", "digits", "concrete")
    train: int = 400
    queries: int = 20
    hidden: int = 16
    batch: int = 200
    decay: float = 1e-3
    setting: Setting = Setting("softplus", 0.01)
    subsets: int = 50
    removed: float = 0.05
    settings: tuple[Setting, ...] = TEN
    few: int = 24
    step: float = 0.3


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    short = Setting(steps=20)
    return Config(
        sets=("digits",), train=60, queries=4, hidden=4, batch=20, setting=short, subsets=6,
        settings=(short, Setting("relu", 0.5, 20)), few=4,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """More examples, a wider network, longer runs."""
    return Config(
        train=5_000, queries=50, hidden=128, batch=250, setting=Setting(steps=1_000), subsets=100
    )
