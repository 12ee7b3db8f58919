"""Runs `hoag`: penalties by inexact hypergradients, by exact ones, and by search at equal cost."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import baselines, expected, record
from experiments.hoag import methods, problem
from experiments.hoag.config import Config

TABLE = ("validation_loss", "test_loss", "test_error", "products", "gradients")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed; one that is finished has a test loss, and is not run again."""
    records = record.Records(out, seed)
    loaded: Any = ("", None)
    for name, method in methods.tasks(config):
        label = f"{name}_{method}"
        done = record.read(out, seed=seed, method=label)
        if any("test_loss" in r.metrics for r in done):
            continue
        records.rewind(label)
        if loaded[0] != name:
            loaded = (name, problem.load(name, config, seed))
        task = loaded[1]
        if method in methods.SEARCHES:
            _search(label, method, task, config, seed, records)
        else:
            _tune(label, method, task, config, records)


class _Best:
    """The best point of a run by validation, and the records of the way to it."""

    def __init__(self, label: str, task: problem.Task, records: record.Records):
        self.label, self.task, self.records = label, task, records
        self.value = np.inf
        self.params: Any = None
        self.hparams: Any = None
        self.spent = np.zeros(2)  # inner gradients, products
        self.last: tuple[int, float, dict[str, float]] = (0, 0.0, {})

    def see(self, step: int, cost: float, value: float, params: Any, hparams: Any) -> None:
        """One point of the run, recorded once the next is known: the last gets the test loss."""
        if self.last[2]:
            self.records.append(self.label, self.last[0], self.last[1], **self.last[2])
        if value < self.value:
            self.value, self.params, self.hparams = value, params, hparams
        count = len(self.task.valid["y"])
        self.last = (
            step,
            cost,
            {
                "validation_loss": self.value / count,
                "tried": value / count,
                "gradients": float(self.spent[0]),
                "products": float(self.spent[1]),
                "penalty": float(jnp.mean(self.hparams)),
            },
        )

    def end(self) -> None:
        """The test part, read once, at the best point."""
        test = problem.measured(self.params, self.task.test)
        step, cost, metrics = self.last
        ends = {f"test_{name}": float(value) for name, value in test.items()}
        self.records.append(self.label, step, cost, **metrics, **ends)


def _tune(
    label: str, method: str, task: problem.Task, config: Config, records: record.Records
) -> None:
    """One gradient method, until the budget is spent."""
    loop, step = methods.algorithm(method, config)
    shape = () if task.weights == task.weights[:1] or method == "single" else task.weights
    state = loop.init(jnp.zeros(task.weights), jnp.full(shape, config.start))
    inner = jax.tree.map(lambda x: x[None], task.train)
    best, cost = _Best(label, task, records), 0.0
    for k in range(config.steps):
        unused = 0.0
        if method == "cold":
            # A warm start of zero is a cold one, but for the product that it is tried with.
            state = state._replace(response=jnp.zeros_like(state.response))
            unused = 1.0
        state, info = step(state, inner_batches=inner, outer_batch=task.valid)
        paid = jax.tree.map(float, info.cost)
        paid = paid._replace(products=paid.products - unused)
        cost += paid.total
        if cost > config.budget and k:
            break
        best.spent += (paid.inner_gradients, paid.products)
        best.see(k, cost, float(info.value), loop.deploy(state, info.hparams), info.hparams)
    best.end()


def _search(
    label: str,
    method: str,
    task: problem.Task,
    config: Config,
    seed: int,
    records: record.Records,
) -> None:
    """Inner solves from zero at penalties of a grid, at random, or by TPE."""
    best, cost, trial = _Best(label, task, records), 0.0, 0

    def objective(lam: float) -> float:
        nonlocal cost, trial
        if trial and cost >= config.budget:
            return float(best.value)  # the budget is spent: nothing is evaluated any more
        start = jnp.zeros(task.weights)
        found = problem.solve()(start, jnp.float32(lam), task.train, config.solved)
        spent = float(found.stats["num_gradients"]) + 1
        cost, trial = cost + spent, trial + 1
        value = float(problem.outer(found.params, jnp.float32(lam), task.valid))
        if cost <= config.budget or trial == 1:
            best.spent += (spent, 0.0)
            best.see(trial - 1, cost, value, found.params, jnp.float32(lam))
        return value

    if method == "grid":
        for lam in methods.grid(config):
            objective(float(lam))
    else:
        baselines.search(
            lambda setting: objective(setting["penalty"]),
            {"penalty": (config.low, config.high)},
            budget=config.points,
            cost=1,
            sampler=method,
            seed=seed,
        )
    best.end()


def summary(records: list[record.Record]) -> dict[str, Any]:
    """For each method, what it spent until it was near the best of its problem.

    On problems with a penalty a weight the goal is the loss that cold solves end with.
    """
    near = Config().near
    finals = record.final(records)
    found: dict[str, dict[str, list[float]]] = {}
    for (method, seed), end in finals.items():
        name = method.split("_")[0]
        cold = finals.get((f"{name}_cold", seed))
        rivals = [r for (m, s), r in finals.items() if s == seed and m.split("_")[0] == name]
        least = min(r.metrics["validation_loss"] for r in rivals)
        goal = least * (1 + near) if cold is None else cold.metrics["validation_loss"]
        way = [r for r in records if r.method == method and r.seed == seed]
        there = [r for r in way if r.metrics["validation_loss"] <= goal]
        reached = there[0] if there else end
        into = found.setdefault(f"near_{method}", {k: [] for k in ("cost", "products", "missed")})
        into["cost"].append(reached.cost)
        into["products"].append(reached.metrics["products"])
        into["missed"].append(float(not there))
    return {
        method: {metric: expected.statistics(values) for metric, values in columns.items()}
        for method, columns in found.items()
    }
