"""Settings of the `egn` experiment and its presets."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """A set, its network and how long each optimizer trains.

    Attributes:
      name: "digits" (ten classes) or "housing" (one number).
      hidden: units of the only hidden layer.
      train, test: rows.
      batch: of every optimizer but L-BFGS, which sees all rows in each step.
      epochs: passes of each optimizer; they take about the same time.
      settings: of each optimizer, chosen on seed 100 (see `tune.py`).
    """

    name: str
    hidden: int
    train: int
    test: int
    batch: int
    epochs: dict[str, int] = dataclasses.field(hash=False)
    settings: dict[str, dict[str, Any]] = dataclasses.field(hash=False)


DIGITS = Task(
    "digits", 16, 1280, 500, 64,
    {"sgd": 20, "momentum": 20, "adam": 20, "lbfgs": 60, "sgn": 4, "egn": 4},
    {
        "sgd": {"learning_rate": 1.0},
        "momentum": {"learning_rate": 0.3},
        "adam": {"learning_rate": 0.03},
        "lbfgs": {},
        "sgn": {"learning_rate": 0.5, "damping": 0.03},
        "egn": {"learning_rate": 0.5, "damping": 0.03},
    },
)  # fmt: skip
HOUSING = Task(
    "housing", 32, 4096, 4000, 64,
    {"sgd": 100, "momentum": 100, "adam": 80, "lbfgs": 300, "sgn": 25, "egn": 50},
    {
        "sgd": {"learning_rate": 0.1},
        "momentum": {"learning_rate": 0.03},
        "adam": {"learning_rate": 0.01},
        "lbfgs": {},
        "sgn": {"learning_rate": 0.3, "damping": 0.1},
        "egn": {"learning_rate": 0.3, "damping": 0.1},
    },
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      tasks: what is trained.
      methods: the optimizers.
      products: of CG in the stochastic Gauss–Newton method, per step.
      target: training loss of "digits" whose epochs are counted.
    """

    tasks: tuple[Task, ...] = (DIGITS, HOUSING)
    methods: tuple[str, ...] = ("sgd", "momentum", "adam", "lbfgs", "sgn", "egn")
    products: int = 10
    target: float = 0.1


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    few = dict.fromkeys(DIGITS.epochs, 2)
    small = dataclasses.replace(DIGITS, hidden=4, train=64, test=50, batch=16, epochs=few)
    return Config(tasks=(small,))


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Ten times as long."""
    longer = [
        dataclasses.replace(t, epochs={m: 10 * n for m, n in t.epochs.items()})
        for t in (DIGITS, HOUSING)
    ]
    return Config(tasks=tuple(longer))
