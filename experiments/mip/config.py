"""Settings of the `mip` experiment and its presets."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What a hypernetwork is trained on.

    Attributes:
      name: of the methods' first part.
      kind: "classifier", a ReLU network whose decay is ``10 ** (low + (high - low) g)`` with an
        input g in [0, 1]; "weighted", one with the loss ``(1 - g) data + g prior`` in its place;
        or "linear", ten images and an input that is the log decay itself.
      channels: of convolutions of 5 x 5, each with a pool, before the hidden units.
      widths: hidden units, layer by layer; none for "linear".
      low, high: the range of log decays, to base ten for "classifier", natural for "linear".
      hidden: widths of the hypernetwork.
      batch: images per step; 0 for all of them.
      draws: inputs a step, drawn uniformly from the range.
      steps: of training, for every variant, optimizer and rate.
      sgd_rates, adam_rates: learning rates tried; none: that optimizer is left out.
      data: "digits" or "mnist".
      train: images to train on.
      measured: of these, how many a measured loss is taken on; 0 for all of them.
      points: measurements along a run.
      variants: of `networks.VARIANTS`, the plain one first.
    """

    name: str
    kind: str
    channels: tuple[int, ...]
    widths: tuple[int, ...]
    low: float
    high: float
    hidden: tuple[int, ...]
    batch: int
    draws: int
    steps: int
    sgd_rates: tuple[float, ...]
    adam_rates: tuple[float, ...]
    data: str = "digits"
    train: int = 1_000
    measured: int = 0
    points: int = 100
    variants: tuple[str, ...] = ("plain", "he", "encoding", "residual", "mip")


DEEP = Task(
    name="deep",
    kind="classifier",
    channels=(),
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
    DEEP,
    name="shallow",
    widths=(32,),
    sgd_rates=(3e-3, 1e-2, 3e-2, 1e-1),
    variants=("plain", "mip"),
)
LINEAR = Task(
    name="linear",
    kind="linear",
    channels=(),
    widths=(),
    low=-2.0,
    high=4.0,
    hidden=(50,),
    batch=0,
    draws=10,
    steps=5_000,
    sgd_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    adam_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    variants=("plain", "mip"),
)
# Near to the first experiment of the paper: LeNet (with smaller dense layers) on MNIST, its
# losses weighted by the input. Four passes over the images: the plain one still gets better there.
CONV = Task(
    name="conv",
    kind="weighted",
    channels=(6, 16),
    widths=(32,),
    low=0.0,
    high=1.0,
    hidden=(16, 64, 128),
    batch=64,
    draws=1,
    steps=500,
    sgd_rates=(1e-2, 3e-2, 1e-1, 3e-1),
    adam_rates=(3e-4, 1e-3, 3e-3, 1e-2),
    data="mnist",
    train=8_000,
    measured=256,
    points=50,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      tasks: one comparison each.
      grid: inputs over which a measured loss is averaged.
    """

    tasks: tuple[Task, ...] = (DEEP, SHALLOW, LINEAR, CONV)
    grid: int = 9


def smoke() -> Config:
    """Few steps, one rate: does everything run?"""
    short: dict[str, Any] = {"steps": 100, "points": 10}
    one: dict[str, Any] = {"hidden": (16,), "sgd_rates": (1e-2,), "adam_rates": ()}
    small = dataclasses.replace(
        DEEP, widths=(16, 16), variants=("plain", "he", "mip"), **one, **short
    )
    linear = dataclasses.replace(LINEAR, sgd_rates=(1e-3,), adam_rates=(1e-3,), **short)
    conv = dataclasses.replace(
        CONV, channels=(4,), widths=(16,), data="digits", train=1_000, measured=128,
        variants=("plain", "mip"), **one, **short,
    )  # fmt: skip
    return Config(tasks=(small, linear, conv))


def cpu() -> Config:
    """The experiment, sized for one core."""
    return Config()


def paper() -> Config:
    """MNIST, each of the two parts alone too, more rates and longer runs: for a GPU."""
    rates: dict[str, Any] = {
        "sgd_rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "adam_rates": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    }
    large: dict[str, Any] = {"data": "mnist", "train": 50_000, "batch": 128, "steps": 20_000}
    deep = dataclasses.replace(DEEP, widths=(120, 84, 84), **large, **rates)
    shallow = dataclasses.replace(deep, name="shallow", widths=(120,), variants=("plain", "mip"))
    linear = dataclasses.replace(LINEAR, data="mnist", train=50_000)
    conv = dataclasses.replace(CONV, widths=(120, 84), measured=2_048, points=100, **large, **rates)
    return Config(tasks=(deep, shallow, linear, conv))
