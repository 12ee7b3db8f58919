"""A small MLP whose learning rate falls or rises exponentially between two tuned values."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.common import data
from experiments.pes.config import Config


def images(name: str, config: Config, seed: int) -> tuple[jax.Array, jax.Array]:
    """Training images as rows, standardized as a whole, and labels."""
    if name == "digits":
        part = data.digits(valid=0, test=1797 - config.train, seed=seed).train
    else:
        part = data.fashion_mnist(seed=seed).train
    x = jnp.asarray(part.x[: config.train])
    if name == "fashion":  # 14 x 14
        x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    x = x.reshape(len(x), -1)
    return (x - x.mean()) / x.std(), jnp.asarray(part.y[: config.train])


def initial(inputs: int, hidden: int, key: jax.Array) -> list[Any]:
    sizes, keys = (inputs, hidden, 10), jax.random.split(key, 2)
    return [
        (jax.random.normal(k, (m, n)) / jnp.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def loss(params: list[Any], schedule: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy in nats, of a batch in training and of all images outside."""
    z = batch[0]
    for kernel, bias in params[:-1]:
        z = jnp.tanh(z @ kernel + bias)
    kernel, bias = params[-1]
    z = z @ kernel + bias
    return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()


def sgd(schedule: jax.Array, steps: int) -> optax.GradientTransformation:
    """Log rate from `schedule[0]` to `schedule[1]` along a line, then as at the start again."""

    def rate(count: Any) -> jax.Array:
        part = (count % steps) / steps
        return jnp.exp((1 - part) * schedule[0] + part * schedule[1])

    return optax.sgd(rate)
