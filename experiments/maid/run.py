"""Runs `maid`: certified inexact steps, HOAG and exact solves, and searches at equal cost."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from experiments.common import baselines, record
from experiments.maid import problem
from experiments.maid.config import Config

ACCURACIES = {"maid1": 1e-1, "maid3": 1e-3, "maid5": 1e-5}
SCHEDULES = ("exponential", "quadratic", "cubic", "exact")
SEARCHES = ("random", "tpe")
TABLE = ("value", "above_optimum", "test_error", "test_psnr", "accepted")


def tasks(config: Config) -> list[tuple[str, str]]:
    """Every problem with every method that is run on it; searches where they can."""
    loops = (*ACCURACIES, *SCHEDULES)
    return [
        (task, method)
        for task in config.tasks
        for method in (loops + SEARCHES if task == "denoise" else loops)
    ]


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
            if method in SEARCHES:
                _search(label, method, loaded[1], config, seed, records)
            else:
                _tune(label, method, loaded[1], config, records)


class _Best:
    """The best point of a run by its outer loss, and the records of the way to it."""

    def __init__(self, label: str, task: problem.Task, records: record.Records):
        self.label, self.task, self.records = label, task, records
        self.value, self.params, self.hparams = np.inf, task.params, task.hparams
        self.last: tuple[int, float, dict[str, float]] = (0, 0.0, {})

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
        step, cost, metrics = self.last
        tested = {k: float(v) for k, v in self.task.test(self.params, self.hparams).items()}
        self.records.append(self.label, step, cost, **metrics, **tested, end=1.0)
        if self.label.startswith("denoise"):
            name = f"{self.label}_{self.records.seed}"
            record.save_arrays(self.records.out, name, image=self.params[0], theta=self.hparams)
            batch = {k: v[0] for k, v in self.task.train.items()}
            record.save_arrays(self.records.out, f"denoise_{self.records.seed}", **batch)


def algorithm(method: str, task: problem.Task, config: Config) -> Any:
    """The loop of a method."""
    if method in ACCURACIES:
        return bilevel.maid(
            task.outer, task.inner, task.certificate, accuracy=ACCURACIES[method], loosen=1.25
        )
    tol: Any = config.exact if method == "exact" else method
    return bilevel.hoag(task.outer, task.inner, tol)


def _tune(
    label: str, method: str, task: problem.Task, config: Config, records: record.Records
) -> None:
    """One loop, until the budget is spent."""
    loop = algorithm(method, task, config)
    step = jax.jit(loop.step)
    state = loop.init(task.params, task.hparams)
    inner = jax.tree.map(lambda x: x[None], task.train)
    best, cost, accepted = _Best(label, task, records), 0.0, 0
    for k in range(config.steps):
        state, info = step(state, inner_batches=inner, outer_batch=task.valid)
        cost += float(info.cost.total)
        if cost > config.budget and k:
            break
        accepted += int(info.stats["accepted"])
        bound = {"accuracy": float(info.stats["accuracy"])} if method in ACCURACIES else {}
        params = loop.deploy(state, info.hparams)
        best.see(k, cost, float(info.value), params, info.hparams, accepted=accepted, **bound)
    best.end()


def _search(
    label: str,
    method: str,
    task: problem.Task,
    config: Config,
    seed: int,
    records: record.Records,
) -> None:
    """Inner solves from the noisy images at random settings, or by TPE."""
    solve = jax.jit(
        lambda theta, batch, tol: bilevel.minimize(task.inner, task.params, theta, batch, tol=tol)
    )
    best, cost, trial = _Best(label, task, records), 0.0, 0
    scale = float(jnp.linalg.norm(jax.grad(task.inner)(task.params, task.hparams, task.train)))

    def objective(setting: dict[str, Any]) -> float:
        nonlocal cost, trial
        if trial and cost >= config.budget:
            return float(best.value)  # the budget is spent: nothing is evaluated any more
        theta = jnp.array([setting["weight"], setting["smoothing"]])
        found = solve(theta, task.train, config.solved * scale)
        cost, trial = cost + float(found.stats["num_gradients"]), trial + 1
        value = float(task.outer(found.params, theta, task.valid))
        if cost <= config.budget or trial == 1:
            best.see(trial - 1, cost, value, found.params, theta)
        return value

    baselines.search(
        objective,
        {"weight": (config.low, config.high), "smoothing": (config.low, config.high)},
        budget=config.trials,
        cost=1,
        sampler=method,
        seed=seed,
    )
    best.end()
