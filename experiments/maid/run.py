"""Runs `maid`: certified inexact steps, HOAG and exact solves, a grid and searches."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from experiments.common import baselines, expected, record
from experiments.maid import problem
from experiments.maid.config import Config

ACCURACIES = {"maid1": 1e-1, "maid3": 1e-3, "maid5": 1e-5, "accelerated": 1e-3}
SCHEDULES = ("exponential", "exact")
SEARCHES = ("grid", "random", "tpe")
LOOPS = ("maid3", "accelerated", *SCHEDULES)
METHODS = {
    "quadratic": (*ACCURACIES, *SCHEDULES),
    "variation": LOOPS + SEARCHES,
    "experts": ("maid3", "accelerated", "exponential"),
}
TABLE = ("value", "above_optimum", "test_error", "psnr", "test_psnr", "accepted", "seconds")
DESCENT = 1e-4
NEAR = 1e-8
"""How near the optimum counts as reached, in parts of one and the optimum."""
ROUNDING = 1e-13
"""Of a value that sums a thousand squares, in parts of one and the value."""


def tasks(config: Config) -> list[tuple[str, str]]:
    """Every problem with every method that is run on it; searches where there are two numbers."""
    return [(task, method) for task in config.tasks for method in METHODS.get(task, LOOPS)]


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed; one that is finished has a last record, and is not run again."""
    with jax.enable_x64(True):
        records = record.Records(out, seed)
        loaded: Any = ("", None)
        for name, method in tasks(config):
            label = f"{name}_{method}"
            if any("end" in r.metrics for r in record.read(out, seed=seed, method=label)):
                continue
            records.rewind(label)
            if loaded[0] != name:
                loaded = (name, problem.load(name, config, seed))
            best = _Best(label, loaded[1], records)
            if method in SEARCHES:
                _search(best, method, config, seed)
            else:
                _tune(best, method, config)
            best.end()


class _Best:
    """The best point of a run by its outer loss, and the records of the way to it."""

    def __init__(self, label: str, task: problem.Task, records: record.Records):
        self.label, self.task, self.records = label, task, records
        self.value, self.params, self.hparams = np.inf, task.params, task.hparams
        self.last: tuple[int, float, dict[str, float]] = (0, 0.0, {})
        self.begun = time.monotonic()

    def see(
        self, step: int, cost: float, value: float, params: Any, hparams: Any, **more: float
    ) -> None:
        """One point of the run, recorded once the next is known: the last gets what is tested."""
        if self.last[2]:
            self.records.append(self.label, self.last[0], self.last[1], **self.last[2])
        if value < self.value:
            self.value, self.params, self.hparams = value, params, hparams
        self.last = (step, cost, {"value": self.value, "tried": value, **more})

    def end(self) -> None:
        """The third part, read once, at the best point."""
        seconds = time.monotonic() - self.begun
        step, cost, metrics = self.last
        tested = jax.tree.map(np.asarray, self.task.test(self.params, self.hparams))
        pictures = tested.pop("pictures", None)
        told = {k: v.tolist() for k, v in tested.items()}
        self.records.append(self.label, step, cost, **metrics, **told, seconds=seconds, end=1.0)
        if pictures is not None:
            named = self.hparams if isinstance(self.hparams, dict) else {"theta": self.hparams}
            name = f"{self.label}_{self.records.seed}"
            record.save_arrays(self.records.out, name, pictures=np.float32(pictures), **named)


def algorithm(method: str, task: problem.Task, config: Config) -> Any:
    """The loop of a method."""
    if method in ACCURACIES:
        return bilevel.maid(
            task.outer,
            task.inner,
            task.certificate,
            accuracy=ACCURACIES[method],
            first_step=task.first_step,
            constrain=task.constrain,
            descent=DESCENT,
            loosen=1.25,
            smoothness=task.smoothness if method == "accelerated" else None,
            max_steps=5_000,
        )
    tol: Any = config.exact if method == "exact" else method
    return bilevel.hoag(
        task.outer,
        task.inner,
        tol,
        first_step=task.first_step,
        constrain=task.constrain,
        max_steps=5_000,
    )


def _tune(best: _Best, method: str, config: Config) -> None:
    """One loop, until the budget is spent."""
    task = best.task
    loop = algorithm(method, task, config)
    step = jax.jit(loop.step)
    state = loop.init(task.params, task.hparams)
    inner = jax.tree.map(lambda x: x[None], task.train)
    cost, accepted, known = 0.0, 0, Guarantees(task) if method in ACCURACIES else None
    for k in range(config.steps):
        before = state
        state, info = step(state, inner_batches=inner, outer_batch=task.valid)
        cost += float(info.cost.total)
        if cost > config.budget and k:
            break
        accepted += int(info.stats["accepted"])
        more = {}
        if known is not None:
            known.check(before.hparams, state.hparams, info)
            more = {"accuracy": float(info.stats["accuracy"]), **known.told}
        params = loop.deploy(state, info.hparams)
        best.see(k, cost, float(info.value), params, info.hparams, accepted=accepted, **more)


