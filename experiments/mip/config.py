"""Settings of the `mip` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
    """What a hypernetwork is trained on.

    Attributes:
      name: of the methods' first part.
      kind: "classifier", a ReLU network whose decay is ``10 ** (low + (high - low) g)`` with an
        input g in [0, 1]; or "linear", ten images and an input that is the log decay itself.
      widths: hidden units of the classifier, layer by layer; none for "linear".
      low, high: the range of log decays, to base ten for "classifier", natural for "linear".
      hidden: widths of the hypernetwork.
      batch: images a step; 0 for all of them.
      draws: inputs a step, drawn uniformly from the range.
      steps: of training, for every variant, optimizer and rate.
      sgd_rates, adam_rates: learning rates tried.
    """

    name: str
    kind: str
    widths: tuple[int, ...]
    low: float
    high: float
    hidden: tuple[int, ...]
    batch: int
    draws: int
    steps: int
    sgd_rates: tuple[float, ...]
    adam_rates: tuple[float, ...]


DEEP = Task(
    name="deep",
    kind="classifier",
    widths=(32, 32, 32),
    low=-6.0,
    high=-2.0,
    hidden=(16, 64, 128),
    batch=64,
    draws=1,
    steps=2_000,
    sgd_rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    adam_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
)
SHALLOW = dataclasses.replace(
    DEEP, name="shallow", widths=(32,), sgd_rates=(3e-3, 1e-2, 3e-2, 1e-1)
)
LINEAR = Task(
    name="linear",
    kind="linear",
    widths=(),
    low=-2.0,
    high=4.0,
    hidden=(50,),
    batch=0,
    draws=10,
    steps=5_000,
    sgd_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    adam_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      tasks: one comparison each.
      data: "digits" or "mnist".
      train: images to train a classifier on.
      variants: of `networks.VARIANTS`, the plain one first.
      points: measurements along a run.
      grid: inputs over which a measured loss is averaged, on all training images.
    """

    tasks: tuple[Task, ...] = (DEEP, SHALLOW, LINEAR)
    data: str = "digits"
    train: int = 1_000
    variants: tuple[str, ...] = ("plain", "mip")
    points: int = 100
    grid: int = 9


def smoke() -> Config:
    """Few steps, one rate: does everything run?"""
    small = dataclasses.replace(
        DEEP, widths=(16, 16), hidden=(16,), steps=100, sgd_rates=(1e-2,), adam_rates=(3e-3,)
    )
    linear = dataclasses.replace(LINEAR, steps=100, sgd_rates=(1e-3,), adam_rates=(1e-3,))
    return Config(tasks=(small, linear), points=10)


def cpu() -> Config:
    """The experiment, sized for one core."""
    return Config()


def paper() -> Config:
    """MNIST, each of the two parts alone too, more rates and longer runs: for a GPU."""
    rates = {
        "sgd_rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "adam_rates": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    }
    deep = dataclasses.replace(DEEP, widths=(120, 84, 84), batch=128, steps=20_000, **rates)
    return Config(
        tasks=(deep, dataclasses.replace(deep, name="shallow", widths=(120,)), LINEAR),
        data="mnist",
        train=50_000,
        variants=("plain", "encoding", "residual", "mip"),
    )
