"""Settings of the `distill` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      sets: data sets.
      per_class: numbers of learned images per class.
      decay: of the linear model that is trained on the learned images.
      newton_steps: Newton steps that bring it back to its minimum after the images moved.
      products: curvature products of one linear solve, of Newton and of the hypergradient.
      outer_batch: training images of one outer gradient; the training set is cut into such
        batches, shuffled anew in every pass.
      outer_lr: first step size of the Adam that moves the pixels; it falls to zero like a cosine.
      outer_steps: hypergradients.
      noise: standard deviation of the pixels the images start from.
      retrain_lr, retrain_steps: the Adam that trains a fresh model on given images.
      baseline_decays: decays of which the baselines on real images may take the best.
      points: measurements along a run.
    """

    sets: tuple[str, ...] = ("mnist", "fashion_mnist")
    per_class: tuple[int, ...] = (1, 5)
    decay: float = 1e-2
    newton_steps: int = 3
    products: int = 30
    outer_batch: int = 6_000
    outer_lr: float = 0.05
    outer_steps: int = 300
    noise: float = 0.02
    retrain_lr: float = 0.01
    retrain_steps: int = 2_000
    baseline_decays: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    points: int = 10


def smoke() -> Config:
    """Seconds, on scikit-learn's digits, which need no download: does everything run?"""
    return Config(
        sets=("digits",),
        per_class=(1,),
        outer_batch=400,
        outer_steps=40,
        retrain_steps=200,
        points=4,
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """The whole training set in every outer gradient, and more of them."""
    return Config(outer_batch=60_000, outer_steps=1_000, per_class=(1, 2, 5, 10))
