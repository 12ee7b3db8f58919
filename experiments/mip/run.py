"""Runs `mip`: hypernetworks with and without its two parts, over a grid of learning rates."""

from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import expected, record
from experiments.mip import networks, tasks
from experiments.mip.config import Config, Task

OPTIMIZERS = ("sgd", "adam")
SIDE_BY_SIDE = 2  # programs
TAIL = 0.1  # part of a run whose mean is the final loss: the loss of one point is noisy
WINDOW = 5  # points of the running mean that is compared with a final loss
LEARNT = 0.95  # of the loss of zero weights: a run that ends above it has not learnt
NEAR = 1.25  # times the plain one's final loss: above the floor on which all runs end
TABLE = ("best_rate", "final_loss", "part_to_plain", "part_near", "never", "failed")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All tasks, optimizers and variants on one seed; a resumed run skips those that finished.

    The products of these small networks keep one core busy, so two programs run side by side;
    records are in the order of the config all the same.
    """
    records = record.Records(out, seed)
    key = jax.random.key(seed)
    with futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        started = []
        for task in config.tasks:
            data = tasks.images(task, seed)
            for optimizer in OPTIMIZERS:
                rates = task.adam_rates if optimizer == "adam" else task.sgd_rates
                for variant in task.variants if rates else ():
                    method = f"{task.name}_{variant}_{optimizer}"
                    if len(record.read(out, seed=seed, method=method)) == task.points:
                        continue
                    losses = pool.submit(
                        _losses, variant, optimizer, task, config, rates, key, data
                    )
                    started.append((method, losses, rates, task, data[0].shape[1]))
        for method, losses, rates, task, pixels in started:
            records.rewind(method)
            _record(records, method, losses.result(), rates, task, pixels)


def _losses(
    variant: str, optimizer: str, task: Task, config: Config, rates: Sequence[float], key: Any,
    data: Any,
) -> np.ndarray:  # fmt: skip
    """Of one program, ``(rates, points)``."""
    runner = networks.train(variant, optimizer, task, config)
    return np.asarray(runner(jnp.asarray(rates), key, data), np.float64)


def _record(
    records: record.Records,
    method: str,
    losses: np.ndarray,
    rates: Sequence[float],
    task: Task,
    pixels: int,
) -> None:
    """One record a point, with the losses of all rates; the last one has the sizes as well."""
    variant = method.split("_")[1]
    # Towards zero from the largest input: the range on which proportionality is a straight line.
    lam = jnp.linspace(0.0, tasks.input_range(task)[1], 21)
    measured = networks.sizes(variant, task, pixels, jax.random.key(records.seed), lam)
    norm, predicted = (np.asarray(x, np.float64) for x in measured)
    every, last = task.steps // losses.shape[1], losses.shape[1] - 1
    for i in range(last + 1):
        extra: dict[str, Any] = {}
        if i == last:
            extra = {
                "input_variation": float(norm.std() / norm.mean()),
                "homogeneity": residual(norm, predicted),
                "predicted_norms": predicted,
                "zero_loss": tasks.loss_of_zero(task),
            }
        records.append(
            method,
            i,
            networks.step_cost(task) * every * (i + 1),
            losses=losses[:, i],
            rates=rates,
            **extra,
        )


def residual(norm: np.ndarray, predicted: np.ndarray) -> float:
    """How far predicted norms are from a line through the origin in the norm of the input."""
    slope = norm @ predicted / (norm @ norm)
    return float(np.linalg.norm(predicted - slope * norm) / np.linalg.norm(predicted))


def curves(records: Sequence[record.Record], method: str) -> np.ndarray:
    """Losses along the runs of a method, (seeds, rates, points)."""
    chosen: dict[int, list[Any]] = {}
    for r in records:
        if r.method == method:
            chosen.setdefault(r.seed, []).append(r.metrics["losses"])
    return np.array([chosen[seed] for seed in sorted(chosen)]).swapaxes(1, 2)


def final_losses(losses: np.ndarray) -> np.ndarray:
    """The mean over the end of each run, infinite where it is not finite."""
    count = max(1, round(TAIL * losses.shape[-1]))
    with np.errstate(invalid="ignore", over="ignore"):
        final = losses[..., -count:].mean(axis=-1)
    return np.where(np.isfinite(final), final, np.inf)


def best_rate(losses: np.ndarray) -> int:
    """The index of the rate whose final loss has the least median over seeds."""
    return int(np.median(final_losses(losses), axis=0).argmin())


def part_until(losses: np.ndarray, target: float) -> float:
    """Part of a run after which its running mean is at most ``target``; infinite if it never is.

    Points before the first whole window count with the mean of what there is.
    """
    means = [losses[max(0, i + 1 - WINDOW) : i + 1].mean() for i in range(len(losses))]
    below = np.flatnonzero(np.array(means) <= target)
    return float((below[0] + 1) / len(losses)) if below.size else float("inf")


def summary(records: list[record.Record]) -> dict[str, Any]:
    """What is judged: each method at its best rate, against the plain one at its own."""
    result: dict[str, Any] = {}
    last = {r.method: r for r in records}
    for method, end in last.items():
        task, _, optimizer = method.split("_")
        losses, plain = curves(records, method), curves(records, f"{task}_plain_{optimizer}")
        best, target = best_rate(losses), final_losses(plain)[:, best_rate(plain)]
        final, steps = final_losses(losses), [r.cost for r in records if r.method == method]
        # Against the plain one whose heads are scaled: is it the size alone that was missing?
        scaled = f"{task}_he_{optimizer}"
        over_he: list[float] = []
        if scaled in last:
            he = curves(records, scaled)
            goals = final_losses(he)[:, best_rate(he)]
            over_he = [
                min(part_until(r[best], goal), 1.0) for r, goal in zip(losses, goals, strict=True)
            ]
        parts = [part_until(r[best], goal) for r, goal in zip(losses, target, strict=True)]
        near = [part_until(r[best], NEAR * goal) for r, goal in zip(losses, target, strict=True)]
        # One for never: a run that was too short does not count as infinitely long.
        capped = [min(part, 1.0) for part in parts]
        failed = np.sum(~(final < LEARNT * end.metrics["zero_loss"]), axis=1)
        ends = [r for r in records if r.method == method and "homogeneity" in r.metrics]
        ends.sort(key=lambda r: r.seed)
        columns = {
            "cost": [max(steps)] * len(losses),
            "best_rate": [end.metrics["rates"][best]] * len(losses),
            "final_loss": final[:, best],
            "part_to_plain": capped,
            "part_near": [min(part, 1.0) for part in near],
            **({"part_to_he": over_he} if over_he else {}),
            "never": [float(np.isinf(part)) for part in parts],
            "failed": failed,
            "input_variation": [r.metrics["input_variation"] for r in ends],
            "homogeneity": [r.metrics["homogeneity"] for r in ends],
        }
        seeds = sorted({r.seed for r in records if r.method == method})
        result[method] = {
            name: expected.statistics(dict(zip(seeds, map(float, values), strict=True)))
            for name, values in columns.items()
        }
    return result
