"""Settings of the `evidence` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      decays: data sets on which one decay per tensor is tuned.
      ranges: data sets on which decays and the ranges of random rotations and shifts are tuned;
        `mnist_rotated` has every image turned by any angle, `fashion_mnist_shifted` moved.
      examples, augmented_examples: N, of all classes, without and with transformations.
      more: further examples that only the reference reads.
      test: test examples.
      hidden: units of the hidden layers.
      pooled, augmented_pooled: side of a square of pixels that is averaged.
      moved: how far an image of `_shifted` may be moved, in pooled pixels.
      rate, rate_hparams: of Adam, for weights and for logarithms of precisions.
      burn_in: training steps before the first outer step, with precision 1.
      inner_steps: training steps before each outer step.
      budget, reference: what a method may pay, in gradients of N examples, and the reference.
      terms: of the Neumann series of hold-out and cross-validation.
      folds: of cross-validation; hold-out holds out one of as many parts.
      finish: training steps with the chosen hyperparameters, on all examples, from where the run
        ended.
      draws, draws_judged: transformed copies that a prediction averages, in training and in test.
      augmented_batch, augmented_steps, augmented_inner: examples of a training step and of an
        evidence gradient with transformations, outer steps there, and training steps before each
        (before the first twenty times as many).
      rate_ranges: of Adam, for the ranges and the precisions beside them.
      bounds: examples whose full kernel is compared with its bounds.
    """

    decays: tuple[str, ...] = ("mnist", "fashion_mnist")
    ranges: tuple[str, ...] = (
        "mnist",
        "mnist_rotated",
        "fashion_mnist",
        "fashion_mnist_shifted",
    )
    examples: int = 400
    augmented_examples: int = 1_000
    more: int = 3_000
    test: int = 3_000
    hidden: tuple[int, ...] = (12,)
    pooled: int = 4
    augmented_pooled: int = 2
    moved: float = 2.0
    rate: float = 0.01
    rate_hparams: float = 0.15
    burn_in: int = 300
    inner_steps: int = 20
    budget: int = 800
    reference: int = 1_600
    terms: int = 3
    folds: int = 5
    finish: int = 500
    draws: int = 4
    draws_judged: int = 16
    augmented_batch: int = 100
    augmented_steps: int = 60
    augmented_inner: int = 5
    rate_ranges: float = 0.2
    bounds: int = 100


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        decays=("digits",), ranges=("digits_rotated",), examples=100, augmented_examples=100,
        more=200, test=200, hidden=(8,), pooled=1, augmented_pooled=1, budget=100, reference=100,
        terms=1, burn_in=20, inner_steps=5, finish=20, draws=2, draws_judged=2, augmented_batch=20,
        augmented_steps=3, bounds=20,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """More examples, a wider network, more pixels."""
    return Config(
        examples=1_000, augmented_examples=5_000, test=10_000, hidden=(50, 30), pooled=2,
        augmented_pooled=1, budget=2_400, reference=4_800, finish=2_000, draws=16,
        augmented_steps=1_000, moved=4.0,
    )  # fmt: skip
