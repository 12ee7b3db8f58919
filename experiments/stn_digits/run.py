"""Runs `stn_digits`: three dropout rates, tuned while the network trains, against searches."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from experiments.common import baselines, protocol, record
from experiments.stn_digits import problem, train
from experiments.stn_digits.config import Config

TUNED = ("delta_stn", "stn")
LOW = (train.LINEARIZED, "stn_low")  # from the papers' start alone
FORCED = ("sgd", "small_scale", "no_response")
BLACK_BOX = {"random_search": "random", "tpe": "tpe"}
TABLE = ("validation_loss", "test_loss", "test_error", "spread", "loss_spread")
# Streams of random numbers: methods share the first weights, and nothing else.
STREAMS = {"delta_stn": 1, "stn": 2, "grid": 3, "search": 4, "replay": 5, "forced": 6, "low": 7}


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed, each skipped if a resumed run had finished it."""
    records = record.Records(out, seed)
    sets = problem.batches(config, seed)
    params = problem.initial(config.hidden, seed)
    for method in LOW:
        if not records.finished(method, config.points):
            _low(method, config, params, sets, records)
    wide = seed < config.wide_seeds
    for method in TUNED if wide else ():
        if not records.finished(method, config.points):
            _tune(method, config, params, sets, records)
        if not records.finished(f"{method}_replay", config.points):
            _replay(method, config, params, sets, records)
    if not records.finished("grid", config.points):
        _grid(config, params, sets, records)
    for method in BLACK_BOX:
        _search(method, config, params, sets, records)
    if wide and not all([records.finished(method, config.points) for method in FORCED]):
        _forced(config, params, sets, records)


def _keys(seed: int, stream: str, count: int) -> jax.Array:
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), count)


def _row(best: dict[str, np.ndarray], i: int) -> dict[str, float]:
    """Mean over parallel runs of every measurement at one point."""
    return {name: float(np.mean(value[:, i])) for name, value in best.items()}


def _low(method: str, config: Config, params: Any, sets: Any, records: record.Records) -> None:
    """One run from the papers' start; both methods see the same batches and masks."""
    one = jnp.ones(1)
    infos, measured = train.tuned(method, config)(
        params,
        config.first * one,
        train.Mode(config.scale * one, one, one),
        _keys(records.seed, "low", 1),
        sets,
    )
    best, every = protocol.best_so_far(measured), train.cycles(method, config) // config.points
    rates = {p: np.asarray(infos[0][p]).reshape(-1) for p in problem.PLACES}
    for i in range(config.points):
        now = {f"rate_{p}": float(rates[p][every * (i + 1) - 1]) for p in rates}
        cost = train.cycle_cost(method, config) * every * (i + 1)
        records.append(method, i, cost, **_row(best, i), **now)


def _tune(method: str, config: Config, params: Any, sets: Any, records: record.Records) -> None:
    """A run from each start; losses are means over them, and what differs is recorded too."""
    starts = jnp.asarray(config.starts)
    keys = _keys(records.seed, method, len(starts))
    free = jnp.ones(len(starts))
    infos, measured = train.tuned(method, config)(
        params, starts, train.Mode(config.scale * free, free, free), keys, sets
    )
    hparams, scales = (
        {p: np.asarray(tree[p]).reshape(len(starts), -1) for p in problem.PLACES}
        for tree in infos[:2]
    )
    record.save_arrays(records.out, f"{method}_{records.seed}", **hparams)
    best = protocol.best_so_far(measured)
    count = train.cycles(method, config)
    every = count // config.points
    first = config.starts.index(config.first)
    for i in range(config.points):
        last = every * (i + 1) - 1
        spreads = [float(np.ptp(hparams[p][:, last]) / np.ptp(config.starts)) for p in hparams]
        losses = best["validation_loss"][:, i]
        records.append(
            method,
            i,
            train.cycle_cost(method, config) * every * (i + 1),
            **_row(best, i),
            first_start_loss=float(losses[first]),
            losses=losses,
            loss_spread=float(np.ptp(losses)),
            moved=_distance([hparams[p][first, last] for p in hparams], config.first),
            spread=max(spreads),
            mean_spread=float(np.mean(spreads)),
            **{f"rate_{p}": hparams[p][:, last] for p in hparams},
            **{f"mean_rate_{p}": float(hparams[p][:, last].mean()) for p in hparams},
            **{f"scale_{p}": float(scales[p][:, last].mean()) for p in hparams},
        )


