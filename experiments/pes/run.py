"""Runs `pes`: the scalar system with a closed form, then learning rates tuned online."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import baselines, budget, record
from experiments.pes import problem, scalar, tune
from experiments.pes.config import Config

LOW, HIGH, POINTS = -6.0, 1.0, 12
SEARCHES = {"random_search": "random", "tpe": "tpe"}
METHODS = ("scalar_pes", "scalar_truncated_es", "none", *tune.METHODS, *SEARCHES)
TABLE = ("sum_of_losses", "final_loss", "log_rate_start", "log_rate_end", "error_in_se")


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = METHODS
) -> None:
    """Everything on one seed; a resumed run skips the methods that had finished."""
    records = record.Records(out, seed)
    for method in ("scalar_pes", "scalar_truncated_es"):
        if method in methods:
            _scalar(config, seed, records, method == "scalar_pes")
    for name in config.sets:
        train = problem.images(name, config, seed)
        if not (out / "arrays" / f"landscape_{name}.npz").exists():
            _landscape(name, config, seed, train, out)
        for method in methods:
            if method in SEARCHES:
                _search(name, method, config, seed, train, records)
            elif not method.startswith("scalar"):
                _tune(name, method, config, seed, train, records)


def _scalar(config: Config, seed: int, records: record.Records, persistent: bool) -> None:
    """Estimates after every step, beside the truth, in standard errors of the closed form."""
    method = "scalar_pes" if persistent else "scalar_truncated_es"
    if len(record.read(records.out, seed=seed, method=method)) == scalar.STEPS:
        return
    records.rewind(method)
    truth, variance = scalar.closed_form()
    key = jax.random.fold_in(jax.random.key(seed), persistent)
    means, errors = scalar.estimates(config.particles, key, persistent=persistent)
    cost = budget.hypergradient(scalar.evolution(config.particles, persistent)).total
    for t in range(scalar.STEPS):
        exact = np.sqrt(variance[t] / config.particles)
        records.append(
            method,
            t,
            cost * (t + 1),
            estimate=float(means[t]),
            truth=float(truth[t]),
            error_in_se=float(abs(means[t] - truth[t]) / exact),
            variance=float(errors[t] ** 2 * config.particles),
            variance_ratio=float(errors[t] ** 2 * config.particles / variance[t]),
        )


def _landscape(name: str, config: Config, seed: int, train: Any, out: Path) -> None:
    """Mean loss over a run for a grid of schedules: what the methods are trying to minimize."""
    axis = np.linspace(LOW, HIGH, POINTS)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2))
    losses = tune.replay(config)(grid.astype(jnp.float32), train, jax.random.key(seed))
    record.save_arrays(
        out, f"landscape_{name}", axis=axis, losses=losses.mean(1).reshape(POINTS, POINTS)
    )


def _replayed(schedule: Any, config: Config, seed: int, train: Any) -> dict[str, Any]:
    """Of fresh runs: other initial weights and batches than those the schedule was tuned on."""
    keys = [jax.random.fold_in(jax.random.key(seed), 1000 + i) for i in range(config.replays)]
    curves = np.stack([tune.replay(config)(schedule[None], train, key)[0] for key in keys])
    return {
        "sum_of_losses": float(curves.sum(1).mean()),
        "final_loss": float(curves[:, -1].mean()),
        "curve": curves.mean(0),
    }


def _tune(
    name: str, method: str, config: Config, seed: int, train: Any, records: record.Records
) -> None:
    """Tunes the schedule with the common budget, and replays what came out."""
    title = f"{name}_{method}"
    done = record.read(records.out, seed=seed, method=title)
    if done and "sum_of_losses" in done[-1].metrics:
        return
    records.rewind(title)
    if method == "none":
        schedule = jnp.asarray(config.start, jnp.float32)
        records.append(
            title, 0, 0, **_described(schedule), **_replayed(schedule, config, seed, train)
        )
        return
    key = jax.random.key(seed)
    params = problem.initial(train[0].shape[1], config.hidden, jax.random.fold_in(key, 1))
    carry = tune.start(method, config, params)
    total, made = tune.updates(method, config), 0
    for i in range(config.records):
        moves = total * (i + 1) // config.records - made  # of two lengths, if they do not divide
        carry = tune.tuner(method, config)(carry, train, jax.random.fold_in(key, 10 + i), moves)
        made += moves
        metrics = _described(carry[0])
        if i == config.records - 1:
            metrics |= _replayed(carry[0], config, seed, train)
        records.append(title, made, made * tune.cost(method, config), **metrics)


def trials(config: Config) -> int:
    """Whole runs that cost what the moves of PES do."""
    return int(config.updates * tune.cost("pes", config) // config.steps)


def _search(
    name: str, method: str, config: Config, seed: int, train: Any, records: record.Records
) -> None:
    """Random search or TPE over the two numbers; each trial is one fresh run."""
    key = jax.random.fold_in(jax.random.key(seed), 2)

    def objective(setting: dict[str, float], number: int) -> baselines.Tried:
        schedule = jnp.asarray([setting["start"], setting["end"]], jnp.float32)
        losses = tune.replay(config)(schedule[None], train, jax.random.fold_in(key, number))
        return baselines.Tried(
            float(np.sum(losses[0])), lambda: _replayed(schedule, config, seed, train)
        )

    baselines.recorded(
        objective,
        {"start": (LOW, HIGH), "end": (LOW, HIGH)},
        records=records,
        method=f"{name}_{method}",
        trials=trials(config),
        cost=config.steps,
        sampler=SEARCHES[method],
        prefix="log_rate_",
    )


def _described(schedule: Any) -> dict[str, Any]:
    return {"log_rate_start": float(schedule[0]), "log_rate_end": float(schedule[1])}
