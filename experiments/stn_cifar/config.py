"""Settings of the `stn_cifar` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      data: "cifar10" (JPEG), or "digits" (scikit-learn's, enlarged), which needs no file.
      train, valid, test: examples of the three parts.
      channels: of the convolutions 3x3; the first has stride 2.
      pooled: after which of them the largest of 2x2 pixels is taken.
      dense: units of the hidden dense layers.
      as_products: convolutions as products with neighbourhoods, which a scan on CPU runs faster.
      batch: examples of a batch, training and validation.
      optimizer: of the weights, "adam" or "momentum" (0.9), the same for every method.
      lr: its step size; falls to zero.
      response_lr, response_eps: of the same optimizer on the response; falls to zero. A larger
        eps keeps Adam from following gradients that are nothing but noise.
      outer_lr, outer_eps: of Adam on the unconstrained hyperparameters and the scales.
      scale: first width of the perturbations, in logits.
      entropy: reward for wide perturbations.
      warm_up: part of the cycles that only train.
      inner_steps: training steps per cycle.
      max_holes, max_length: largest number and side of the holes of cutout.
      budget: G of a whole run of a method.
      trials: settings that random search may try in that budget.
      stops: points of a trial at which it is measured, the best of which counts.
      points: records along a run.
    """

    data: str = "cifar10"
    train: int = 3_000
    valid: int = 2_000
    test: int = 5_000
    channels: tuple[int, ...] = (16, 32, 32)
    pooled: tuple[int, ...] = (0, 1)
    dense: tuple[int, ...] = (64,)
    as_products: bool = True
    batch: int = 64
    optimizer: str = "adam"
    lr: float = 2e-3
    response_lr: float = 5e-3
    response_eps: float = 1e-3
    outer_lr: float = 0.03
    outer_eps: float = 1e-2
    scale: float = 1.0
    entropy: float = 1e-4
    warm_up: float = 0.05
    inner_steps: int = 5
    max_holes: int = 3
    max_length: int = 23
    budget: int = 8_500
    trials: int = 6
    stops: int = 6
    points: int = 20


def smoke() -> Config:
    """Few cycles on digits: does everything run?"""
    return Config(
        data="digits",
        train=400,
        valid=400,
        test=400,
        channels=(4, 4),
        dense=(16,),
        batch=16,
        budget=340,
        trials=2,
        stops=2,
        points=4,
    )


def cpu() -> Config:
    """A small network and a few thousand images, for one core."""
    return Config()


def paper() -> Config:
    """The network, split, optimizers and steps of the STN paper, for a GPU."""
    return Config(
        train=40_000,
        valid=10_000,
        test=10_000,
        channels=(64, 192, 384, 256, 256),
        pooled=(0, 1, 4),
        dense=(4096, 4096),
        as_products=False,
        batch=128,
        optimizer="momentum",
        lr=0.01,
        response_lr=0.01,
        outer_lr=3e-3,
        outer_eps=1e-8,
        scale=0.5,
        entropy=1e-3,
        inner_steps=2,
        budget=500_000,
        trials=12,
        stops=20,
        points=100,
    )
