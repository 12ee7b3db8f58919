"""Settings of the `cleaning` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      sets: data sets.
      train, valid: images of the two parts; the test part is the publisher's.
      flipped: fraction of training labels replaced by a wrong one, drawn at random, where there
        are no human mistakes.
      pooled: whether images are averaged over squares of 2 x 2 pixels, in colour of 4 x 4.
      decay: of the weights of the linear model, a part of the inner loss.
      lr: step size of the SGD with momentum 0.9 that trains it, of every method alike.
      inner_steps: training steps between two outer steps.
      budget: G of every method that tunes, and of plain training.
      reach: how far SGD moves the logit of a weight whose hypergradient stays at one over the
        number of images, in the whole run: its step size is this times that number, over the outer
        steps that a method can afford.
      longest: most that SGD moves a logit in one step: a crude hypergradient of an early step would
        else push weights to where the sigmoid is flat, for good.
      max_products: curvature products of one CG solve.
      penalty: first penalty of F2SA; that of PBGD.
      subspace: vectors of the carried Krylov subspace.
      eta: of BOME.
      score_every: outer steps between two looks at the validation loss, by which the best point of
        a run is chosen.
    """

    sets: tuple[str, ...] = ("mnist", "fashion_mnist", "cifar10")
    train: int = 5_000
    valid: int = 2_000
    flipped: float = 0.5
    pooled: bool = True
    decay: float = 1e-3
    lr: float = 0.1
    inner_steps: int = 10
    budget: int = 6_000
    reach: float = 800.0
    longest: float = 0.5
    max_products: int = 5
    penalty: float = 10.0
    subspace: int = 10
    eta: float = 0.5
    score_every: int = 10


def smoke() -> Config:
    """Seconds, on scikit-learn's digits, which need no download: does everything run?"""
    return Config(
        sets=("digits",), train=300, valid=200, pooled=False, budget=600, max_products=3,
        subspace=4, score_every=5,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for one core: a quarter of an hour for three seeds."""
    return Config()


def paper() -> Config:
    """The sizes of the published benchmarks, and human mistakes on CIFAR-10 (CIFAR-10N)."""
    return Config(
        sets=("mnist", "fashion_mnist", "cifar10"), train=20_000, valid=5_000, pooled=False,
        budget=40_000,
    )  # fmt: skip