def _replay(method: str, config: Config, params: Any, sets: Any, records: record.Records) -> None:
    """Plain networks that follow the schedules which the runs from each start found."""
    found = record.load_arrays(records.out, f"{method}_{records.seed}")
    count = train.cycles(method, config)
    steps = jnp.broadcast_to(train.TRAINING * jnp.arange(count), (len(config.starts), count))
    schedules = bilevel.HyperSchedule(steps, {p: jnp.asarray(found[p]) for p in problem.PLACES})
    follow = train.trained(config, train.TRAINING * count, config.points)
    keys = _keys(records.seed, "replay", len(config.starts))
    best = protocol.best_so_far(follow(params, schedules, keys, sets))
    every = train.TRAINING * count // config.points
    for i in range(config.points):
        losses = best["validation_loss"][:, i]
        records.append(f"{method}_replay", i, every * (i + 1), **_row(best, i), losses=losses)


def _constant(rates: Any) -> bilevel.HyperSchedule:
    """A schedule without change from each setting, leaves of shape ``(n,)``."""
    values = {p: jnp.asarray(rates[p], jnp.float32)[:, None] for p in problem.PLACES}
    count = len(values[problem.PLACES[0]])
    return bilevel.HyperSchedule(jnp.zeros((count, 1), jnp.int32), values)


def _grid(config: Config, params: Any, sets: Any, records: record.Records) -> None:
    """Fixed rates, each trained for as many steps as a run of Delta-STN: more than its budget."""
    steps = train.TRAINING * train.cycles("delta_stn", config)
    grid = np.asarray(config.grid)
    keys = _keys(records.seed, "grid", len(grid))
    fixed = protocol.best_so_far(
        train.trained(config, steps, config.points)(
            params, _constant({p: grid for p in problem.PLACES}), keys, sets
        )
    )
    chosen = int(np.argmin(fixed["validation_loss"][:, -1]))
    for i in range(config.points):
        one = {name: float(value[chosen, i]) for name, value in fixed.items()}
        losses = fixed["validation_loss"][:, i]
        cost = steps // config.points * (i + 1) * len(grid)
        without = float(losses[list(config.grid).index(0.0)])
        records.append(
            "grid", i, cost, **one, losses=losses, no_dropout=without, rate=float(grid[chosen])
        )


def _search(method: str, config: Config, params: Any, sets: Any, records: record.Records) -> None:
    """Random search or TPE over the three rates; each trial trains a network to its end."""
    steps = config.budget // config.trials
    trial_run = train.trained(config, steps, config.points)
    keys = _keys(records.seed, "search", config.trials)

    def objective(setting: dict[str, Any], number: int) -> baselines.Tried:
        schedule = _constant({p: [setting[p]] for p in problem.PLACES})
        key = keys[number : number + 1]
        measured = _row(protocol.best_so_far(trial_run(params, schedule, key, sets)), -1)
        return baselines.Tried(measured["validation_loss"], lambda: measured)

    baselines.recorded(
        objective,
        {p: (0.0, config.high) for p in problem.PLACES},
        records=records,
        method=method,
        trials=config.trials,
        cost=steps,
        sampler=BLACK_BOX[method],
        prefix="rate_",
    )


def _forced(config: Config, params: Any, sets: Any, records: record.Records) -> None:
    """Delta-STN by SGD: free, with a width too small, and with a response held at zero."""
    modes = train.Mode(
        scale=jnp.asarray([config.scale, config.small_scale, config.scale]),
        moves=jnp.asarray([1.0, 0.0, 1.0]),
        learns=jnp.asarray([1.0, 1.0, 0.0]),
    )
    starts, keys = jnp.full((3,), config.first), _keys(records.seed, "forced", 3)
    go = train.tuned("delta_stn", config, normalised=False)
    infos, measured = go(params, starts, modes, keys, sets)
    every = train.cycles("delta_stn", config) // config.points
    rates = {p: np.asarray(infos[0][p]).reshape(3, -1) for p in problem.PLACES}
    best = protocol.best_so_far(measured)
    for k, method in enumerate(FORCED):
        records.rewind(method)
        for i in range(config.points):
            last = every * (i + 1) - 1
            moved, by_free = (
                _distance([rates[p][j, last] for p in rates], config.first) for j in (k, 0)
            )
            records.append(
                method,
                i,
                train.cycle_cost("delta_stn", config) * every * (i + 1),
                **{name: float(value[k, i]) for name, value in best.items()},
                moved=moved,
                relative=moved / by_free if by_free else 0.0,
                **{f"rate_{p}": float(rates[p][k, last]) for p in rates},
            )


def _distance(rates: Any, start: float) -> float:
    """Largest move of a rate from where it started."""
    return float(np.max(np.abs(np.asarray(list(rates)) - np.float32(start))))
