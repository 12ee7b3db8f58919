"""Settings of the `hypernet` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Curve:
    """One log decay of a linear model, trained on one image of each class.

    Attributes:
      data: "digits" or "mnist".
      valid: images to validate on.
      low, high: log decays over which curves are compared.
      grid: how many of them.
      hidden: units of the global hypernetwork.
      mean, std: of the log decays that the global one is trained on, clipped at ``high``.
      draws: log decays a training step.
      steps: of training, for the global and for the local one.
      rate: Adam's on the hypernetwork, falling to zero along a cosine.
      search_steps, search_rate: of Adam on the log decay, the global hypernetwork held.
      sigma: of the log decays around the current one that the local one is trained on.
      start: the first log decay.
      outer_rate: Adam's on the log decay of the local one, falling to zero along a cosine.
      outer_batch: validation images per step of the log decay; 0 for all of them.
    """

    data: str
    valid: int
    low: float = -2.0
    high: float = 4.0
    grid: int = 61
    hidden: int = 50
    mean: float = 1.0
    std: float = 2.0
    draws: int = 10
    steps: int = 20_000
    rate: float = 1e-3
    search_steps: int = 400
    search_rate: float = 0.05
    sigma: float = 0.05
    start: float = -2.0
    outer_rate: float = 0.02
    outer_batch: int = 0


DIGITS = Curve("digits", 800)
MNIST = Curve("mnist", 10_000, steps=10_000, outer_batch=500)


@dataclasses.dataclass(frozen=True)
class Decays:
    """A decay for every weight of a linear classifier, and searches of one shared decay.

    Attributes:
      data: "digits" or "mnist".
      train, valid: images; all other ones of the publisher's test part are for testing.
      low, high: bounds of the searches.
      start: the first log decay of the hypernetworks.
      batch: training images per step.
      outer_batch: validation images per step of the decays.
      bottleneck: units of the linear hypernetwork of as many inputs as weights.
      sigma: of the log decays around the current ones.
      draws: of them a training step.
      rate: Adam's on the hypernetworks and on plain training.
      outer_rate: Adam's on the log decays, falling to zero along a cosine.
      warm_up: part of the steps in which they stay where they are.
      trials: of a search; each gets an equal part of the budget.
      budget: inner-gradient evaluations of every method.
      points: measurements along a run.
    """

    data: str = "mnist"
    train: int = 1_000
    valid: int = 10_000
    low: float = -12.0
    high: float = 0.0
    start: float = -9.0
    batch: int = 100
    outer_batch: int = 500
    bottleneck: int = 10
    sigma: float = 0.5
    draws: int = 2
    rate: float = 0.001
    outer_rate: float = 0.01
    warm_up: float = 0.1
    trials: int = 20
    budget: int = 20_000
    points: int = 40


@dataclasses.dataclass(frozen=True)
class Config:
    """Both parts.

    Attributes:
      curves: set-ups of the first part.
      decays: of the second part.
    """

    curves: tuple[Curve, ...] = (DIGITS, MNIST)
    decays: Decays = Decays()


def smoke() -> Config:
    """Few steps on digits: does everything run?"""
    return Config(
        curves=(dataclasses.replace(DIGITS, steps=400, search_steps=50),),
        decays=Decays(
            "digits", train=300, valid=500, outer_batch=100, budget=900, trials=3, points=5
        ),
    )


def cpu() -> Config:
    """The experiment, sized for one core."""
    return Config()


def paper() -> Config:
    """The paper's numbers of steps and of training images: for a GPU."""
    slow = {"steps": 100_000, "rate": 1e-4}
    return Config(
        curves=(dataclasses.replace(DIGITS, **slow), dataclasses.replace(MNIST, **slow)),
        decays=Decays(train=10_000, budget=200_000),
    )
