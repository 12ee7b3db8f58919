"""Settings of the `evidence` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      decays: data sets on which one decay per tensor is tuned.
      ranges: data sets on which decays and the ranges of random rotations and shifts are tuned;
        `mnist_rotated` has every image turned by any angle, `fashion_mnist_shifted` moved.
      examples: N, of all classes.
      more: further examples that only the reference reads.
      test: test examples.
      hidden: units of the two hidden layers.
      pooled: side of a square of pixels that is averaged.
      moved: how far an image of `_shifted` may be moved, in pooled pixels.
      rate, rate_hparams: of Adam, for weights and for logarithms of precisions.
      inner_steps: training steps before each outer step.
      budget, reference: what a method may pay, in gradients of N examples, and the reference.
      outer_batch: examples of a stochastic evidence gradient.
      terms: of the Neumann series of hold-out and cross-validation.
      folds: of cross-validation; hold-out holds out one of as many parts.
      retrain: training steps with the chosen hyperparameters, on all examples.
      draws, draws_judged: transformed copies that a prediction averages, in training and in test.
      augmented_batch, augmented_steps: examples of a training step and of an evidence gradient with
        transformations, and outer steps there.
      bounds: examples whose full kernel is compared with its bounds.
    """

    decays: tuple[str, ...] = ("mnist", "fashion_mnist")
    ranges: tuple[str, ...] = (
        "mnist",
        "mnist_rotated",
        "fashion_mnist",
        "fashion_mnist_shifted",
    )
    examples: int = 1_000
    more: int = 5_000
    test: int = 3_000
    hidden: tuple[int, int] = (50, 30)
    pooled: int = 2
    moved: float = 2.0
    rate: float = 0.005
    rate_hparams: float = 0.2
    inner_steps: int = 10
    budget: int = 1_000
    reference: int = 2_000
    outer_batch: int = 1_000
    terms: int = 3
    folds: int = 5
    retrain: int = 500
    draws: int = 4
    draws_judged: int = 16
    augmented_batch: int = 100
    augmented_steps: int = 150
    bounds: int = 100


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        decays=("digits",), ranges=("digits_rotated",), examples=100, more=200, test=200,
        hidden=(12, 8), pooled=1, budget=100, reference=100, terms=1, outer_batch=20, retrain=20,
        draws=2, draws_judged=2, augmented_batch=20, augmented_steps=3, bounds=20,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """More examples, a wider network, all pixels."""
    return Config(
        examples=5_000, test=10_000, hidden=(256, 128), pooled=1, budget=10_000, outer_batch=500,
        retrain=4_000, draws=16, augmented_steps=1_000, moved=4.0,
    )  # fmt: skip
