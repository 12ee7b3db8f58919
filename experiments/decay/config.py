"""Settings of the `decay` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      data: the set; its images are halved in height and width (those of the digits are not).
      train, valid: images of these parts.
      test: images of the publisher's test part.
      guard: images held back from the validation part by the methods that stop early.
      hidden: units of the hidden layer.
      inner_lr: first step size of the Adam that trains the network, for every method.
      trial_steps: full-batch training steps from scratch, of a black-box trial, of the training
        before tuning by hypergradients, and of that which judges what was found.
      inner_steps: training steps between two hypergradients.
      outer_lr: first step size of the Adam that moves the log decays. All step sizes fall to zero
        like a cosine.
      budget: G that every method may spend, the training of what it returns included.
      start: log decay of every weight before tuning, and of the network that is not tuned.
      low, high: range of log decays that grid, random search and TPE look at.
      products: steps of CG in one hypergradient, from a warm start (one product more).
      damping: added to the Gauss-Newton matrix.
      points: measurements along a tuning run.
    """

    data: str = "fashion_mnist"
    train: int = 500
    valid: int = 500
    test: int = 10_000
    guard: int = 150
    hidden: int = 64
    inner_lr: float = 0.01
    trial_steps: int = 500
    inner_steps: int = 20
    outer_lr: float = 0.1
    budget: float = 10_000.0
    start: float = -7.0
    low: float = -12.0
    high: float = 0.0
    products: int = 5
    damping: float = 1e-3
    points: int = 40


def smoke() -> Config:
    """Seconds, on scikit-learn's digits, which need no download: does it all run?"""
    return Config(
        data="digits", train=200, valid=200, test=500, guard=60, hidden=16, trial_steps=100,
        budget=1_000.0, points=5,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Ten times the images, a wider network and five times the budget."""
    return Config(train=5_000, valid=5_000, guard=1_500, hidden=256, budget=50_000.0)
