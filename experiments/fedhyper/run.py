"""Runs `fedhyper`: schedulers of federated rates against FedAvg, from a poor rate and the best."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import expected, record
from experiments.fedhyper import problem
from experiments.fedhyper.config import Config

TABLE = ("rounds_to_target", "test_accuracy", "validation_accuracy")
POINTS = 50


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods from both rates on one seed; a resumed run skips what had finished."""
    records = record.Records(out, seed)
    parts = problem.load(config, seed)
    for rate in ("poor", "best"):
        for method in problem.METHODS:
            full = f"{method}_{rate}"
            done = record.read(out, seed=seed, method=full)
            if any("test_accuracy" in r.metrics for r in done):
                continue
            records.rewind(full)
            weights, seen = measure(method, config, parts, getattr(config, rate), seed)
            accuracies, factors, sent = (np.asarray(x) for x in seen)
            for k in np.unique(np.linspace(1, config.rounds, POINTS).astype(int)):
                records.append(
                    full,
                    int(k),
                    int(k) * config.local_steps * config.selected,
                    accuracy=float(accuracies[k - 1]),
                    factor=float(factors[k - 1]),
                    rate=float(sent[k - 1]),
                )
            records.append(
                full,
                config.rounds + 1,
                config.rounds * config.local_steps * config.selected,
                rounds_to_target=rounds_to(accuracies, config.target),
                test_accuracy=float(problem.accuracy(weights, parts.test)),
                validation_accuracy=float(accuracies.max()),
                factor_min=float(factors.min()),
                factor_max=float(factors.max()),
                rate_min=float(sent.min()),
                rate_max=float(sent.max()),
            )


def rounds_to(accuracies: np.ndarray, target: float) -> int:
    """The first round after which the target is met; one more than all if it never is."""
    met = np.flatnonzero(accuracies >= target)
    return int(met[0]) + 1 if met.size else len(accuracies) + 1


def measure(method: str, config: Config, parts: problem.Parts, rate: float, seed: int) -> Any:
    """One run: the weights of the best round by validation, and what was seen of all."""
    # Equal keys for all methods: the same clients are selected, and see the same batches.
    return _compiled(method, config)(parts, np.float32(rate), jax.random.key(seed))


@functools.cache
def _compiled(method: str, config: Config) -> Any:
    return jax.jit(lambda parts, rate, key: problem.whole_run(method, config, parts, rate, key))


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Each scheduler against FedAvg, seed by seed, with 95 % intervals of the mean."""
    return {
        f"{method}_against_fedavg": {
            "rounds_saved": expected.paired(
                records, "rounds_to_target", "fedavg_poor", f"{method}_poor", ratio=True
            ),
            "accuracy_lost": expected.paired(
                records, "test_accuracy", "fedavg_best", f"{method}_best"
            ),
        }
        for method in problem.METHODS[1:]
    }
