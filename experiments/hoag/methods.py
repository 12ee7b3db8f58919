"""What `hoag` compares."""

import functools
from typing import Any

import jax
import numpy as np

import bilevel
from experiments.hoag import problem
from experiments.hoag.config import Config

SCHEDULES = ("exponential", "quadratic", "cubic", "exact")
SEARCHES = ("grid", "random", "tpe")
FOLLOWED = SCHEDULES[:3]
ACCURACIES = ("cold", "adaptive", "preconditioned", "single")


def tasks(config: Config) -> list[tuple[str, str]]:
    """Every problem with every method that is run on it."""
    one = [
        (task, method)
        for task in config.single
        for method in (*SCHEDULES, *SEARCHES)
        if task in ("a1a", "a9a") or method not in ("quadratic", "cubic")
    ]
    return one + [(task, method) for task in config.every for method in ACCURACIES]


@functools.cache
def algorithm(method: str, config: Config) -> Any:
    """The loop of a method and its jitted step."""
    settings: dict[str, Any] = {"shrink": config.shrink}
    tol: Any = {"exact": config.exact, "cold": config.cold}.get(method, "exponential")
    if isinstance(tol, str):
        first = config.rough if method in ACCURACIES else config.first_tol
        settings |= {"first_tol": first, "linear_factor": config.linear_factor}
    if method in SCHEDULES[:3]:
        tol = method
    if method == "preconditioned":
        settings |= {
            "solver": bilevel.CG(1000, preconditioner=bilevel.Diagonal()),
            "operator": problem.curvature(),
        }
    loop = bilevel.hoag(problem.outer, problem.inner, tol, **settings)
    return loop, jax.jit(loop.step)


def grid(config: Config) -> np.ndarray:
    """The middle of the range, then of its halves, and so on: any first part covers it."""
    points: list[float] = []
    parts = 1
    while len(points) < config.points:
        middles = (np.arange(parts) + 0.5) / parts
        points += list(config.low + (config.high - config.low) * middles)
        parts *= 2
    return np.asarray(points[: config.points])
