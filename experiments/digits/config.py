"""Settings of the `digits` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      train, valid: examples of the two parts; the other digits are the test part.
      held: of the validation examples, those that tell the stopped method where to stop; it tunes
        on the others.
      hidden: units of the hidden layer.
      inner_lr: step size of the Adam that trains the network, for every method.
      inner_steps: full-batch training steps between two hypergradients.
      outer_lr: step size of the Adam that moves the log decays.
      budget: G that every method may spend, training and hypergradients together.
      start: log decay at the start of tuning, and of the network that is not tuned.
      low, high: range of log decays, searched uniformly by the black-box methods.
      trial_steps: training steps of one black-box trial.
      trial_points: measurements along it, of which the best in validation is the trial's result.
      products: curvature products of one hypergradient, for CG and for Neumann.
      damping: of the curvature matrix.
      checkpoint_every: outer steps between two checkpoints.
    """

    train: int = 300
    valid: int = 300
    held: int = 100
    hidden: int = 64
    inner_lr: float = 0.01
    inner_steps: int = 50
    outer_lr: float = 0.05
    budget: float = 10_000.0
    start: float = -5.0
    low: float = -12.0
    high: float = 0.0
    trial_steps: int = 500
    trial_points: int = 10
    products: int = 10
    damping: float = 1e-3
    checkpoint_every: int = 20


def smoke() -> Config:
    """Seconds, on a fraction of the budget: does everything run?"""
    return Config(budget=1_000.0, hidden=16, trial_steps=100, inner_steps=20, checkpoint_every=5)


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """A wider network and five times the budget."""
    return Config(hidden=256, budget=50_000.0)
