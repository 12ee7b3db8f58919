"""Two small networks, and the optimizers that train them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import data
from experiments.egn.config import Config, Task


class Rows(NamedTuple):
    """Inputs and targets."""

    x: jax.Array
    y: jax.Array


def rows(task: Task, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and to judge on: pixels in [0, 1]; housing with mean 0 and variance 1."""
    if task.name == "digits":
        found = data.digits(valid=0, test=task.test, seed=seed)
        parts = [(p.x.reshape(len(p.y), -1), p.y) for p in (found.train, found.test)]
    else:
        found = data.california_housing(valid=0, test=task.test, seed=seed)
        parts = [(_skewed(p.x), p.y) for p in (found.train, found.test)]
    (x, y), (x_test, y_test) = parts
    x, y = x[: task.train], y[: task.train]
    if task.name != "digits":
        mean, scale = x.mean(0), x.std(0)
        x, x_test = (x - mean) / scale, (x_test - mean) / scale
        low, high = y.mean(), y.std()
        y, y_test = (y[:, None] - low) / high, (y_test[:, None] - low) / high
    kind = np.int32 if task.name == "digits" else np.float32
    made = [
        Rows(jnp.asarray(a, jnp.float32), jnp.asarray(b, kind))
        for a, b in ((x, y), (x_test, y_test))
    ]
    return made[0], made[1]


def _skewed(x: np.ndarray) -> np.ndarray:
    """Counts and incomes in logarithms; the first three columns are places and ages."""
    return np.concatenate([x[:, :3], np.log(x[:, 3:])], 1)


def params(task: Task, inputs: int, seed: int) -> Any:
    """A hidden layer of tanh units."""
    first, last = jax.random.split(jax.random.key(seed))
    outputs = 10 if task.name == "digits" else 1
    return {
        "first": jax.random.normal(first, (inputs, task.hidden)) / inputs**0.5,
        "first_bias": jnp.zeros(task.hidden),
        "last": jax.random.normal(last, (task.hidden, outputs)) / task.hidden**0.5,
        "last_bias": jnp.zeros(outputs),
    }


def model(w: Any, lam: Any, batch: Rows) -> jax.Array:
    """Outputs for a batch."""
    hidden = jnp.tanh(batch.x @ w["first"] + w["first_bias"])
    return hidden @ w["last"] + w["last_bias"]


def output_loss(task: Task) -> Any:
    """Cross-entropy, or half the squared error."""
    if task.name == "digits":
        return lambda z, lam, batch: optax.softmax_cross_entropy_with_integer_labels(
            z, batch.y
        ).mean()
    return lambda z, lam, batch: 0.5 * jnp.mean(jnp.sum((z - batch.y) ** 2, 1))


def loss(task: Task) -> Any:
    """Training loss, without a penalty."""
    of_outputs = output_loss(task)
    return lambda w, lam, batch: of_outputs(model(w, lam, batch), lam, batch)


def optimizer(method: str, task: Task, config: Config, settings: dict[str, Any]) -> Any:
    """An optax transformation; Gauss–Newton by an exact solve, or by CG."""
    if method in ("sgd", "momentum"):
        return optax.sgd(momentum=0.9 if method == "momentum" else None, **settings)
    if method == "adam":
        return optax.adam(**settings)
    if method == "lbfgs":
        return optax.lbfgs(**settings)
    solver = bilevel.CG(config.products) if method == "sgn" else bilevel.Woodbury()
    return bilevel.gauss_newton(
        model, output_loss(task), independent_examples=True, solver=solver, **settings
    )
