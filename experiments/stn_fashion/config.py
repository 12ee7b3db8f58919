"""Settings of the `stn_fashion` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      data: "fashion_mnist", or "digits" (scikit-learn's, enlarged), which needs no file.
      train, valid, test: examples of the three parts.
      channels: of the convolutions 3x3; the first has stride 2.
      pooled: after which of them the largest of 2x2 pixels is taken.
      dense: units of the hidden dense layers.
      as_products: convolutions as products with neighbourhoods, which a scan on CPU runs faster.
      batch, valid_batch: examples of a batch to train on, and of one to move hyperparameters.
      occluder: side in pixels of the square that hides a part of every validation and test image.
      lr: of Adam on the weights, the same for every method; falls to zero.
      response_lr: of SGD with momentum on the response; falls to zero. The smaller, the less a
        response is moved by noise, and the later it is learnt.
      outer_lr: of SGD on the unconstrained hyperparameters and on the scales; falls to zero.
      stn_outer_lr: the same for STN, found best for it.
      starts: rates of all dropout from which STN and Delta-STN are compared; none: they are not.
      scale: first width of the perturbations, in logits.
      entropy: reward for wide perturbations.
      small_scale: the width at which nothing can be learnt.
      warm_up: part of the cycles that only train.
      max_holes, max_length: largest number and side of the holes of cutout.
      budget: G of a whole run of a method.
      trials: settings that random search may try in that budget.
      stops: points of a trial at which it is measured, the best of which counts.
      points: records along a run.
    """

    data: str = "fashion_mnist"
    train: int = 1_000
    valid: int = 2_000
    test: int = 2_000
    channels: tuple[int, ...] = (8, 12, 16, 16, 16)
    pooled: tuple[int, ...] = (0, 1)
    dense: tuple[int, ...] = (64, 64)
    as_products: bool = True
    batch: int = 64
    valid_batch: int = 256
    occluder: int = 12
    lr: float = 2e-3
    response_lr: float = 2.5e-3
    outer_lr: float = 5.0
    stn_outer_lr: float = 2.5
    starts: tuple[float, ...] = (0.05, 0.2, 0.4)
    scale: float = 1.0
    entropy: float = 1e-4
    small_scale: float = 0.01
    warm_up: float = 0.05
    max_holes: int = 4
    max_length: int = 16
    budget: int = 6_000
    trials: int = 6
    stops: int = 6
    points: int = 20


def smoke() -> Config:
    """Few cycles on digits: does everything run but the comparison, which compiles two programs?"""
    return Config(
        data="digits",
        train=400,
        valid=400,
        test=400,
        channels=(4, 4),
        dense=(16,),
        batch=16,
        valid_batch=32,
        budget=340,
        trials=2,
        stops=2,
        points=4,
        starts=(),
    )


def cpu() -> Config:
    """A small network and a few thousand images."""
    return Config()


def paper() -> Config:
    """The networks of the STN paper on all images; for a GPU."""
    return Config(
        train=48_000,
        valid=12_000,
        test=10_000,
        channels=(64, 192, 384, 256, 256),
        dense=(4096, 4096),
        batch=128,
        valid_batch=512,
        lr=3e-4,
        outer_lr=0.5,
        stn_outer_lr=0.25,
        budget=510_000,
        trials=12,
        stops=20,
        points=100,
    )
