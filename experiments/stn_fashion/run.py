"""Runs `stn_fashion`: fifteen hyperparameters tuned while a CNN trains, against random search.

Delta-STN and STN are compared on occluded images, from several first rates of dropout.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import baselines, protocol, record, stn, stn_cnn
from experiments.stn_fashion import problem, train
from experiments.stn_fashion.config import Config

TUNED = ("delta_stn", "delta_stn_clean", "small_scale", "no_response")
COMPARED = ("delta", "stn")  # from several starts
SEARCHES = ("random_search", "random_search_low")
LOW = 1 / 3  # part of every range but those of cutout that the second search draws from
TABLE = ("validation_loss", "test_loss", "test_error", "area", "holes", "length", "loss_spread")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed, each skipped if a resumed run had finished it."""
    records = record.Records(out, seed)
    parts = problem.sets(config, seed)
    params = problem.task(config).initial(seed)
    for index, method in enumerate(TUNED):
        if not records.finished(method, config.points):
            _tune(method, index, config, params, parts, records)
    for first, method in enumerate(COMPARED):
        for index, rate in enumerate(config.starts):
            name, stream = from_start(method, index), 30 + 10 * first + index
            if not records.finished(name, config.points):
                _tune(name, stream, config, params, parts, records, rate)
        if config.starts and not records.finished(f"{method}_starts", config.points):
            _starts(method, config, records)
    _examples(config, parts, records)
    if not records.finished("fixed", config.points):
        _fixed(config, params, parts, records)
    for index, method in enumerate(SEARCHES):
        _search(method, index, config, params, parts, records)


def from_start(method: str, index: int) -> str:
    """The name of a method's run from the start of that index."""
    return f"{method}_from_{index}"


def _key(seed: int, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), stream)


def _held_out(parts: Any, method: str) -> dict[str, Any]:
    """Validation and test part of a method: occluded, except in the control on clean images."""
    suffix = "" if method.endswith("clean") else "_occluded"
    return {"validation": parts[f"valid{suffix}"], "test": parts[f"test{suffix}"]}


def _row(measured: Any, i: int) -> dict[str, float]:
    return {name: float(np.asarray(value)[i]) for name, value in measured.items()}


def _area(config: Config, hparams: dict[str, float], scales: dict[str, float]) -> float:
    """Mean pixels (holes times length squared) over the numbers that training really draws."""
    noise = np.random.default_rng(0).normal(size=(2, 2000))
    drawn = []
    for name, eps in zip(stn.CUTOUT, noise, strict=True):
        bound = stn.space(config).bounds[name]
        raw = bound.unconstrain(jnp.float32(hparams[name]))
        value = bound.constrain(raw + jnp.asarray(scales[name] * eps, jnp.float32))
        drawn.append(np.asarray(bound.round(value), np.float64))
    return float(np.mean(drawn[0] * drawn[1] ** 2))


def _tune(
    method: str,
    index: int,
    config: Config,
    params: Any,
    parts: Any,
    records: record.Records,
    rate: float | None = None,
) -> None:
    """One run: the network trains once, and its hyperparameters move while it does."""
    centred, compared = not method.startswith("stn"), rate is not None
    mode = train.Mode(
        scale=config.small_scale if method == "small_scale" else config.scale,
        moves=float(method != "small_scale"),
        learns=float(method != "no_response"),
    )
    key = _key(records.seed, index)
    start = problem.start(config, rate)
    hparams, scales, norms, measured = train.tuned(config, centred, compared)(
        params, start, mode, key, parts["train"], _held_out(parts, method)
    )
    every = train.cycles(config, centred) // config.points
    first = {name: float(value) for name, value in start.items()}
    best = protocol.best_so_far(measured)
    before = _area(config, first, dict.fromkeys(stn.names(config), mode.scale))
    for i in range(config.points):
        now, widths = _row(hparams, i), _row(scales, i)
        moved = {name: abs(now[name] - first[name]) for name in stn.names(config)}
        records.append(
            method,
            i,
            train.cycle_cost(config, centred) * every * (i + 1),
            **_row(best, i),
            now=_row(measured, i)["validation_loss"],
            **_row(norms, i),
            **now,
            **{f"scale_{name}": widths[name] for name in stn.names(config)},
            **{f"moved_{name}": moved[name] for name in stn.names(config)},
            mean_dropout=float(np.mean([now[name] for name in stn.dropouts(config)])),
            moved_dropout=float(np.mean([moved[name] for name in stn.dropouts(config)])),
            holes=now["cutout_holes"],
            length=now["cutout_length"],
            area=_area(config, now, widths),
            area_growth=_area(config, now, widths) / before,
        )


