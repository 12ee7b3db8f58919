"""Runs `learning_rate`: schedules learned through whole runs, and through short windows."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import baselines, record
from experiments.learning_rate import free, problem, quadratic, schedules, tune
from experiments.learning_rate.config import Config

SHAPES = ("constant", "cosine", "linear")
METHODS = ("full", "full_validation", "greedy", *SHAPES, *free.METHODS)
EARLY = 3  # windows that count as early, of ten
TABLE = ("final_loss", "test_error", "early_rate", "early_step", "last_rate")


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = METHODS
) -> None:
    """All methods on one seed; a resumed run skips those that had finished."""
    records = record.Records(out, seed)
    _quadratic(config, records)
    images = problem.images(config, seed)
    for model in config.models:
        for method in methods:
            if method in SHAPES:
                _search(model, method, config, seed, images, records)
            elif method in free.METHODS:
                _free(model, method, config, seed, images, records)
            elif method == "greedy":
                for length in config.short[model]:
                    _tune(f"{model}_greedy_{length}", length, config, seed, images, records)
            else:
                _tune(f"{model}_{method}", config.steps, config, seed, images, records)


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
    runs = [go(images, jax.random.fold_in(key, offset + i)) for i in range(count)]
    means = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *runs)
    return {
        "final_loss": float(means["final_loss"]),
        "validation_loss": float(means["validation_loss"]),
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
    every = max(1, rates.shape[1] // 50)  # enough to be drawn
    return {
        "early_rate": float(rates[:, early].mean()),
        "early_step": float((rates / (1 - momenta))[:, early].mean()),
        "last_rate": float(rates[:, -1].mean()),
        "rates": rates[:, ::every],
        "momenta": momenta[:, ::every],
    }


def _search(
    model: str, shape: str, config: Config, seed: int, images: Any, records: record.Records
) -> None:
    """One rate for all layers, constant or of a shape that falls: searched by TPE at equal cost.

    Two of its trials are run anew and judged: that of the least training loss by the final loss,
    which is what the greedy and the whole-run schedules are tuned for, and that of the least
    validation loss by the test error.
    """
    method = f"{model}_{shape}"
    if _finished(records, method):
        return
    budget, cost = config.updates * tune.cost(config, config.steps), config.trial * config.steps
    ends: list[dict[str, Any]] = []

    def objective(setting: dict[str, Any]) -> float:
        schedule = schedules.shaped(shape, config.steps, setting)
        told = _replayed(model, schedule, config, seed, images, config.trial, 1000)
        ends.append({"final_loss": told["final_loss"], "schedule": schedule})
        return told["validation_loss"]

    def log(trial: baselines.Trial) -> None:
        told = {"trial_loss": ends[-1]["final_loss"], "trial_validation": trial.value}
        records.append(method, trial.number, trial.cost, **told, **trial.hparams)

    trials = baselines.search(
        objective,
        schedules.space(shape),
        budget=budget,
        cost=cost,
        sampler="tpe",
        seed=seed,
        startup=config.startup,
        log=log,
    )
    valid = baselines.best(trials)
    fast = min(ends, key=lambda end: (np.isnan(end["final_loss"]), end["final_loss"]))
    found, quickest = (
        _replayed(model, schedule, config, seed, images, config.replays, 0)
        for schedule in (ends[valid.number]["schedule"], fast["schedule"])
    )
    records.append(
        method,
        len(trials),
        budget,
        **found | {"final_loss": quickest["final_loss"], "curve": quickest["curve"]},
        **_described(fast["schedule"]),
        **valid.hparams,
    )


def _tune(
    method: str, length: int, config: Config, seed: int, images: Any, records: record.Records
) -> None:
    """Moves a schedule as often as the budget allows, then replays it."""
    model = method.partition("_")[0]
    outer = images["validation" if method.endswith("validation") else "train"]
    if _finished(records, method):
        return
    schedule = schedules.start(3, config.windows, config.start_rate, config.start_momentum)
    opt_state = tune.outer_tx(config, length).init(schedule)
    move, count = tune.move(config, model, length), tune.updates(config, length)
    for step in range(count):
        key = jax.random.fold_in(_key(seed, 2), step)
        schedule, opt_state, value = move(schedule, opt_state, images["train"], outer, key)
        metrics: dict[str, Any] = {"outer_loss": float(value), **_described(schedule)}
        if step == count - 1:
            metrics |= _replayed(model, schedule, config, seed, images, config.replays, 0)
        records.append(method, step, (step + 1) * tune.cost(config, length), **metrics)
