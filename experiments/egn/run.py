"""Runs `egn`: exact Gauss–Newton steps beside first-order ones and L-BFGS, at equal time."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from experiments.common import expected, record
from experiments.egn import problem
from experiments.egn.config import Config, Task

POINTS = 20


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All tasks and optimizers; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    for task in config.tasks:
        for method in config.methods:
            losses, told = trained(method, task, config, seed, task.settings[method])
            name, epochs = f"{task.name}_{method}", task.epochs[method]
            each = len(losses) // epochs
            edges = np.unique(np.geomspace(1, len(losses), POINTS + 1).astype(int))
            for first, last in zip(edges[:-1], edges[1:], strict=True):
                seconds = last / len(losses) * told["seconds"]
                mean = losses[first:last].mean()
                records.append(f"{name}_path", last, seconds, loss=mean, epoch=last / each)
            told["epochs_to_target"] = epochs_to(config.target, losses, each)
            records.append(name, epochs, told["seconds"], **told)


def epochs_to(target: float, losses: np.ndarray, each: int) -> float:
    """Epochs after which the mean loss of ten batches is below the target; infinite if never."""
    width = min(10, each)
    means = np.convolve(losses, np.ones(width) / width, "valid")
    below = np.flatnonzero(means <= target)
    return float((below[0] + width) / each if below.size else np.inf)


def trained(
    method: str, task: Task, config: Config, seed: int, settings: dict[str, Any]
) -> tuple[np.ndarray, dict[str, float]]:
    """The loss that each step saw; losses at the end, and the seconds that training took."""
    train, test = problem.rows(task, seed)
    w = problem.params(task, train.x.shape[1], seed)
    keys = jax.random.split(jax.random.key(seed), task.epochs[method])
    begin, epoch = _trainer(method, task, config, tuple(settings.items()))
    state = jax.block_until_ready(begin(w))
    jax.block_until_ready(epoch(state, keys[0], train))  # compiles
    losses, times = [], []
    for key in keys:
        begun = time.perf_counter()
        state, loss = jax.block_until_ready(epoch(state, key, train))
        times.append(time.perf_counter() - begun)
        losses.append(loss)
    losses = np.concatenate(jax.device_get(losses))
    # The median does not see the epochs in which something else had the machine.
    seconds = len(times) * float(np.median(times))
    whole = jax.jit(problem.loss(task))
    told = {
        "train_loss": float(whole(state.params, None, train)),
        "test_loss": float(whole(state.params, None, test)),
        "seconds": seconds,
    }
    if task.name == "digits":
        right = jnp.argmax(problem.model(state.params, None, test), 1) == test.y
        told["test_error"] = 100 * float(1 - jnp.mean(right))
    return losses, told


@functools.cache
def _trainer(method: str, task: Task, config: Config, settings: tuple[Any, ...]) -> Any:
    """Jitted first state of some parameters, and one epoch of it with the losses of its steps."""
    tx, loss = problem.optimizer(method, task, config, dict(settings)), problem.loss(task)

    @jax.jit
    def epoch(state: Any, key: Any, train: problem.Rows) -> tuple[Any, jax.Array]:
        batches = jax.tree.map(lambda x: x[None], train)
        if method != "lbfgs":
            steps = len(train.y) // task.batch
            order = jax.random.permutation(key, len(train.y))[: steps * task.batch]
            batches = jax.tree.map(
                lambda x: x[order].reshape(steps, task.batch, *x.shape[1:]), train
            )
        steps = len(batches.y)
        state, info = bilevel.descend(loss, tx, state, None, batches, steps=steps)
        return state, info.loss

    return jax.jit(lambda w: bilevel.InnerState(w, tx.init(w))), epoch


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Ratios of losses on the same seed, with intervals, and of the epochs to the target."""
    told: dict[str, Any] = {}
    last = record.final(records)
    for task in sorted({name.removesuffix("_egn") for name, _ in last if name.endswith("_egn")}):
        for other in ("sgd", "momentum", "adam", "lbfgs", "sgn"):
            for metric in ("train_loss", "test_loss"):
                # L-BFGS fits digits to a loss that is zero in float32: there is no ratio to it.
                opponents = [r for (name, _), r in last.items() if name == f"{task}_{other}"]
                if any(r.metrics[metric] == 0 for r in opponents):
                    continue
                told[f"{task}_{metric}_egn_over_{other}"] = expected.paired(
                    records, metric, f"{task}_egn", f"{task}_{other}", ratio=True
                )
    for other in ("sgd", "momentum", "adam", "sgn"):
        told[f"epochs_egn_over_{other}"] = expected.paired(
            records, "epochs_to_target", "digits_egn", f"digits_{other}", ratio=True
        )
    return told
