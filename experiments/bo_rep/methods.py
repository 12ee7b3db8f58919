"""The loops that `bo_rep` compares; their step sizes all fall by the same cosine."""

from typing import Any, NamedTuple

import optax

import bilevel
from experiments.bo_rep.config import Config
from experiments.bo_rep.problem import Task

PERIOD, INNER_STEPS, MOMENTUM, WARM_UP = 3, 3, 0.9, 100
"""Of BO-REP: the first three as in the paper's code."""
PRODUCTS, END = 5, 0.01
"""Steps of the adjoint, or of CG, in loops that make several; what step sizes fall to."""


class Method(NamedTuple):
    """A loop, the inner batches that a step reads, and its cost in inner gradients (G)."""

    algorithm: bilevel.Algorithm
    inner_batches: int
    cost: float


COSTS = {  # G of a step on average: gradients, and 2.5 for a product
    "bo_rep": INNER_STEPS / PERIOD + 2.5 + 1,
    "soba": 1 + 2.5 + 1,
    "amigo": INNER_STEPS + 2.5 * (PRODUCTS + 1) + 1,
    "alternate_cg": INNER_STEPS + 2.5 * (PRODUCTS + 2) + 1,
}
NAMES = tuple(COSTS)
WORDS = {
    "bo_rep": "BO-REP",
    "soba": "SOBA",
    "amigo": "AmIGO",
    "alternate_cg": "alternate with CG",
    "plain": "trained as a whole",
}


def build(
    name: str, config: Config, task: Task, inner_rate: float, outer_rate: float
) -> tuple[Method, int]:
    """The method with its two step sizes, and how many steps the budget pays for."""
    steps = int(config.budget // COSTS[name])

    def falling(rate: float) -> Any:
        return optax.cosine_decay_schedule(rate, steps, END)

    outer_tx, losses = optax.sgd(falling(outer_rate)), (task.outer, task.inner)
    if name == "bo_rep":
        training = optax.sgd(inner_rate)
        algorithm = bilevel.bo_rep(
            *losses, training, falling(outer_rate), INNER_STEPS, every=PERIOD, momentum=MOMENTUM,
            solve_rate=config.solve_rate, warm_up=min(WARM_UP, steps // 10),
        )  # fmt: skip
        return Method(algorithm, INNER_STEPS + 1, COSTS[name]), steps
    inner_tx, linear_tx = optax.sgd(inner_rate), optax.sgd(config.solve_rate)
    if name == "soba":
        algorithm = bilevel.soba(*losses, inner_tx, linear_tx, outer_tx)
        return Method(algorithm, 1, COSTS[name]), steps
    if name == "amigo":
        algorithm = bilevel.amigo(*losses, inner_tx, linear_tx, outer_tx, INNER_STEPS, PRODUCTS)
        return Method(algorithm, INNER_STEPS + PRODUCTS + 1, COSTS[name]), steps
    response = bilevel.Implicit(bilevel.CG(max_steps=PRODUCTS))
    algorithm = bilevel.alternate(*losses, response, inner_tx, outer_tx, INNER_STEPS)
    return Method(algorithm, INNER_STEPS, COSTS[name]), steps
