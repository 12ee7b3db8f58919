"""Settings of the `sparse` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment; they were chosen on seeds 100 and above, by validation.

    Penalties are searched on a logarithmic scale between ``low`` and ``high`` times the smallest
    one at which every weight is zero: scikit-learn's default range.

    Attributes:
      tasks: which problems; see `tasks.py`.
      rows: training rows of the housing task (cross-validation), and training and validation rows
        each of the images.
      images: the set of the task `classes`, "digits" or "fashion_mnist".
      folds: of the cross-validation.
      low, high: range of penalties, relative.
      start: penalty from which hypergradients start, relative.
      start_l2: the ridge of an elastic net from which they start, relative.
      outer_steps: hypergradients with one penalty (two of an elastic net), at most; two at least.
      first_step: first move of a log penalty. Moves grow by ``grow`` while their sign stays, halve
        where it turns (Rprop).
      grow: see there.
      least_step: where no move is longer than this, the search ends.
      tolerance: of every solve of grid and searches, relative to the smallest penalty
        at which every weight is zero; of hypergradients, the last one.
      loose: they start at this tolerance and tighten in proportion to the moves.
      products: steps of CG in a hypergradient, at most.
      rtol: the residual at which CG stops, relative.
      points: of the grid.
      trials: of random search and of TPE.
      startup: random trials before TPE begins to model.
      many_steps, many_step: hypergradients, at most, and the first move of each log penalty, where
        after one penalty many are tuned.
      max_steps: proximal steps of one solve, at most.
      judge_tolerance: of the solves that judge what was found, which nobody pays for.
    """

    tasks: tuple[str, ...] = ("lasso", "elastic_net", "logistic", "classes", "weighted")
    rows: int = 500
    images: str = "fashion_mnist"
    folds: int = 5
    low: float = 1e-3
    high: float = 0.9
    start: float = 0.1
    start_l2: float = 0.01
    outer_steps: int = 20
    first_step: float = 1.0
    grow: float = 1.2
    least_step: float = 0.05
    tolerance: float = 2e-3
    loose: float = 5e-3
    products: int = 20
    rtol: float = 0.1
    points: int = 100
    trials: int = 40
    startup: int = 5
    many_steps: int = 20
    many_step: float = 0.3
    max_steps: int = 20_000
    judge_tolerance: float = 2e-4


def smoke() -> Config:
    """Seconds, on sets that come with scikit-learn: does it all run?"""
    return Config(
        tasks=("elastic_net", "classes"), images="digits", rows=200,
        outer_steps=6, many_steps=6, points=16, trials=8,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """More rows, and a wider range of penalties: four decades."""
    return Config(rows=5_000, low=1e-4, max_steps=50_000)
