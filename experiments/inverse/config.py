"""Settings of the `inverse` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment; all of it runs in float64.

    Attributes:
      regressions: data sets of the linear case; `diabetes` comes with scikit-learn.
      decay_mean, decay_std: of the normal law of the log decays of the linear case.
      conditioned: data sets that are measured once more, with all log decays shifted by one number.
      condition: so that the Hessian has this condition number.
      nystrom_damping: what is added to the curvature for Nystrom, as a fraction of its largest;
        outside its sketch the method divides by that alone.
      train, valid: digits to train and to validate the network.
      hidden: tanh units of its hidden layer.
      log_decay: log decay of every weight of the network.
      damping: added to the curvature of the network, Hessian and Gauss-Newton.
      iterations: most L-BFGS iterations that train the network.
      budgets: curvature products given to each method.
      long_series: further lengths at which the Neumann series of the linear case is checked.
      divergent: products of the series whose step size is too long on purpose.
    """

    regressions: tuple[str, ...] = ("diabetes", "concrete")
    decay_mean: float = -3.0
    decay_std: float = 1.0
    conditioned: tuple[str, ...] = ("diabetes",)
    condition: float = 100.0
    nystrom_damping: float = 1e-2
    train: int = 600
    valid: int = 600
    hidden: int = 16
    log_decay: float = -6.0
    damping: float = 1e-3
    iterations: int = 5_000
    budgets: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 30, 50)
    long_series: tuple[int, ...] = (100, 500)
    divergent: int = 200


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        regressions=("diabetes",),
        hidden=4,
        train=200,
        valid=200,
        budgets=(0, 5, 20),
        long_series=(),
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """Boston housing as in the paper, every number of products up to 50, a wider network."""
    return Config(
        regressions=("diabetes", "concrete", "bostonHousing"),
        hidden=48,
        budgets=tuple(range(51)),
    )
