"""The loops that `bo_rep` compares, all with the same inner optimizer and the same decay."""

from typing import Any, NamedTuple

import optax

import bilevel
from experiments.bo_rep.problem import Task


class Method(NamedTuple):
    """A loop, and how many inner batches one of its steps reads."""

    algorithm: bilevel.Algorithm
    inner_batches: int


PERIOD, INNER_STEPS = 3, 3  # as in the paper's code
PRODUCTS = 5
NAMES = ("bo_rep", "soba", "amigo", "alternate_cg")
WORDS = {
    "bo_rep": "BO-REP",
    "soba": "SOBA",
    "amigo": "AmIGO",
    "alternate_cg": "alternate, CG",
    "plain": "no outer problem",
}


def build(name: str, task: Task, inner_rate: float, outer_rate: float, steps: int, decay: float):
    """The method with its two step sizes, which fall like a cosine over ``steps`` steps."""

    def schedule(rate: float) -> Any:
        return optax.cosine_decay_schedule(rate, steps, decay)

    if name == "alternate_cg":
        algorithm = bilevel.alternate(
            task.outer,
            task.inner,
            bilevel.Implicit(bilevel.CG(max_steps=PRODUCTS)),
            inner_tx=optax.sgd(inner_rate),
            outer_tx=optax.sgd(schedule(outer_rate)),
            inner_steps=INNER_STEPS,
        )
        return Method(algorithm, INNER_STEPS)
    raise ValueError(name)
