"""Runs `hypernet`: learnt best responses against exact ones, and a decay for every weight."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import baselines, record
from experiments.hypernet import decays, problem, training
from experiments.hypernet.config import Config, Curve, Decays

CURVES = ("global", "local")
LOCAL = ("local_per_weight", "local_shared")
SEARCHES = ("random_shared", "tpe_shared", "random_per_weight")
POINTS = 10  # measurements along the training of a curve
NEAR, FAR = 0.3, 1.5  # distances in log decay within and beyond which gaps are averaged
DENSE = 241  # log decays of the exact curve
TABLE = ("found", "optimum", "error", "near_gap", "far_gap", "validation_loss", "test_loss")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """Both parts on one seed; a resumed run skips the methods that had finished."""
    records = record.Records(out, seed)
    for curve in config.curves:
        methods = [f"{curve.data}_{method}" for method in CURVES]
        if any(len(record.read(out, seed=seed, method=m)) != POINTS for m in methods):
            for method in methods:
                records.rewind(method)
            _curves(curve, records, out)
    _decays(config.decays, records, out)


def _curves(config: Curve, records: record.Records, out: Path) -> None:
    """Learnt curves of the global and of the local hypernetwork beside the exact one."""
    train, valid = problem.images(config, records.seed)
    lam, dense = (np.linspace(config.low, config.high, n) for n in (config.grid, DENSE))
    exact = problem.exact_curve(train, valid, lam)
    fine = problem.exact_curve(train, valid, dense)
    best = problem.lowest(dense, fine)
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    kept: dict[str, Any] = {"lam": lam, "exact": exact}
    for method in CURVES:
        runner = training.train(method, config, POINTS)
        path, curves, phi = runner(jax.random.key(records.seed), train, valid)
        path, curves = np.asarray(path, np.float64), np.asarray(curves, np.float64)
        kept[method], kept[f"{method}_path"] = curves, path
        each = config.steps // POINTS * training.step_cost(method, config, len(valid[1]))
        for i in range(POINTS):
            learnt = problem.lowest(lam, curves[i])
            extra: dict[str, Any] = {}
            if i == POINTS - 1 and method == "global":
                found = float(training.search(config)(phi, valid))
                extra["lowest"] = learnt
            else:
                found = learnt if method == "global" else float(path[i])
            gap = np.abs(curves[i] - exact)
            away = np.abs(lam - found)
            at = problem.exact_curve(train, valid, [found])[0]
            records.append(
                f"{config.data}_{method}",
                i,
                each * (i + 1) + (config.search_steps if "lowest" in extra else 0),
                found=found,
                optimum=best,
                error=abs(found - best),
                excess=float(at - fine.min()),
                near_gap=float(gap[away <= NEAR].mean()),
                far_gap=float(gap[away >= FAR].mean()),
                worst_gap=float(gap.max()),
                **extra,
            )
    record.save_arrays(out, f"{config.data}_{records.seed}", **kept)


def _decays(config: Decays, records: record.Records, out: Path) -> None:
    """Local training of one decay or of one per weight, and searches at the same cost."""
    parts = decays.images(config, records.seed)
    for method in LOCAL:
        if len(record.read(out, seed=records.seed, method=method)) == config.points:
            continue
        records.rewind(method)
        rows, phi, lam = decays.local(method, config)(jax.random.key(records.seed), *parts)
        best, ends = np.inf, {}
        if method == "local_per_weight":
            cosine, left = decays.likeness(config)(phi, lam, *parts[:2])
            ends = {"cosine": float(cosine), "stationarity": float(left)}
        for i, (now, test, mean, spread) in enumerate(np.asarray(rows, np.float64)):
            best = min(best, now)
            records.append(
                method,
                i,
                config.budget * (i + 1) / config.points,
                validation_loss=now,
                test_loss=test,
                best_validation=best,
                mean_decay=mean,
                decay_spread=spread,
                **(ends if i == config.points - 1 else {}),
            )
    for method in SEARCHES:
        done = len(record.read(out, seed=records.seed, method=method))
        if done != config.trials:
            records.rewind(method)
            _search(method, config, records, parts)


def _search(method: str, config: Decays, records: record.Records, parts: Any) -> None:
    """Trials of equal parts of the budget; all of them see the same minibatches."""
    key, pixels = jax.random.key(records.seed), parts[0][0].shape[1]
    rng = np.random.default_rng(records.seed)
    trial = decays.plain(config)

    def objective(setting: dict[str, Any], number: int) -> baselines.Tried:
        if method == "random_per_weight":
            lam = decays.random_decays(config, pixels, rng)
        else:
            lam = jnp.float32(setting["lam"])
        valid, test = (float(x) for x in trial(lam, key, *parts))
        return baselines.Tried(valid, lambda: {"validation_loss": valid, "test_loss": test})

    baselines.recorded(
        objective,
        {"lam": (config.low, config.high)},
        records=records,
        method=method,
        trials=config.trials,
        cost=config.budget / config.trials,
        sampler="tpe" if method.startswith("tpe") else "random",
    )
