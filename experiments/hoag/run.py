"""Runs `hoag`: penalties by inexact hypergradients, by exact ones, and by search at equal cost."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import baselines, expected, record
from experiments.hoag import methods, problem, truth
from experiments.hoag.config import Config

TABLE = ("validation_loss", "true_loss", "test_loss", "test_error", "products", "gradients")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed; one that is finished has a test loss, and is not run again."""
    records = record.Records(out, seed)
    loaded: Any = ("", None, None)
    for name, method in methods.tasks(config, seed):
        label = f"{name}_{method}"
        done = record.read(out, seed=seed, method=label)
        if any("test_loss" in r.metrics for r in done):
            continue
        records.rewind(label)
        if loaded[0] != name:
            task = problem.load(name, config, seed)
            loaded = (name, task, truth.of(task) if name in config.single else None)
        _, task, exact = loaded
        best = _Best(label, task, exact, records)
        if method in methods.SEARCHES:
            _search(best, method, config, seed)
        else:
            limit, goal, steps = config.budget, -np.inf, config.steps
            if method == "cold":
                limit, steps = np.inf, config.cold_steps[config.every.index(name)]
            elif method in methods.ACCURACIES:
                (cold,) = record.read(out, seed=seed, method=f"{name}_cold")[-1:]
                limit, goal = cold.cost, cold.metrics["validation_loss"]
            _tune(best, method, config, steps, limit, goal)


class _Best:
    """The best point of a run by validation, and the records of the way to it."""

    def __init__(
        self, label: str, task: problem.Task, exact: truth.Truth | None, records: record.Records
    ):
        self.label, self.task, self.exact, self.records = label, task, exact, records
        self.value = self.true = np.inf
        self.params: Any = None
        self.hparams: Any = None
        self.spent = np.zeros(2)  # inner gradients, products
        self.last: tuple[int, float, dict[str, float]] = (0, 0.0, {})

    def see(
        self, step: int, cost: float, value: float, params: Any, hparams: Any, **more: float
    ) -> None:
        """One point of the run, recorded once the next is known: the last gets the test loss.

        ``more`` may hold ``true``, the exact outer loss of these hyperparameters.
        """
        if self.last[2]:
            self.records.append(self.label, self.last[0], self.last[1], **self.last[2])
        count, true = len(self.task.valid["y"]), more.pop("true", np.nan)
        if value < self.value:
            self.value, self.params, self.hparams, self.true = value, params, hparams, true
        known = {} if np.isnan(self.true) else {"true_loss": self.true / count}
        self.last = (
            step,
            cost,
            {
                "validation_loss": self.value / count,
                "tried": value / count,
                "gradients": float(self.spent[0]),
                "products": float(self.spent[1]),
                "penalty": float(jnp.mean(self.hparams)),
                **known,
                **more,
            },
        )

    def end(self, spent: float | None = None) -> None:
        """The exact loss and the test part, read once, at the best point.

        ``spent``: the budget, where it ended the run. The step that went beyond is not in the
        records, and a run that did not reach its goal counts with all that it was given.
        """
        test = problem.measured(self.params, self.task.test)
        step, cost, metrics = self.last
        metrics["spent"] = cost if spent is None else spent
        if self.exact is not None and "true_loss" not in metrics:
            found = truth.at(self.exact, self.params, jnp.zeros_like(self.params), self.hparams)
            metrics["true_loss"] = found["value"] / len(self.task.valid["y"])
        ends = {f"test_{name}": float(value) for name, value in test.items()}
        self.records.append(self.label, step, cost, **metrics, **ends)


