"""Settings of the `hyperlista` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      measured, codes: rows and columns of the dictionary.
      density: part of the codes that is not zero; ``shifted`` is that of the other distribution.
      layers: steps of every solver.
      batch: codes of each step of Adam; all are drawn anew.
      steps: steps of Adam for solvers with a handful of scalars.
      network_steps: for LISTA, which learns its matrices.
      rate, network_rate: of Adam.
      test: codes to judge on.
      grid: points along each of the three scalars of the grid search.
      sharpness: of the relaxed selection that tuning differentiates, in parts of the codes.
    """

    measured: int = 50
    codes: int = 100
    density: float = 0.1
    shifted: float = 0.15
    layers: int = 16
    batch: int = 128
    steps: int = 100
    network_steps: int = 1000
    rate: float = 0.05
    network_rate: float = 1e-3
    test: int = 1024
    grid: tuple[int, int, int] = (6, 6, 6)
    sharpness: float = 0.02


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(
        measured=20, codes=40, layers=6, batch=32, steps=20, network_steps=20, test=64,
        grid=(2, 2, 2),
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """The sizes of the paper."""
    return Config(
        measured=250, codes=500, batch=512, network_steps=20_000, grid=(11, 11, 21)
    )  # fmt: skip
