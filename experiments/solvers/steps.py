"""What our loops and their hand-written twins have in common: step sizes and counts."""

from collections.abc import Callable
from typing import Any

import jax

from experiments.solvers.config import Config
from experiments.solvers.problem import Problem

ROOT = {"soba": 1 / 2, "fsla": 1 / 2, "mrbo": 1 / 3}  # steps fall as this power of their number


def size(method: str, rate: Any, t: Any) -> Any:
    """The step size of step t."""
    return rate / (1 + t) ** ROOT[method] if method in ROOT else rate


def outer_size(method: str, horizon: float, rate: Any, t: Any) -> Any:
    """That of the hyperparameters: with momentum it alone falls, as (1 + t / horizon)^(-1/2)."""
    if method == "saba_momentum":
        return rate / (1 + t / horizon) ** 0.5
    return size(method, rate, t)


def falling(method: str) -> Callable[[Any], Any] | None:
    """What all step sizes are multiplied with in step t; None where they are constant."""
    return (lambda t: size(method, 1.0, t)) if method in ROOT else None


def momentum(method: str) -> Callable[[Any], Any]:
    """The rate of STORM: as the square of the falling step size, 1 at first."""
    return lambda t: 1.0 / (1 + t) ** (2 * ROOT[method])


def sizes(problem: Problem) -> tuple[int, int]:
    """How many batches the training and the validation data have."""
    leaves = jax.tree.leaves(problem.train)[0], jax.tree.leaves(problem.valid)[0]
    return leaves[0].shape[0], leaves[1].shape[0]


def period(config: Config, problem: Problem) -> int:
    """Steps between two full ones of `srba`; `spaba` has as many on average."""
    return max(1, round(config.passes * sizes(problem)[0]))