def _starts(method: str, config: Config, records: record.Records) -> None:
    """What a method reaches on average over its starts, and how much that depends on them."""
    runs = [
        record.read(records.out, seed=records.seed, method=from_start(method, index))
        for index in range(len(config.starts))
    ]
    first = np.ptp(config.starts)
    for i, points in enumerate(zip(*runs, strict=True)):
        metrics = [point.metrics for point in points]
        losses = [m["validation_loss"] for m in metrics]
        rates = {name: [m[name] for m in metrics] for name in stn.dropouts(config)}
        means = {
            name: float(np.mean([m[name] for m in metrics]))
            for name in ("validation_loss", "validation_error", "test_loss", "test_error")
        }
        records.append(
            f"{method}_starts",
            i,
            points[0].cost,
            **means,
            losses=losses,
            loss_spread=float(np.ptp(losses)),
            rate_spread=float(np.mean([np.ptp(values) / first for values in rates.values()])),
        )


def _examples(config: Config, parts: Any, records: record.Records) -> None:
    """Saves a few images: to validate on, and to train on before and after tuning."""
    few, key = slice(0, 8), _key(records.seed, 20)
    start = problem.start(config)
    settings = {"start": start}
    for name, method in (("tuned", "delta_stn"), ("tuned_clean", "delta_stn_clean")):
        (*_, last) = record.read(records.out, seed=records.seed, method=method)
        settings[name] = {name: jnp.float32(last.metrics[name]) for name in start}
    augment = jax.jit(problem.task(config).augment)
    images = {"validation": np.asarray(parts["valid_occluded"]["x"][few])}
    for name, hparams in settings.items():
        made = augment(
            key, stn_cnn.coloured(parts["train"]["x"][few]), stn.space(config).round(hparams)
        )
        images[name] = problem.shown(np.asarray(made))
    record.save_arrays(records.out, f"examples_{records.seed}", **images)


def _fixed(config: Config, params: Any, parts: Any, records: record.Records) -> None:
    """One network at the starting values, trained with the whole budget."""
    steps = config.budget // config.points * config.points
    measured = _trained(
        config, steps, config.points, params, problem.start(config), 10, parts, records
    )
    best = protocol.best_so_far(measured)
    for i in range(config.points):
        now = {"now": float(measured["validation_loss"][i])}
        records.append("fixed", i, steps // config.points * (i + 1), **_row(best, i), **now)


def _trained(
    config: Config, steps: int, points: int, params: Any, hparams: Any, stream: int, parts: Any,
    records: record.Records,
) -> Any:  # fmt: skip
    """What plain training at fixed values measures along the way."""
    values = jax.tree.map(lambda x: jnp.asarray([x], jnp.float32), hparams)
    key, held_out = _key(records.seed, stream), _held_out(parts, "fixed")
    return train.trained(config, steps, points)(params, values, key, parts["train"], held_out)


def _search(
    method: str, index: int, config: Config, params: Any, parts: Any, records: record.Records
) -> None:
    """Random search over all fifteen; each trial trains a network, and is stopped in time."""
    steps = config.budget // config.trials // config.stops * config.stops

    def objective(setting: dict[str, Any], number: int) -> baselines.Tried:
        stream = 100 * (1 + index) + number
        run = _trained(config, steps, config.stops, params, setting, stream, parts, records)
        measured = _row(protocol.best_so_far(run), -1)
        return baselines.Tried(measured["validation_loss"], lambda: measured)

    baselines.recorded(
        objective,
        stn.distributions(config, LOW if method.endswith("low") else 1.0),
        records=records,
        method=method,
        trials=config.trials,
        cost=steps,
        sampler="random",
    )
