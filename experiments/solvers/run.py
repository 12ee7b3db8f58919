"""Runs `solvers`: every single loop on three problems, ours beside the same by hand."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import record
from experiments.solvers import loops
from experiments.solvers.config import RATES, Config
from experiments.solvers.problem import Problem, cached

TABLE = ("gradient", "relative", "seconds", "time_ratio", "difference")
START = (0.1, 0.01)  # where no rates were tuned


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on all problems for one seed; a resumed run skips those that had finished."""
    records = record.Records(out, seed)
    for name, budget in zip(config.problems, config.budget, strict=True):
        for method in config.methods:
            if not records.finished(f"{name}_{method}", config.points + 1):
                _run(records, config, seed, name, method, budget)


def marks(steps: int, points: int) -> list[int]:
    """Steps after which a run is recorded: evenly spaced in their logarithm."""
    first = max(1.0, steps / 2.0 ** (points - 1), steps / 300)
    return [round(x) for x in np.geomspace(first, steps, points)]


@functools.cache
def advance(implementation: str, method: str, config: Config, name: str) -> Any:
    """``(state, count, key, rates, train, valid) -> state`` after ``count`` more steps."""
    problem = cached(name, config.batch)

    @jax.jit
    def steps(state: Any, begin: Any, end: Any, key: Any, rates: Any, train: Any, valid: Any):
        one = loops.runner(implementation, method, config, problem, rates)

        def body(t: Any, state: Any) -> Any:
            drawn, own = jax.random.split(jax.random.fold_in(key, t))
            inner, outer = loops.draw(method, config, train, valid, drawn)
            return one.step(state, inner, outer, own)

        return jax.lax.fori_loop(begin, end, body, state)

    return steps


def follow(
    config: Config, name: str, method: str, seed: int, rates: Any, stops: list[int],
    implementation: str = "bilevel",
) -> Any:  # fmt: skip
    """``(step, hyperparameters, seconds)`` at each stop, compilation left out of the time."""
    problem = cached(name, config.batch)
    steps, key = advance(implementation, method, config, name), jax.random.key(seed)
    rates = tuple(jnp.float32(x) for x in rates)
    one = loops.runner(implementation, method, config, problem, rates)
    state, data = one.init(problem.params, problem.hparams), (problem.train, problem.valid)
    jax.block_until_ready(steps(state, 0, 0, key, rates, *data))
    yield 0, one.hparams(state), 0.0
    seconds, before = 0.0, 0
    for stop in stops:
        begin = time.perf_counter()
        state = jax.block_until_ready(steps(state, before, stop, key, rates, *data))
        seconds, before = seconds + time.perf_counter() - begin, stop
        yield stop, one.hparams(state), seconds


def _run(
    records: record.Records, config: Config, seed: int, name: str, method: str, budget: float
) -> None:
    problem, each = cached(name, config.batch), 0.0
    rates = RATES.get(name, {}).get(method, START)
    each = loops.cost(method, config, problem)
    stops = marks(int(budget / each), config.points)
    first = float(np.sum(problem.gradient(problem.hparams) ** 2))
    timed = timing(config, name, method, rates) if config.timed else {}
    for step, hparams, seconds in follow(config, name, method, seed, rates, stops):
        finite = bool(np.isfinite(np.asarray(hparams)).all())
        size = float(np.sum(problem.gradient(hparams) ** 2)) if finite else float("inf")
        records.append(
            f"{name}_{method}", step, step * each, gradient=size, relative=size / first,
            seconds=seconds, **timed,
        )  # fmt: skip


@functools.cache
def timing(config: Config, name: str, method: str, rates: Any) -> dict[str, float]:
    """Time of ours over that by hand, in turns, and how far the two end from each other."""
    problem, key = cached(name, config.batch), jax.random.key(0)
    rates = tuple(jnp.float32(x) for x in rates)
    data, calls, ends = (problem.train, problem.valid), {}, {}
    for implementation in loops.IMPLEMENTATIONS:
        steps = advance(implementation, method, config, name)
        one = loops.runner(implementation, method, config, problem, rates)
        state = one.init(problem.params, problem.hparams)
        calls[implementation] = functools.partial(steps, state, 0, config.timed, key, rates, *data)
        ends[implementation] = np.asarray(
            one.hparams(steps(state, 0, 20, key, rates, *data)), np.float64
        )
    ratios = []
    for turn in range(config.rounds):
        order = loops.IMPLEMENTATIONS if turn % 2 else loops.IMPLEMENTATIONS[::-1]
        spent = {}
        for implementation in order:
            begin = time.perf_counter()
            jax.block_until_ready(calls[implementation]())
            spent[implementation] = time.perf_counter() - begin
        ratios.append(spent["bilevel"] / spent["jax"])
    moved = np.linalg.norm(ends["jax"] - np.asarray(problem.hparams, np.float64))
    apart = np.linalg.norm(ends["bilevel"] - ends["jax"]) / max(moved, 1e-30)
    return {"time_ratio": float(np.median(ratios)), "difference": float(apart)}


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Ratios over all methods."""
    last = {r.method: r.metrics for r in records if "time_ratio" in r.metrics}
    if not last:
        return {}
    return {
        "all": {
            "time_ratio": max(m["time_ratio"] for m in last.values()),
            "difference": max(m["difference"] for m in last.values()),
        }
    }


def problem_of(name: str, config: Config) -> Problem:
    """The problem of a run."""
    return cached(name, config.batch)
