"""Runs `solvers`: every single loop on three problems, ours beside the same by hand."""

import functools
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import expected, record
from experiments.solvers import loops, times
from experiments.solvers.config import RATES, Config, cpu
from experiments.solvers.problem import Problem, cached

TABLE = ("gradient", "relative", "seconds", "time_ratio", "difference")
TARGETS = (2, 4, 6)  # minus the logarithms of the squared gradients that the summary times


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on all problems for one seed; a resumed run skips those that had finished."""
    records = record.Records(out, seed)
    if config.timed:
        times.measure(records, config)
    for name, budget in zip(config.problems, config.budget, strict=True):
        for method in config.methods:
            if not records.finished(f"{name}_{method}", config.points + 1):
                _run(records, config, seed, name, method, budget)


def marks(steps: int, points: int) -> list[int]:
    """Steps after which a run is recorded: evenly spaced in their logarithm."""
    first = max(1.0, steps / 2.0 ** (points - 1), steps / 300)
    return [round(x) for x in np.geomspace(first, steps, points)]


def follow(
    config: Config, name: str, method: str, seed: int, rates: Any, stops: list[int],
    implementation: str = "bilevel",
) -> Any:  # fmt: skip
    """``(step, hyperparameters, seconds)`` at each stop, compilation left out of the time."""
    problem = cached(name, config.batch)
    steps, key = loops.advance(implementation, method, config, name), jax.random.key(seed)
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


@functools.cache
def at_start(name: str, batch: int) -> float:
    """The squared gradient at the start."""
    problem = cached(name, batch)
    return float(np.sum(problem.gradient(problem.hparams) ** 2))


def _run(
    records: record.Records, config: Config, seed: int, name: str, method: str, budget: float
) -> None:
    problem = cached(name, config.batch)
    rates = RATES.get(name, {}).get(method, loops.START)
    each = loops.cost(method, config, problem)
    stops = marks(int(budget / each), config.points)
    first = at_start(name, config.batch)
    label = f"{name}_{method}"
    for step, hparams, seconds in follow(config, name, method, seed, rates, stops):
        size = first if step == 0 else squared(problem, hparams)
        records.append(
            label, step, step * each, gradient=size, relative=size / first, seconds=seconds
        )


def squared(problem: Problem, hparams: Any) -> float:
    """The squared gradient; infinite where the hyperparameters are not finite."""
    finite = bool(np.isfinite(np.asarray(hparams)).all())
    return float(np.sum(problem.gradient(hparams) ** 2)) if finite else float("inf")


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Ratios over all methods, and the oracle calls until the gradient is small.

    ``calls_PROBLEM_METHOD.to_2`` are the calls until the squared gradient is ``1e-2`` of that at
    the start, between records by a straight line of the logarithms; ``missed_2`` whether it never
    was: the calls are then all that were made, so that the truth is larger. ``referee_PROBLEM`` has
    the calls to 1e-4 of our first loop there (`ours`), those of the first of the benchmark's other
    solvers as `referee.py` found them (`its`), and their ratio.
    """
    told: dict[str, Any] = {}
    last = {r.method: r.metrics for r in records if "time_ratio" in r.metrics}
    if last:
        told["all"] = {
            "time_ratio": max(m["time_ratio"] for m in last.values()),
            "difference": max(m["difference"] for m in last.values()),
        }
    runs: dict[str, dict[int, list[record.Record]]] = {}
    for r in records:
        if "relative" not in r.metrics:
            continue
        runs.setdefault(r.method, {}).setdefault(r.seed, []).append(r)
    for method, seeds in runs.items():
        into: dict[str, Any] = {}
        for power in TARGETS:
            calls = {seed: _calls(run, 10.0**-power) for seed, run in seeds.items()}
            into[f"to_{power}"] = expected.interval({s: x for s, (x, _) in calls.items()})
            missed = {s: float(x) for s, (_, x) in calls.items()}
            into[f"missed_{power}"] = expected.statistics(missed)
        told[f"calls_{method}"] = into
    return told | _against(told)


def _against(told: dict[str, Any]) -> dict[str, Any]:
    path = Path(__file__).parent / "results" / "referee.json"
    found = record.read_json(path) if path.exists() else {}
    against = {}
    for name in cpu().problems:
        first = []
        for calls in (told, found):
            reached = [
                x["to_4"] for key, x in calls.items()
                if key.startswith(f"calls_{name}_") and ("_public_" in key) == (calls is found)
                and x["missed_4"]["max"] == 0
            ]  # fmt: skip
            first.append(min(reached, key=lambda x: x["mean"], default={"values": {}})["values"])
        ours, its = first
        seeds = [seed for seed in ours if seed in its]
        if seeds:
            into = {"ours": ours, "its": its, "ratio": {s: ours[s] / its[s] for s in seeds}}
            against[f"referee_{name}"] = {
                key: expected.interval({int(s): x for s, x in values.items()})
                for key, values in into.items()
            }
    return against


def _calls(run: list[record.Record], target: float) -> tuple[float, bool]:
    """When a run first was below the target, and whether it never was."""
    for before, after in itertools.pairwise(run):
        if after.metrics["relative"] <= target:
            if not before.cost:
                return after.cost, False
            here, there = (np.log(r.metrics["relative"]) for r in (before, after))
            part = (here - np.log(target)) / (here - there)
            return float(before.cost * (after.cost / before.cost) ** part), False
    return run[-1].cost, True


def problem_of(name: str, config: Config) -> Problem:
    """The problem of a run."""
    return cached(name, config.batch)
