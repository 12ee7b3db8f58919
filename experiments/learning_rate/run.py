"""Runs `learning_rate`: schedules learned through whole runs, and through short windows."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import record
from experiments.learning_rate import free, problem, quadratic, schedules, tune
from experiments.learning_rate.config import Config

RATES = (0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5)
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95)
EARLY = 3  # windows that count as early, of ten
TABLE = ("final_loss", "test_error", "early_rate", "early_step", "last_rate")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed; a resumed run skips those that had finished."""
    records = record.Records(out, seed)
    _quadratic(config, records)
    images = problem.images(config, seed)
    for model in config.models:
        _grid(model, config, seed, images, records)
        for length in (config.steps, *config.short[model]):
            _tune(model, length, config, seed, images, records)
        for method in free.METHODS:
            _free(model, method, config, seed, images, records)


def name(model: str, length: int, config: Config) -> str:
    return f"{model}_full" if length == config.steps else f"{model}_greedy_{length}"


def _finished(records: record.Records, method: str) -> bool:
    """Whether the last record of a method has what only its end has; else it is forgotten."""
    done = record.read(records.out, seed=records.seed, method=method)
    if done and "final_loss" in done[-1].metrics:
        return True
    records.rewind(method)
    return False


def _quadratic(config: Config, records: record.Records) -> None:
    """Exact, and the same for every seed."""
    for method in ("quadratic_full", "quadratic_greedy", "quadratic_constant"):
        if _finished(records, method):
            continue
        if method.endswith("constant"):
            rate, losses = quadratic.best_constant()
            rates = np.full(quadratic.WINDOWS, rate)
        else:
            short = method.endswith("greedy")
            rates, losses = quadratic.learn(config.quadratic_updates, short=short)
        records.append(
            method,
            0,
            quadratic.STEPS,
            final_loss=float(losses[-1]),
            early_rate=float(np.mean(rates[:2])),
            last_rate=float(rates[-1]),
            rates=rates,
            curve=losses[::5],
        )


def _free(
    model: str, method: str, config: Config, seed: int, images: Any, records: record.Records
) -> None:
    """An optimizer without a rate to tune, in the runs in which schedules are replayed."""
    if _finished(records, f"{model}_{method}"):
        return
    go = free.replay(config, model, method)
    told = _means(go, config, seed, images, config.replays, 0)
    records.append(f"{model}_{method}", 0, config.steps, **told)


def _replayed(
    model: str, schedule: Any, config: Config, seed: int, images: Any, count: int, offset: int
) -> dict[str, Any]:
    """Means over fresh runs: other initial weights and batches than any the schedule has seen."""
    go = functools.partial(tune.replay(config, model), schedule)
    return _means(go, config, seed, images, count, offset)


def _means(
    go: Any, config: Config, seed: int, images: Any, count: int, offset: int
) -> dict[str, Any]:
    key = _key(seed, 1)
    runs = [
        go(images["train"], images["test"], jax.random.fold_in(key, offset + i))
        for i in range(count)
    ]
    means = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *runs)
    return {
        "final_loss": float(means["final_loss"]),
        "test_error": float(means["test_error"]),
        "curve": means["curve"].reshape(50 if config.steps % 50 == 0 else 10, -1).mean(1),
    }


def _key(seed: int, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), purpose)


def _described(schedule: Any) -> dict[str, Any]:
    """Rates and momenta, and the length of a step in the long run, rate / (1 - momentum)."""
    rates = np.exp(np.asarray(schedule["log_rate"]))
    momenta = np.asarray(jax.nn.sigmoid(schedule["momentum"]))
    early = slice(0, max(1, round(0.1 * EARLY * rates.shape[1])))
    return {
        "early_rate": float(rates[:, early].mean()),
        "early_step": float((rates / (1 - momenta))[:, early].mean()),
        "last_rate": float(rates[:, -1].mean()),
        "rates": rates,
        "momenta": momenta,
    }


def _grid(model: str, config: Config, seed: int, images: Any, records: record.Records) -> None:
    """One rate and one momentum for all steps and layers: the best of a grid at equal cost."""
    method = f"{model}_constant"
    if _finished(records, method):
        return
    runs = int(config.updates * tune.cost(config, config.steps) // config.steps)
    settings = [(rate, momentum) for rate in RATES for momentum in MOMENTA]
    each = max(1, runs // len(settings))
    settings = settings[:: max(1, round(len(settings) / runs))]
    best: dict[str, Any] = {"loss": np.inf}
    for i, (rate, momentum) in enumerate(settings):
        schedule = _constant(config, rate, momentum)
        measured = _replayed(model, schedule, config, seed, images, each, 1000)
        loss = measured["final_loss"]
        if loss < best["loss"]:  # false for a run that diverged to NaN
            best = {"loss": loss, "schedule": schedule}
        cost = (i + 1) * each * config.steps
        records.append(method, i, cost, loss=loss, rate=rate, momentum=momentum)
    measured = _replayed(model, best["schedule"], config, seed, images, config.replays, 0)
    records.append(method, len(settings), cost, **measured, **_described(best["schedule"]))


@functools.cache
def _constant(config: Config, rate: float, momentum: float) -> Any:
    # A momentum of exactly zero has no logit.
    return schedules.start(3, config.windows, rate, max(momentum, 1e-6))


def _tune(
    model: str, length: int, config: Config, seed: int, images: Any, records: record.Records
) -> None:
    """Moves a schedule as often as the budget allows, then replays it."""
    method = name(model, length, config)
    if _finished(records, method):
        return
    schedule = schedules.start(3, config.windows, config.start_rate, config.start_momentum)
    opt_state = tune.outer_tx(config, length).init(schedule)
    move, count = tune.move(config, model, length), tune.updates(config, length)
    for step in range(count):
        key = jax.random.fold_in(_key(seed, 2), step)
        schedule, opt_state, value = move(schedule, opt_state, images["train"], key)
        metrics: dict[str, Any] = {"outer_loss": float(value), **_described(schedule)}
        if step == count - 1:
            metrics |= _replayed(model, schedule, config, seed, images, config.replays, 0)
        records.append(method, step, (step + 1) * tune.cost(config, length), **metrics)
