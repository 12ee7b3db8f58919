"""Settings of the `hoag` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      single: sets with two classes, one penalty for all weights: every method, but no random
        search and TPE on the newsgroups, where they take longest.
      every: sets with ten classes, one penalty for every weight: gradient methods.
      few_seeds: `every`, and the schedules that are not judged, are run on the first so many.
      budget: G that every method may spend on a problem with one penalty.
      cold_steps: for each set of `every`, outer steps of the cold solves, whose loss and cost are
        the goal and the budget of the others.
      steps: most outer steps: by then a tolerance that halves is that of exact solves.
      start: log penalty at the start.
      low, high: range of the log penalty for the searches, and of the grid.
      points: of the grid, coarse to fine: halves, then quarters, and so on.
      solved: relative tolerance of an inner solve of the searches.
      cold: relative tolerance of the solves that are to be beaten, and of the exact ones.
      exact: that of the exact ones.
      first_tol: first tolerance of the schedules, with one penalty.
      fall: what the exponential schedule multiplies it with in every step.
      rough: the same, with a penalty for every weight.
      linear_factor: how much looser their linear systems are solved.
      shrink: of the Lipschitz estimate after a good step, in all gradient methods.
      near, close: a validation loss this part above the best is near it, or close to it.
      mnist: examples of MNIST that train, and that validate.
    """

    single: tuple[str, ...] = ("a9a", "ijcnn1", "newsgroups")
    every: tuple[str, ...] = ("digits", "mnist")
    few_seeds: int = 2
    budget: float = 2_000.0
    cold_steps: tuple[int, ...] = (3, 2)
    steps: int = 10
    start: float = 0.0
    low: float = -6.0
    high: float = 6.0
    points: int = 31
    solved: float = 1e-4
    cold: float = 1e-5
    exact: float = 1e-12
    first_tol: float = 1e-3
    fall: float = 0.5
    rough: float = 3e-3
    linear_factor: float = 100.0
    shrink: float = 0.5
    near: float = 1e-3
    close: float = 1e-4
    mnist: int = 2_000


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(
        single=("a1a",), every=("digits",), budget=400.0, cold_steps=(1,), steps=6, points=3
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Five times the budget, and all of MNIST."""
    return Config(budget=10_000.0, steps=100, points=127, mnist=30_000)
