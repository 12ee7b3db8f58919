"""Runs `many`: one penalty per feature under priors of several strengths, and the chosen one."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.objectives import HyperPrior, choose_strength, k_folds
from experiments.common import expected, record
from experiments.many import problem
from experiments.many.config import Config

TABLE = ("test_loss", "test_error", "spread")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All tasks on one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    with jax.enable_x64(True):
        for task in config.tasks:
            _task(task, config, seed, records)


def name_of(strength: float) -> str:
    """`shared`, `free`, or `prior_1em3`."""
    if math.isinf(strength):
        return "shared"
    return f"prior_1e{round(math.log10(strength)):d}".replace("-", "m") if strength else "free"


def _task(task: str, config: Config, seed: int, records: record.Records) -> None:
    fitted, test = problem.rows(task, config, seed)
    results: dict[float, dict[str, Any]] = {}
    for strength in config.strengths:
        lam, w = problem.tuned(strength, fitted, config)
        loss, wrong = problem.judged(w, tuple(test))
        results[strength] = {
            "test_loss": float(loss),
            "test_error": float(wrong),
            "spread": float(jnp.std(lam)),
            "mean": float(jnp.mean(lam)),
        }
        records.append(f"{task}_{name_of(strength)}", 0, _cost(config, 1), **results[strength])

    def tune(prior: HyperPrior, train: np.ndarray) -> Any:
        return problem.tuned(prior.strength, fitted.at(train), config)[1]

    def score(w: Any, held: np.ndarray) -> float:
        return float(problem.judged(w, tuple(fitted.at(held)))[0])

    choice = choose_strength(
        HyperPrior(jnp.zeros(fitted.x.shape[1]), 1.0, "all"), tune, score,
        k_folds(len(fitted.y), config.splits, seed=seed), strengths=config.strengths,
    )  # fmt: skip
    runs = 1 + len(config.strengths) * config.splits
    records.append(
        f"{task}_chosen", 0, _cost(config, runs), **results[choice.strength],
        strength=name_of(choice.strength), scores=choice.means.tolist(),
    )  # fmt: skip


def _cost(config: Config, runs: int) -> float:
    """Outer steps, of all runs: each is a solve and a hypergradient on all folds."""
    return float(runs * config.steps)


def summary(records: list[record.Record]) -> dict[str, Any]:
    """The test loss of each strength over that of one shared penalty, seed by seed."""
    last = record.final(records)
    told: dict[str, Any] = {}
    tasks = sorted({name.removesuffix("_shared") for name, _ in last if name.endswith("_shared")})
    for task in tasks:
        methods = sorted({name for name, _ in last if name.startswith(f"{task}_")})
        for method in methods:
            pairs = [
                (got.metrics["test_loss"], last[f"{task}_shared", seed].metrics["test_loss"])
                for (name, seed), got in last.items()
                if name == method
            ]
            ratios = np.array([mine / shared for mine, shared in pairs])
            told[f"{method}_over_shared"] = {
                "test_loss": expected.statistics(ratios.tolist()),
                "geometric": expected.statistics([float(np.exp(np.mean(np.log(ratios))))]),
                "worse": expected.statistics([float(np.mean(ratios > 1.01))]),
            }
    return told
