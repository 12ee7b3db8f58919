"""What `hoag` compares."""

import functools
from typing import Any

import jax
import numpy as np

import bilevel
from experiments.common.protocol import FIRST_TUNING
from experiments.hoag import problem
from experiments.hoag.config import Config

SCHEDULES = ("exponential", "quadratic", "cubic", "exact")
SEARCHES = ("grid", "random", "tpe")
FOLLOWED = SCHEDULES[:3]
ACCURACIES = ("cold", "adaptive", "preconditioned", "single")


def tasks(config: Config, seed: int) -> list[tuple[str, str]]:
    """Every problem with every method that is run on it."""
    few = seed < config.few_seeds or seed >= FIRST_TUNING

    def run(task: str, method: str) -> bool:
        if method in ("quadratic", "cubic"):
            return few and task in ("a1a", "a9a")
        return task != "newsgroups" or method not in ("random", "tpe")

    one = [(task, m) for task in config.single for m in (*SCHEDULES, *SEARCHES) if run(task, m)]
    return one + [(task, method) for task in config.every for method in ACCURACIES if few]


@functools.cache
def algorithm(method: str, config: Config) -> Any:
    """The loop of a method and its jitted step."""
    settings: dict[str, Any] = {"shrink": config.shrink}
    fixed = {"exact": config.exact, "cold": config.cold}
    tol: Any = fixed.get(method)
    if method not in fixed:
        first = config.rough if method in ACCURACIES else config.first_tol
        settings |= {"first_tol": first, "linear_factor": config.linear_factor}
        tol = method if method in ("quadratic", "cubic") else lambda k: first * config.fall**k
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
