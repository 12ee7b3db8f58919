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
            name, epochs = f"{task.name}_{method}", len(losses)
            for part in np.array_split(np.arange(epochs), min(POINTS, epochs)):
                at = int(part[-1]) + 1
                records.append(
                    f"{name}_path", at, at * told["seconds"] / epochs, loss=losses[part].mean()
                )
            reached = np.flatnonzero(losses <= config.target)
            records.append(
                name, epochs, told["seconds"], **told,
                epochs_to_target=float(reached[0] + 1 if reached.size else np.inf),
            )  # fmt: skip


def trained(
    method: str, task: Task, config: Config, seed: int, settings: dict[str, Any]
) -> tuple[np.ndarray, dict[str, float]]:
    """The mean loss that each epoch saw; losses at the end, and the seconds that training took."""
    train, test = problem.rows(task, seed)
    tx = problem.optimizer(method, task, config, settings)
    w = problem.params(task, train.x.shape[1], seed)
    loss = problem.loss(task)
    keys = jax.random.split(jax.random.key(seed), task.epochs[method])

    def epoch(state: Any, key: Any) -> tuple[Any, jax.Array]:
        if method == "lbfgs":
            batches = jax.tree.map(lambda x: x[None], train)
        else:
            steps = len(train.y) // task.batch
            order = jax.random.permutation(key, len(train.y))[: steps * task.batch]
            batches = jax.tree.map(
                lambda x: x[order].reshape(steps, task.batch, *x.shape[1:]), train
            )
        steps = len(batches.y)
        state, info = bilevel.descend(loss, tx, state, None, batches, steps=steps)
        return state, jnp.mean(info.loss)

    state = bilevel.InnerState(w, tx.init(w))
    go = jax.jit(functools.partial(jax.lax.scan, epoch)).lower(state, keys).compile()
    begun = time.perf_counter()
    state, losses = jax.block_until_ready(go(state, keys))
    seconds = time.perf_counter() - begun
    whole = jax.jit(loss)
    told = {
        "train_loss": float(whole(state.params, None, train)),
        "test_loss": float(whole(state.params, None, test)),
        "seconds": seconds,
    }
    if task.name == "digits":
        right = jnp.argmax(problem.model(state.params, None, test), 1) == test.y
        told["test_error"] = 100 * float(1 - jnp.mean(right))
    return np.asarray(losses), told


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Ratios of losses on the same seed, with intervals, and of the epochs to the target."""
    told: dict[str, Any] = {}
    last = record.final(records)
    for task in sorted({name.removesuffix("_egn") for name, _ in last if name.endswith("_egn")}):
        for other in ("sgd", "adam", "lbfgs", "sgn"):
            for metric in ("train_loss", "test_loss"):
                told[f"{task}_{metric}_egn_over_{other}"] = expected.paired(
                    records, metric, f"{task}_egn", f"{task}_{other}", ratio=True
                )
    told["epochs_egn_over_sgd"] = expected.paired(
        records, "epochs_to_target", "digits_egn", "digits_sgd", ratio=True
    )
    return told
