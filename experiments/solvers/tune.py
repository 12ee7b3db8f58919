"""Finds the step sizes in `config.py`: `python -m experiments.solvers.tune PROBLEM [METHOD ...]`.

On seed 100, which no run uses. All pairs of a grid have three tenths of the budget; as long as the
best lies at an edge, the grid grows there. The best six then have the whole budget. A pair is
judged by the median of its last three recorded gradients. Last, the best must diverge on none of
nine further seeds: else the next best is taken, and two pairs join in which one of its step sizes
is shorter.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from experiments.solvers import loops, run
from experiments.solvers.config import METHODS, cpu
from experiments.solvers.problem import cached

SEEDS = tuple(range(100, 110))
PART, KEPT, GROWN = 0.3, 6, 3
RATES = (0.1, 0.3, 1.0)
OUTER = (0.1, 1.0, 10.0, 100.0)
FACTORS = 3.0, 10.0  # between neighbours of the two grids
Pair: TypeAlias = tuple[float, float]
Reach: TypeAlias = Callable[[Pair, float, int], float]


def reached(
    name: str, cost: float, follow: Callable[[int, Pair, list[int]], Iterable[Any]],
    pair: Pair, part: float, seed: int,
) -> float:  # fmt: skip
    """The squared gradient that a pair ends with, relative to the start.

    `follow` yields the step, the hyperparameters and anything more at the start and at all stops;
    a step has a cost.
    """
    config, problem = cpu(), cached(name, cpu().batch)
    budget = dict(zip(config.problems, config.budget, strict=True))[name] * part
    count = max(1, int(budget / cost))
    stops = sorted({max(1, round(count * x)) for x in (0.8, 0.9, 1.0)})
    first, ends = run.at_start(name, config.batch), []
    for step, hparams, *_ in follow(seed, pair, stops):
        lam = np.asarray(hparams)
        if not np.isfinite(lam).all() or np.abs(lam).max() > 20:
            return np.inf
        if step:
            ends.append(np.sum(problem.gradient(lam) ** 2) / first)
    return float(np.median(ends))


def reach(name: str, method: str) -> Reach:
    """What one of our loops reaches."""
    config = cpu()

    def follow(seed: int, pair: Pair, stops: list[int]) -> Iterable[Any]:
        return run.follow(config, name, method, seed, pair, stops)

    cost = loops.cost(method, config, cached(name, config.batch))
    return functools.partial(reached, name, cost, follow)


def tune(
    reach: Reach, rates: Sequence[float] = RATES, outer: Sequence[float] = OUTER,
    grown: int = GROWN, kept: int = KEPT, more: Sequence[Pair] = (),
) -> tuple[Pair, float]:  # fmt: skip
    """The best pair and what it reaches, relative to the start; `more` are tried to the end."""
    grid, found = [list(rates), list(outer)], {}
    for _ in range(grown + 1):
        for pair in [(a, b) for a in grid[0] for b in grid[1]]:
            if pair not in found:
                found[pair] = reach(pair, PART, SEEDS[0])
        best = min(found, key=lambda pair: found[pair])
        before = len(grid[0]), len(grid[1])
        for values, at, factor in zip(grid, best, FACTORS, strict=True):
            if at == max(values):
                values.append(_round(at * factor))
            if at == min(values):
                values.append(_round(at / factor))
        if before == (len(grid[0]), len(grid[1])):
            break
    last = [*sorted(found, key=lambda pair: found[pair])[:kept], *more]
    return stable(reach, {pair: reach(pair, 1.0, SEEDS[0]) for pair in last})


def stable(reach: Reach, ends: dict[Pair, float]) -> tuple[Pair, float]:
    """The best pair that diverges on no seed, and its worst; `ends` is what pairs end with on one.

    In place of a pair that diverges come two, with one of its step sizes shorter each.
    """
    ends, seen = dict(ends), set(ends)
    while True:
        pair = min(ends, key=lambda pair: ends[pair])
        worst = ends.pop(pair)
        for seed in SEEDS[1:]:
            if not np.isfinite(worst):
                break
            worst = max(worst, reach(pair, 1.0, seed))
        if np.isfinite(worst):
            return pair, worst
        a, b = pair
        for shorter in ((_round(a / FACTORS[0]), b), (a, _round(b / FACTORS[1]))):
            if shorter not in seen:
                seen.add(shorter)
                ends[shorter] = reach(shorter, 1.0, SEEDS[0])


def _round(x: float) -> float:
    """One digit."""
    return float(f"{x:.0e}")


if __name__ == "__main__":
    for method in sys.argv[2:] or METHODS:
        sys.stdout.write(f"{sys.argv[1]} {method} {tune(reach(sys.argv[1], method))}\n")
        sys.stdout.flush()
