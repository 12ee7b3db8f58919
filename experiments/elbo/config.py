"""Settings of the `elbo` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      tasks: image set and arm. A network learns classes 0 to 4 of the set, and is transferred to
        5 to 9: `head` trains a linear head on frozen features, `whole` all weights from the
        pre-trained ones.
      examples: N, of all five classes.
      test: most test examples.
      hidden: units of the two hidden layers.
      pretrain, source_steps, source_batch: examples and Adam steps of pre-training.
      steps: Adam steps of every run on the N examples, all of them in each.
      rate_head, rate_whole: first learning rate of each arm; it falls as a cosine.
      decays: grid of the search, prior precisions per example (the decay of the mean loss).
      folds: of the search on the head; `whole` holds out one fifth, once.
      samples: of the weights in each step of the variational runs.
      scale, scale_rate: first standard deviation of these weights, and the rate of its logarithm.
      draws: of the weights that a variational prediction averages.
      kappa_head: emphasis of the data on the head; None takes D / N, as for all weights.
      head_std: standard deviation of the first weights of the head.
    """

    tasks: tuple[tuple[str, str], ...] = (
        ("mnist", "head"),
        ("mnist", "whole"),
        ("fashion_mnist", "head"),
    )
    examples: int = 50
    test: int = 4_000
    hidden: tuple[int, int] = (64, 32)
    pretrain: int = 4_000
    source_steps: int = 400
    source_batch: int = 100
    steps: int = 200
    rate_head: float = 0.03
    rate_whole: float = 0.001
    decays: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    folds: int = 5
    samples: int = 1
    scale: float = 0.05
    scale_rate: float = 0.03
    draws: int = 30
    kappa_head: float | None = 30.0
    head_std: float = 0.1


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        tasks=(("digits", "head"), ("digits", "whole")), test=300, hidden=(16, 8), pretrain=300,
        source_steps=100, steps=60, decays=(1e-3, 1e-1),
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """A wider network, longer runs."""
    return Config(hidden=(512, 256), pretrain=25_000, source_steps=5_000, steps=6_000)
