"""Settings of the `augment` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      sets: data sets.
      train, valid: images of the two parts; the test part is the publisher's.
      noisy_train: images of the training part with wrong labels, which holds that of
        the clean one.
      halved: whether images are taken at half their resolution.
      network: classifier, "small" or "resnet18".
      widths: channels of the convolutions of the small one; the first of the ResNet.
      hidden: units of the dense layer of the small one.
      batch: images of a training batch.
      share: of a training batch that is augmented, learned or by hand; the rest is left as it is.
      outer_batch: validation images of one outer gradient.
      lr: first step size of the Adam (SGD with momentum for "resnet18") that trains the
        classifier, of every method alike; it falls to zero like a cosine.
      decay: of the classifier's weights, a part of the inner loss.
      steps: training steps of every method.
      noisy_steps: training steps with wrong labels.
      every: training steps between two hypergradients.
      products: curvature products of one hypergradient.
      damping: of the Gauss-Newton matrix.
      outer_lr: first step size of the Adam that moves the U-Net; it falls like a cosine too.
      weigh_lr: the same for the network that weighs examples.
      width: channels of the U-Net at full resolution.
      noise: normal numbers it draws for an image.
      reach: largest displacement of a pixel, in pixels.
      strength: largest additive change of a pixel.
      start: standard deviation of the weights of its last layer at the start.
      reweighter: hidden units of the network that weighs examples.
      flipped: fraction of labels replaced at random where there are no human mistakes.
      shift, hole: hand-made augmentation: largest shift in pixels, side of the cut-out square.
      mirrored: sets whose images the hand-made augmentation may mirror.
      points: measurements along a run, the best of which in validation counts.
    """

    sets: tuple[str, ...] = ("fashion_mnist", "cifar10")
    train: int = 1_000
    valid: int = 1_000
    noisy_train: int = 5_000
    halved: bool = True
    network: str = "small"
    widths: tuple[int, ...] = (16, 32)
    hidden: int = 64
    batch: int = 50
    share: float = 0.5
    outer_batch: int = 200
    lr: float = 2e-3
    decay: float = 0.0
    steps: int = 3_000
    noisy_steps: int = 1_000
    every: int = 10
    products: int = 3
    damping: float = 1.0
    outer_lr: float = 1e-2
    weigh_lr: float = 3e-2
    width: int = 6
    noise: int = 4
    reach: float = 3.0
    strength: float = 0.2
    start: float = 0.1
    reweighter: int = 16
    flipped: float = 0.4
    shift: int = 1
    hole: int = 4
    mirrored: tuple[str, ...] = ("cifar10",)
    points: int = 12


def smoke() -> Config:
    """Seconds, on scikit-learn's digits, which need no download: does everything run?"""
    return Config(
        sets=("digits",),
        train=100,
        valid=200,
        noisy_train=400,
        halved=False,
        widths=(8,),
        hidden=32,
        batch=25,
        outer_batch=100,
        steps=60,
        noisy_steps=60,
        every=5,
        products=3,
        width=4,
        reach=1.0,
        shift=1,
        hole=2,
        points=3,
    )


def cpu() -> Config:
    """The experiment, sized for one core: small training sets, where augmentation matters."""
    return Config()


def paper() -> Config:
    """All images and a ResNet-18, for a GPU: 200 passes, the paper's split and batch size."""
    return Config(
        train=45_000,
        valid=5_000,
        noisy_train=45_000,
        halved=False,
        network="resnet18",
        widths=(64,),
        batch=128,
        share=1.0,
        outer_batch=512,
        lr=0.1,
        decay=5e-4,
        steps=70_200,
        noisy_steps=70_200,
        every=9,
        products=3,
        outer_lr=1e-3,
        width=8,
        reach=4.0,
        shift=4,
        hole=8,
        points=40,
    )
