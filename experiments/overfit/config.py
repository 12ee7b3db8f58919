"""Settings of the `overfit` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      sets: data sets.
      models: networks.
      outer_steps: hypergradients of each network, in the order of `models`.
      width: hidden units of the MLP and of the CNN.
      train, valid: images of these parts.
      test: images of the publisher's test part on which the fit is measured.
      inner_lr: first step size of the Adam that trains the network.
      inner_steps: full-batch training steps between two hypergradients.
      outer_lr: first step size of the Adam that moves the log decays. Both step sizes fall to
        zero like a cosine.
      products: steps of CG in one hypergradient, from a warm start (one product more).
      damping: added to the Gauss-Newton matrix.
      start: log decay of every weight before tuning.
      points: measurements along a run.
      rounds: paired timings of a tuning step and of ordinary training.
    """

    sets: tuple[str, ...] = ("mnist", "fashion_mnist")
    models: tuple[str, ...] = ("linear", "mlp", "cnn")
    outer_steps: tuple[int, ...] = (600, 200, 80)
    width: tuple[int, int] = (128, 1280)
    train: int = 50
    valid: int = 50
    test: int = 2_000
    inner_lr: float = 1e-3
    inner_steps: int = 8
    outer_lr: float = 0.2
    products: int = 5
    damping: float = 1e-2
    start: float = -6.0
    points: int = 10
    rounds: int = 20


def smoke() -> Config:
    """Seconds, on scikit-learn's digits (enlarged), which need no download: does it all run?"""
    return Config(
        sets=("digits",), outer_steps=(40, 20, 4), width=(32, 64), test=500, points=2, rounds=2
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """A wider CNN, longer training between hypergradients, smaller outer steps, the whole test."""
    return Config(
        outer_steps=(2_000, 2_000, 2_000),
        width=(500, 4096),
        inner_steps=20,
        outer_lr=0.05,
        test=10_000,
        points=40,
    )
