"""Finds the step sizes in `config.py`: `python -m experiments.solvers.tune PROBLEM [METHOD ...]`.

On seed 100, which no run uses, with a tenth of the budget: the pair with the smallest median of the
last three recorded gradients.
"""

import sys

import numpy as np

from experiments.solvers import loops, run
from experiments.solvers.config import METHODS, cpu
from experiments.solvers.problem import cached

SEED, PART = 100, 0.1
OTHER = 60_000.0  # the budget of a problem that is in no preset
RATES = (0.03, 0.1, 0.3, 1.0)
OUTER = (0.001, 0.01, 0.1, 1.0, 10.0)


def tune(name: str, method: str) -> tuple[tuple[float, float], float]:
    """The best pair and what it reaches, relative to the start."""
    config, problem = cpu(), cached(name, cpu().batch)
    budgets = dict(zip(config.problems, config.budget, strict=True))
    budget = budgets.get(name, OTHER) * PART
    count = int(budget / loops.cost(method, config, problem))
    stops = [max(1, round(count * x)) for x in (0.8, 0.9, 1.0)]
    first = np.sum(problem.gradient(problem.hparams) ** 2)
    found = {}
    for rate in RATES:
        for outer in OUTER:
            ends = []
            for step, hparams, _ in run.follow(config, name, method, SEED, (rate, outer), stops):
                lam = np.asarray(hparams)
                if step and np.isfinite(lam).all() and np.abs(lam).max() < 20:
                    ends.append(np.sum(problem.gradient(lam) ** 2) / first)
            found[rate, outer] = float(np.median(ends)) if len(ends) == 3 else np.inf
    best = min(found, key=lambda pair: found[pair])
    return best, found[best]


if __name__ == "__main__":
    for method in sys.argv[2:] or METHODS:
        sys.stdout.write(f"{sys.argv[1]} {method} {tune(sys.argv[1], method)}\n")
        sys.stdout.flush()
