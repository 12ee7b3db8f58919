"""Runs `stn_cifar`: all hyperparameters of a CNN tuned while it trains, against random search."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import baselines, protocol, record, stn
from experiments.stn_cifar import problem, train
from experiments.stn_cifar.config import Config

TABLE = ("validation_loss", "test_loss", "test_error", "cutout_holes", "cutout_length")
# Streams of random numbers: methods share the first weights, and nothing else.
STREAMS = {"delta_stn": 1, "fixed": 2, "replay": 3, "random_search": 4}


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed, each skipped if a resumed run had finished it."""
    records = record.Records(out, seed)
    parts = problem.parts(config, seed)
    params = problem.task(config).initial(seed)
    if not records.finished("delta_stn", config.points):
        _tune(config, params, parts, records)
    for method in ("fixed", "replay"):
        if not records.finished(method, config.points):
            _train(method, config, params, parts, records)
    _search(config, params, parts, records)


def _key(seed: int, method: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), STREAMS[method])


def _held_out(parts: Any) -> dict[str, Any]:
    return {"validation": parts["valid"], "test": parts["test"]}


def _row(measured: Any, i: int) -> dict[str, float]:
    return {name: float(np.asarray(value)[i]) for name, value in measured.items()}


def _tune(config: Config, params: Any, parts: Any, records: record.Records) -> None:
    """One run of Delta-STN: the network trains once, its hyperparameters move while it does."""
    hparams, scales, norms, measured, schedule = train.tuned(config)(
        params, _key(records.seed, "delta_stn"), parts["train"], _held_out(parts)
    )
    record.save_arrays(records.out, f"schedule_{records.seed}", **schedule)
    every = train.cycles(config) // config.points
    best = protocol.best_so_far(measured)
    for i in range(config.points):
        widths = {f"scale_{name}": value for name, value in _row(scales, i).items()}
        records.append(
            "delta_stn",
            i,
            train.cycle_cost(config) * every * (i + 1),
            **_row(best, i),
            **_row(norms, i),
            **_row(hparams, i),
            **widths,
            now=float(measured["validation_loss"][i]),
        )


def _train(method: str, config: Config, params: Any, parts: Any, records: record.Records) -> None:
    """A plain network at the starting values, for the whole budget; or one that follows the
    schedule which was found, for as many steps as the tuned one was trained."""
    if method == "fixed":
        steps = config.budget // config.points * config.points
        schedule = {name: jnp.asarray([x]) for name, x in stn.start(config).items()}
    else:
        steps = config.inner_steps * train.cycles(config)
        found = record.load_arrays(records.out, f"schedule_{records.seed}")
        schedule = {name: jnp.asarray(found[name]) for name in stn.names(config)}
    measured = train.trained(config, steps, config.points)(
        params, schedule, _key(records.seed, method), parts["train"], _held_out(parts)
    )
    best = protocol.best_so_far(measured)
    for i in range(config.points):
        now = {"now": float(measured["validation_loss"][i])}
        records.append(method, i, steps // config.points * (i + 1), **_row(best, i), **now)


def _search(config: Config, params: Any, parts: Any, records: record.Records) -> None:
    """Random search over all of them; each trial trains a network, and is stopped in time."""
    method = "random_search"
    steps = config.budget // config.trials
    once = train.trained(config, steps, config.stops)

    def objective(setting: dict[str, Any], number: int) -> baselines.Tried:
        schedule = {name: jnp.asarray([value], jnp.float32) for name, value in setting.items()}
        key = jax.random.fold_in(_key(records.seed, method), number)
        run = once(params, schedule, key, parts["train"], _held_out(parts))
        measured = _row(protocol.best_so_far(run), -1)
        return baselines.Tried(measured["validation_loss"], lambda: measured)

    baselines.recorded(
        objective,
        stn.distributions(config),
        records=records,
        method=method,
        trials=config.trials,
        cost=steps,
        sampler="random",
    )
