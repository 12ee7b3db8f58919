"""The data, the model and its losses, one per example."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.attribution.config import Config, Setting
from experiments.common import data

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
}


class Task(NamedTuple):
    """Training examples, queries, initial weights, and the rows that each step reads."""

    train: tuple[jax.Array, jax.Array]
    queries: tuple[jax.Array, jax.Array]
    params: dict[str, jax.Array]
    batches: jax.Array


def rows(name: str, config: Config, seed: int) -> tuple[Any, Any]:
    """Training examples and queries of a data set, drawn by the seed."""
    if name == "concrete":
        full = data.uci_regression("concrete", seed=seed)
        x = np.concatenate([full.train.x, full.valid.x])
        y = np.concatenate([full.train.y, full.valid.y])
        x, tested = ((a - x.mean(0)) / x.std(0) for a in (x, full.test.x))
        y, aim = ((a - y.mean()) / y.std() for a in (y, full.test.y))
    else:
        source = data.mnist if name == "mnist" else data.digits
        full = source(seed=seed)
        x, tested = (part.x.reshape(len(part.x), -1) for part in (full.train, full.test))
        y, aim = full.train.y, full.test.y
    pick = np.random.default_rng(seed)
    here = pick.permutation(len(y))[: config.train]
    there = pick.permutation(len(aim))[: config.queries]
    kind = np.float32 if name == "concrete" else np.int32
    return (
        (jnp.asarray(x[here], jnp.float32), jnp.asarray(y[here].astype(kind))),
        (jnp.asarray(tested[there], jnp.float32), jnp.asarray(aim[there].astype(kind))),
    )


def task(name: str, config: Config, setting: Setting, seed: int) -> Task:
    """One data set, ready to be trained on."""
    train, queries = rows(name, config, seed)
    inputs, outputs = train[0].shape[1], 1 if name == "concrete" else 10
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "hidden": jax.random.normal(keys[0], (inputs, config.hidden)) / np.sqrt(inputs),
        "shift": jnp.zeros(config.hidden),
        "out": jax.random.normal(keys[1], (config.hidden, outputs)) / np.sqrt(config.hidden),
        "bias": jnp.zeros(outputs),
    }
    draw = np.random.default_rng((seed, 1))
    each = -(-setting.steps * config.batch // config.train)  # epochs
    order = np.concatenate([draw.permutation(config.train) for _ in range(each)])
    batches = order[: setting.steps * config.batch].reshape(setting.steps, config.batch)
    return Task(train, queries, params, jnp.asarray(batches))


def output(
    activation: str, w: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """What the network makes of each example."""
    out = ACTIVATIONS[activation](batch[0] @ w["hidden"] + w["shift"][None]) @ w["out"]
    return out + w["bias"][None]


@functools.cache
def losses(activation: str) -> Callable[..., jax.Array]:
    """Cross-entropy for classes, half the squared error for real targets; one per example."""

    def each(w: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        out, y = output(activation, w, batch), batch[1]
        if jnp.issubdtype(y.dtype, jnp.integer):
            return optax.softmax_cross_entropy_with_integer_labels(out, y)
        return 0.5 * (out[:, 0] - y) ** 2

    return each


@functools.cache
def asked(activation: str) -> Callable[..., jax.Array]:
    """What is asked of each query: the loss for classes, the predicted value for real targets.

    The squared error of a query that is predicted well is at its minimum: its derivative is zero
    whatever the examples do, and ranks nothing.
    """

    def each(w: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        if jnp.issubdtype(batch[1].dtype, jnp.integer):
            return losses(activation)(w, batch)
        return output(activation, w, batch)[:, 0]

    return each