def _tune(best: _Best, method: str, config: Config, steps: int, limit: float, goal: float) -> None:
    """One gradient method, until ``limit`` is spent or the validation loss is ``goal``.

    The hypergradients of schedules are compared with exact ones, at no cost to the method.
    """
    task, cost, ended = best.task, 0.0, None
    loop, step = methods.algorithm(method, config)
    shape = () if task.weights == task.weights[:1] or method == "single" else task.weights
    state = loop.init(jnp.zeros(task.weights), jnp.full(shape, config.start))
    inner = jax.tree.map(lambda x: x[None], task.train)
    followed = best.exact if method in methods.FOLLOWED else None
    for k in range(steps):
        unused = 0.0
        if method == "cold":
            # A warm start of zero is a cold one, but for the product that it is tried with.
            state = state._replace(response=jnp.zeros_like(state.response))
            unused = 1.0
        state, info = step(state, inner_batches=inner, outer_batch=task.valid)
        paid = jax.tree.map(float, info.cost)
        paid = paid._replace(products=paid.products - unused)
        cost += paid.total
        if cost > limit and k:
            ended = limit
            break
        best.spent += (paid.inner_gradients, paid.products)
        more: dict[str, float] = {}
        if followed is not None:
            exact = truth.at(followed, state.params, state.response, info.hparams)
            length, value = float(info.hypergrad_norm), exact["derivative"]
            error = min(abs(length - value), abs(length + value))
            more = {"true": exact["value"], "error": error, "bound": exact["bound"]}
            more |= {"derivative": abs(value), "tol": float(info.stats["tol"])}
        best.see(k, cost, float(info.value), loop.deploy(state, info.hparams), info.hparams, **more)
        if best.value <= goal * len(task.valid["y"]):
            break
    best.end(ended)


def _search(best: _Best, method: str, config: Config, seed: int) -> None:
    """Inner solves from zero at penalties of a grid, at random, or by TPE."""
    task, cost, trial = best.task, 0.0, 0

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
    best.end(config.budget if cost > config.budget and trial > 1 else None)


def summary(records: list[record.Record]) -> dict[str, Any]:
    """What each method spent until it was near the best, over its rival's; errors over bounds.

    ``near_TASK_METHOD``: cost and products until the loss was within 0.1 % of the best of all
    methods (with a penalty per weight: at most the loss that cold solves end with), and those over
    the cost of exact solves (over the products of cold ones), seed by seed with a 95 % interval. A
    way that never came near counts with all that it spent (its budget, if that ended it; with a
    penalty per weight at least the products of cold solves), and as ``missed``. ``close_``: the
    same for 0.01 %. ``errors_TASK``: of all hypergradients that were compared with exact ones.
    """
    near, close = Config().near, Config().close
    told = {**_reached(records, "near", near), **_reached(records, "close", close)}
    compared: dict[str, list[record.Record]] = {}
    for r in records:
        if "bound" in r.metrics:
            compared.setdefault(f"errors_{r.method.split('_')[0]}", []).append(r)
    for name, chosen in compared.items():
        told[name] = {
            "over_bound": expected.statistics(
                r.metrics["error"] / r.metrics["bound"] for r in chosen
            ),
            "relative": expected.statistics(
                r.metrics["error"] / r.metrics["derivative"] for r in chosen
            ),
        }
    return told


def _reached(records: list[record.Record], word: str, above: float) -> dict[str, Any]:
    finals = record.final(records)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for (method, seed), end in finals.items():
        name = method.split("_")[0]
        cold = finals.get((f"{name}_cold", seed))
        rivals = [r for (m, s), r in finals.items() if s == seed and m.split("_")[0] == name]
        goal = _loss(cold) if cold else min(map(_loss, rivals)) * (1 + above)
        way = [r for r in records if r.method == method and r.seed == seed]
        there = [r for r in way if _loss(r) <= goal]
        reached = there[0] if there else end
        least = cold.metrics["products"] if cold and not there else 0.0
        found.setdefault(method, {})[seed] = {
            "cost": reached.cost if there else end.metrics["spent"],
            "products": max(reached.metrics["products"], least),
            "missed": float(not there),
        }
    for method, seeds in found.items():
        name = method.rpartition("_")[0]
        for rival, what in ((f"{name}_exact", "cost"), (f"{name}_cold", "products")):
            if rival in found and rival != method:
                for seed, mine in seeds.items():
                    mine["over_rival"] = mine[what] / found[rival][seed][what]
    return {
        f"{word}_{method}": {
            metric: expected.interval({seed: one[metric] for seed, one in seeds.items()})
            for metric in next(iter(seeds.values()))
        }
        for method, seeds in found.items()
    }


def _loss(r: record.Record) -> float:
    """The exact loss of the hyperparameters, where it is known; else the one that was computed."""
    return r.metrics.get("true_loss", r.metrics["validation_loss"])
