"""Settings of the `many_network` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      sets: names, how many images are fitted and tuned on, and how many draws are made of them.
        The images of Fashion-MNIST are halved in height and width.
      test: at most so many other images test: of Fashion-MNIST the publisher's.
      hidden: units of the hidden layer.
      steps, inner_rate: of the Adam that trains a network from scratch, full-batch. All step
        sizes fall to zero like a cosine.
      splits: parts of the images; in each split one of them chooses the strength.
      folds: of the cross-validation that is tuned, on the images of the other parts.
      grid, points: ends and number of the log decays that are searched.
      repeats, beside, points_beside: of the second search for one decay, at the cost of all tuning:
        by other folds and networks so many times, on so many points within a distance of the first.
      spreads: of the log decays under the prior, standard deviations s; the strength is
        1 / (n s^2) for n images, in nats. Beside them, 0: one shared decay.
      levels: added to all log decays that were tuned; the best is searched, beside networks that
        are trained from scratch.
      errors: how many standard errors better than sharing a strength must be.
      rounds, rate: of the Adam that moves log decays.
      inner_steps, tuning_rate: training steps between two hypergradients, and their first size:
        the networks are trained already.
      products: steps of CG in a hypergradient.
      damping: added to the Gauss-Newton matrix.
      fresh: networks that are trained anew, to judge what was found.
    """

    sets: tuple[tuple[str, int, int], ...] = (("digits", 300, 10), ("fashion_mnist", 1000, 5))
    test: int = 10_000
    hidden: int = 32
    steps: int = 300
    inner_rate: float = 0.01
    splits: int = 4
    folds: int = 3
    grid: tuple[float, float] = (-10.0, -2.0)
    points: int = 9
    repeats: int = 3
    beside: float = 1.0
    points_beside: int = 8
    spreads: tuple[float, ...] = (1.0, 4.0)
    levels: tuple[float, ...] = (0.0, 0.7, 1.4)
    errors: float = 1.0
    rounds: int = 40
    rate: float = 0.2
    inner_steps: int = 10
    tuning_rate: float = 0.003
    products: int = 4
    damping: float = 1e-3
    fresh: int = 3


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        sets=(("digits", 50, 1),),
        test=100,
        hidden=4,
        steps=20,
        points=3,
        repeats=1,
        points_beside=2,
        folds=2,
        spreads=(4.0,),
        rounds=3,
        inner_steps=2,
        products=2,
        fresh=2,
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """More images, a wider network and ten draws of each set."""
    return Config(
        sets=(("digits", 600, 10), ("fashion_mnist", 2000, 10)), hidden=64, steps=1000, rounds=200
    )
