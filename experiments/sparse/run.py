"""Runs `sparse`: L1 penalties by hypergradients, by a grid, by search, and by scikit-learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import expected, record
from experiments.sparse import peers, problem, tasks, tune
from experiments.sparse.config import Config

METHODS = ("hypergradient", "grid", "random_search", "tpe", "scikit_learn")
TABLE = ("criterion", "test_loss", "full_test_loss", "test_error", "support", "seconds")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All tasks and methods on one seed; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    for name in config.tasks:
        methods = [m for m in METHODS if not record.read(out, seed=seed, method=f"{name}_{m}")]
        if not methods:
            continue
        task = tasks.make(name, config, seed)
        for method in methods:
            # The points along the way have a name of their own: one record is the result.
            path = f"{name}_{method}_path"
            records.rewind(path)

            def log(step: int, cost: float, path: str = path, **metrics: float) -> None:
                records.append(path, step, cost, **metrics)

            found = _search(method, task, config, seed, log)
            if found is not None:
                _judge(f"{name}_{method}", task, config, found, records)


def _search(
    method: str, task: tasks.Task, config: Config, seed: int, log: Callable[..., None]
) -> tune.Found | None:
    match method:
        case "hypergradient":
            return tune.hypergradients(task, config, log)
        case "grid":
            return tune.grid(task, config, log)
        case "scikit_learn":
            fit = peers.rival(task)
            return None if fit is None else fit(task, config)
        case _:
            sampler = {"random_search": "random", "tpe": "tpe"}[method]
            return tune.searched(sampler, task, config, seed, log)


@jax.jit
def _wrong(params: jax.Array, test: Any) -> jax.Array:
    """Share of rows that are put into a wrong class; NaN for a regression."""
    outputs, y = problem.predict(params, test["x"])[:, 0], test["y"]
    if y.dtype == jnp.bool_:
        return jnp.mean((outputs[:, 0] > 0) != y)
    if jnp.issubdtype(y.dtype, jnp.integer):
        return jnp.mean(jnp.argmax(outputs, -1) != y)
    return jnp.full((), jnp.nan)


def _judge(
    name: str, task: tasks.Task, config: Config, found: tune.Found, records: record.Records
) -> None:
    """The criterion of the exact solution at what was found, and what the test part says.

    One model is trained on the rows that a fold trains on (the first fold's, of cross-validation),
    another, ``full``, on all that is not test. Nobody pays for these solves.
    """
    tol = tasks.tolerance(task, config.judge_tolerance)
    start = jnp.asarray(found.params)
    exact, criterion = tune.evaluate(
        start, found.hparams, task.fit, task.held, tol, config.max_steps
    )
    full, full_loss = tune.evaluate(
        exact.params[:1], found.hparams, task.full, task.test, tol, config.max_steps
    )
    metrics = {
        "criterion": criterion,
        "measured": found.value,
        "test_loss": problem.data_loss(exact.params[:1], None, task.test),
        "full_test_loss": full_loss,
        "test_error": _wrong(full.params, task.test),
        "support": jnp.sum(full.params != 0),
        "seconds": found.seconds,
        "evaluations": found.evaluations,
        "hyperparameters": sum(h.size for h in found.hparams.values()),
        "unfinished": jnp.maximum(exact.result, full.result),
    }
    strengths = {
        leaf: np.ravel(np.asarray(h) - task.top)[:10].tolist() for leaf, h in found.hparams.items()
    }
    told = {key: float(value) for key, value in metrics.items()}
    records.append(name, 0, found.cost, **told, **strengths)


WITHIN = 1.01  # of the criterion that the grid found


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Each method over the grid, seed by seed, with 95 % intervals of the mean of these ratios.

    ``to_grid``: the cost at which a method first measured a criterion within 1 % of the grid's.
    """
    last = record.final(records)
    names = {name.removesuffix("_grid") for name, _ in last if name.endswith("_grid")}
    seeds = sorted({seed for _, seed in last})
    told: dict[str, Any] = {}
    for task in sorted(names):
        for method in METHODS:
            pairs = [
                (last[f"{task}_{method}", s], last[f"{task}_grid", s])
                for s in seeds
                if (f"{task}_{method}", s) in last
            ]
            if not pairs:
                continue
            ratios = {
                "cost": [mine.cost / grid.cost for mine, grid in pairs],
                **{
                    metric: [mine.metrics[metric] / grid.metrics[metric] for mine, grid in pairs]
                    for metric in ("criterion", "test_loss", "full_test_loss", "seconds")
                },
            }
            told[f"{task}_{method}_over_grid"] = {
                metric: expected.interval(values) for metric, values in ratios.items()
            }
    return told
