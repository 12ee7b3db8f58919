"""Settings of the `sure` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      source: "published" for BSD and Kodak images, "bundled" for the photos of scikit-learn.
      models: the denoisers, of one, two and 48 hyperparameters.
      sigma: standard deviation of the noise, of gray values in [0, 1].
      crop: side of the square crops.
      train, test: how many crops to tune on and to judge on; they come from different images.
      steps: outer steps.
      rate: of Adam, on logarithms.
      tolerance: of the inner solves, in units of the norm of the noise.
      products: most products of each linear solve.
      probes: random vectors for the trace.
    """

    source: str = "published"
    models: tuple[str, ...] = ("quadratic", "tv", "filters")
    sigma: float = 0.1
    crop: int = 48
    train: int = 8
    test: int = 8
    steps: int = 60
    rate: float = 0.1
    tolerance: float = 1e-4
    products: int = 60
    probes: int = 1


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(source="bundled", models=("quadratic", "tv"), crop=24, train=2, test=2, steps=6)


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Larger crops, of more images."""
    return Config(crop=160, train=32, test=24, steps=200)
