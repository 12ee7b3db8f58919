"""Settings of the `solvers` experiment and its presets."""

import dataclasses

METHODS = (
    "soba", "saba", "fsla", "srba", "spaba", "mrbo", "stocbio", "amigo", "f2sa", "pbgd", "bome",
    "saba_momentum",
)  # fmt: skip

# (step size of parameters and adjoint, that of the hyperparameters), found by `tune.py` on seed
# 100; they diverge on none of seeds 100 to 109. Where a method's steps decrease, the first one.
RATES: dict[str, dict[str, tuple[float, float]]] = {
    "quadratic": {
        "soba": (0.1, 0.1), "saba": (0.1, 0.01), "fsla": (0.1, 0.1), "srba": (0.3, 0.1),
        "spaba": (0.1, 1.0), "mrbo": (1.0, 0.1), "stocbio": (1.0, 0.01), "amigo": (0.3, 0.01),
        "f2sa": (0.1, 0.01), "pbgd": (0.01, 0.001), "bome": (1.0, 0.001),
        "saba_momentum": (0.01, 1.0),
    },
    "ijcnn1": {
        "soba": (0.3, 100.0), "saba": (0.3, 1.0), "fsla": (3.0, 10.0), "srba": (3.0, 1.0),
        "spaba": (1.0, 1.0), "mrbo": (0.03, 1e4), "stocbio": (0.03, 1e4), "amigo": (1.0, 10.0),
        "f2sa": (1.0, 10.0), "pbgd": (1.0, 10.0), "bome": (3.0, 100.0),
        "saba_momentum": (0.3, 1.0),
    },
    "covtype": {
        "soba": (0.03, 1e4), "saba": (0.03, 100.0), "fsla": (0.03, 1e4), "srba": (0.01, 1e3),
        "spaba": (0.01, 1e3), "mrbo": (0.01, 1e4), "stocbio": (0.03, 100.0), "amigo": (0.03, 1e3),
        "f2sa": (0.003, 1e4), "pbgd": (0.003, 1e3), "bome": (0.09, 10.0),
        "saba_momentum": (0.003, 1e3),
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      problems: of `quadratic`, `ijcnn1` and `covtype`.
      methods: of `METHODS`.
      batch: examples of a batch, of either loss.
      budget: oracle calls of a run, in inner gradients of one batch, for each problem.
      points: records of a run, evenly spaced in the logarithm of its steps.
      products: Hessian-vector products of the series of `mrbo` and `stocbio`, and steps of the
        adjoint of `amigo`.
      inner_steps: training steps of `stocbio`, `amigo`, `bome` and (of both its copies) `f2sa`.
      decay: of the momentum of the parameters and of the adjoint, in `saba_momentum`.
      horizon: steps after which the steps of its hyperparameters begin to fall, as their inverse
        root.
      penalty: that of `pbgd`, and the first of `f2sa`, which grows as the seventh root of the step.
      passes: a full step of `srba` comes every so many passes over the training data.
      timed: seconds of a timing; 0 times nothing.
      rounds: timings of each implementation, in turns.
    """

    problems: tuple[str, ...] = ("quadratic", "ijcnn1", "covtype")
    methods: tuple[str, ...] = METHODS
    batch: int = 64
    budget: tuple[float, ...] = (200_000.0, 300_000.0, 20_000.0)
    points: int = 10
    products: int = 10
    inner_steps: int = 10
    decay: float = 0.9
    horizon: float = 1000.0
    penalty: float = 10.0
    passes: float = 0.5
    timed: float = 0.02
    rounds: int = 41


def smoke() -> Config:
    """A short run on the problem that needs no file: does everything run?"""
    return Config(problems=("quadratic",), budget=(6_000.0,), points=3, timed=0.001, rounds=2)


def cpu() -> Config:
    """The experiment: minutes a seed."""
    return Config()


def paper() -> Config:
    """Ten times the budget, as the curves of the papers."""
    return Config(budget=(2_000_000.0, 3_000_000.0, 600_000.0), points=24)
