"""What `digits` compares, and what each costs."""

import bilevel
from experiments.common import budget
from experiments.digits.config import Config

BLACK_BOX = ("random_search", "tpe")
GRADIENT = (
    "cg_per_tensor",
    "neumann_per_tensor",
    "cg_per_weight",
    "neumann_per_weight",
    "cg_per_weight_stopped",
)


def response(method: str, config: Config, operator: bilevel.GaussNewton) -> bilevel.Implicit:
    """CG on Gauss–Newton, or the Neumann series on the damped Hessian."""
    if method.startswith("cg"):
        return bilevel.Implicit(bilevel.CG(max_steps=config.products), operator)
    return bilevel.Implicit(
        bilevel.Neumann(num_matvecs=config.products), bilevel.Hessian(config.damping)
    )


def held(method: str, config: Config) -> int:
    """Validation examples that tell a method where to stop, and that it does not tune on."""
    return config.held if method.endswith("stopped") else 0


def step_cost(method: str, config: Config) -> float:
    """G of one outer step: the training steps and the hypergradient."""
    outer = budget.weight(config.valid - held(method, config), config.train)
    hypergradient = budget.implicit_hypergradient(config.products, outer)
    return budget.training(config.inner_steps).plus(hypergradient).total


def outer_steps(method: str, config: Config) -> int:
    """As many outer steps as the budget pays for."""
    return int(config.budget // step_cost(method, config))