class Guarantees:
    """Counts the accepted steps that break what MAID promises, where the truth is known.

    A promise is broken by more than rounding: that of the value, and that of the difference of
    two hyperparameters over a step size, from which the hypergradient is read.
    """

    def __init__(self, task: problem.Task):
        self.truth = task.truth
        self.told: dict[str, float] = {}
        if self.truth is not None:
            self.told = {"broken_decreases": 0.0, "broken_bounds": 0.0, "largest_error": 0.0}

    def check(self, old: Any, new: Any, info: Any) -> None:
        """One step: the true decrease, and the true error of the hypergradient."""
        if self.truth is None:
            return
        (before, gradient), (after, _) = self.truth(old), self.truth(new)
        self.told["true_value"] = after
        if not info.stats["accepted"]:
            return
        length, norm = float(info.stats["step_size"]), float(info.hypergrad_norm)
        bound = float(info.stats["error_bound"])
        promised = DESCENT**2 * length * norm**2
        decreased = before - after >= promised - ROUNDING * (1 + before)
        found = (np.asarray(old) - np.asarray(new)) / length
        rounding = 1e-15 * float(np.linalg.norm(old)) / length
        error = float(np.linalg.norm(found - gradient))
        bounded = error <= bound + rounding and bound <= (1 - DESCENT) * norm
        self.told["broken_decreases"] += float(not decreased)
        self.told["broken_bounds"] += float(not bounded)
        part = max(error - rounding, 0.0) / bound
        self.told["largest_error"] = max(self.told["largest_error"], part)


def _search(best: _Best, method: str, config: Config, seed: int) -> None:
    """Inner solves from the noisy images at settings of a grid, at random, or by TPE.

    The grid is measured as a whole, whatever it costs; a search ends where its budget does.
    """
    task, cost, trial = best.task, 0.0, 0
    solve = jax.jit(
        lambda theta, batch, tol: bilevel.minimize(task.inner, task.params, theta, batch, tol=tol)
    )
    scale = float(jnp.linalg.norm(jax.grad(task.inner)(task.params, task.hparams, task.train)))
    budget = np.inf if method == "grid" else config.budget

    def objective(weight: float, smoothing: float) -> float:
        nonlocal cost, trial
        if trial and cost >= budget:
            return float(best.value)  # the budget is spent: nothing is evaluated any more
        theta = jnp.array([weight, smoothing])
        found = solve(theta, task.train, config.solved * scale)
        cost, trial = cost + float(found.stats["num_gradients"]), trial + 1
        value = float(task.outer(found.params, theta, task.valid))
        if cost <= budget or trial == 1:
            best.see(trial - 1, cost, value, found.params, theta)
        return value

    if method == "grid":
        for weight in np.linspace(config.low, config.high, config.points):
            for smoothing in np.linspace(config.low, config.high, config.points):
                objective(float(weight), float(smoothing))
        return
    baselines.search(
        lambda setting: objective(setting["weight"], setting["smoothing"]),
        {"weight": (config.low, config.high), "smoothing": (config.low, config.high)},
        budget=config.trials,
        cost=1,
        sampler=method,
        seed=seed,
    )


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Work to the optimum of the quadratic problem, and decibels of images that were not tuned on.

    Images are the same for every seed, their noise is not: a difference of two methods on an
    image is its mean over seeds, and the interval is one over images.
    """
    last = record.final(records)
    told: dict[str, Any] = {"work": _work(records, last)}
    pairs = {
        "variation_over_noisy": ("variation_maid3", None),
        "variation_over_grid": ("variation_maid3", "variation_grid"),
        "experts_over_grid": ("experts_maid3", "variation_grid"),
        "accelerated_experts_over_grid": ("experts_accelerated", "variation_grid"),
        "experts_over_variation": ("experts_maid3", "variation_maid3"),
    }
    for task in ("multinomial", "variation", "experts"):
        if any(method == f"{task}_maid3" for method, _ in last):
            told[f"{task}_over_hoag"] = {
                "value": expected.paired(
                    records, "value", f"{task}_maid3", f"{task}_exponential", ratio=True
                )
            }
    for name, (a, b) in pairs.items():
        seeds = sorted(s for method, s in last if method == a and (b is None or (b, s) in last))
        if seeds:
            gains = [_decibels(last, a, s) - _decibels(last, b or f"noisy {a}", s) for s in seeds]
            told[name] = {"decibels": expected.interval(np.mean(gains, axis=0).tolist())}
    return told


def _decibels(last: Any, method: str, seed: int) -> np.ndarray:
    key = "noisy_psnrs" if method.startswith("noisy ") else "test_psnrs"
    return np.array(last[method.removeprefix("noisy "), seed].metrics[key])


def _work(records: list[record.Record], last: Any) -> dict[str, Any]:
    """G until the optimum is reached, the most of three first accuracies over the least."""
    ratios = []
    for seed in sorted({s for method, s in last if method == "quadratic_maid1"}):
        spent = []
        for method in ("quadratic_maid1", "quadratic_maid3", "quadratic_maid5"):
            end = last[method, seed]
            goal = end.metrics["optimum"] + NEAR * (1 + end.metrics["optimum"])
            way = [r for r in records if (r.method, r.seed) == (method, seed)]
            there = [r.cost for r in way if r.metrics["true_value"] <= goal]
            spent.append(there[0] if there else np.inf)
        ratios.append(max(spent) / min(spent))
    return {"ratio": expected.statistics(ratios)} if ratios else {}
