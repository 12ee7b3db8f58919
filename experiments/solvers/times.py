"""Time of our steps over that of the hand-written ones: `python -m experiments.solvers.times OUT`.

A run measures every pair once. On a machine that others use, measure again while all else is
stopped, into the folder of the run: the last measurement counts. A call that is cut off goes on
with the next one; `run --resume` then makes the summary anew.
"""

import functools
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import record
from experiments.solvers import loops
from experiments.solvers.config import RATES, Config, cpu
from experiments.solvers.problem import cached

COMPARED = 20  # steps after which the two are compared


def measure(records: record.Records, config: Config, often: int = 1) -> None:
    """Each pair until it was measured so often, the fewest first, as `time_PROBLEM_METHOD`."""

    def done(pair: tuple[str, str]) -> int:
        return len(record.read(records.out, method="time_{}_{}".format(*pair)))

    for name, method in sorted(itertools.product(config.problems, config.methods), key=done):
        if done((name, method)) < often:
            rates = RATES.get(name, {}).get(method, loops.START)
            told = timing(config, name, method, rates)
            records.append(f"time_{name}_{method}", 0, 0.0, **told)


def timing(config: Config, name: str, method: str, rates: tuple[float, float]) -> dict[str, float]:
    """Median ratio of the two in turns, both in one compiled loop, and how far apart they end."""
    problem, key = cached(name, config.batch), jax.random.key(0)
    sizes = tuple(jnp.float32(x) for x in rates)
    data, calls, ends = (problem.train, problem.valid), {}, {}
    for implementation in loops.IMPLEMENTATIONS:
        steps = loops.advance(implementation, method, config, name)
        one = loops.runner(implementation, method, config, problem, sizes)
        state = one.init(problem.params, problem.hparams)
        calls[implementation] = functools.partial(steps, state, 0, key=key, rates=sizes)
        reached = calls[implementation](COMPARED, train=data[0], valid=data[1])
        ends[implementation] = np.asarray(one.hparams(reached), np.float64)

    def spent(implementation: str, count: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(calls[implementation](count, train=data[0], valid=data[1]))
        return time.perf_counter() - begin

    # As many steps as take the time of a round.
    count, took = COMPARED, spent("jax", COMPARED)
    while took < config.timed:
        count = int(count * min(10.0, 1.2 * config.timed / took)) + 1
        took = spent("jax", count)
    ratios = []
    for turn in range(config.rounds):
        order = loops.IMPLEMENTATIONS if turn % 2 else loops.IMPLEMENTATIONS[::-1]
        seconds = {implementation: spent(implementation, count) for implementation in order}
        ratios.append(seconds["bilevel"] / seconds["jax"])
    moved = np.linalg.norm(ends["jax"] - np.asarray(problem.hparams, np.float64))
    apart = np.linalg.norm(ends["bilevel"] - ends["jax"]) / max(float(moved), 1e-30)
    return {
        "time_ratio": float(np.median(ratios)),
        "low_quarter": float(np.quantile(ratios, 0.25)),
        "high_quarter": float(np.quantile(ratios, 0.75)),
        "microseconds": 1e6 * took / count,
        "difference": float(apart),
    }


if __name__ == "__main__":
    measure(record.Records(Path(sys.argv[1]), 0), cpu(), often=2)
