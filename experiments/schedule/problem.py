"""The images, the network, and a training run as a function of its schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.common import data
from experiments.schedule.config import Config

Params = dict[str, jax.Array]


class Images(NamedTuple):
    """Pixels, centred by the mean of the training images, and labels."""

    train: tuple[jax.Array, jax.Array]
    valid: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def images(config: Config, seed: int) -> Images:
    """Some training and validation images, drawn by the seed, and all test images."""
    source = data.fashion_mnist if config.images == "fashion_mnist" else data.digits
    full = source(seed=seed)
    mean = full.train.x[: config.train].reshape(config.train, -1).mean(0)

    def part(split: Any, count: int | None) -> tuple[jax.Array, jax.Array]:
        x, y = split.x[:count], split.y[:count]
        return jnp.asarray(x.reshape(len(x), -1) - mean, jnp.float32), jnp.asarray(y, jnp.int32)

    return Images(
        part(full.train, config.train), part(full.valid, config.valid), part(full.test, None)
    )


def initial(config: Config, inputs: int, key: jax.Array) -> Params:
    """Weights of one hidden layer of tanh units."""
    one, two = jax.random.split(key)
    return {
        "hidden": jax.random.normal(one, (inputs, config.hidden)) / inputs**0.5,
        "shift": jnp.zeros(config.hidden),
        "out": jax.random.normal(two, (config.hidden, 10)) / config.hidden**0.5,
        "bias": jnp.zeros(10),
    }


def logits(w: Params, x: jax.Array) -> jax.Array:
    z = jnp.tanh(x @ w["hidden"] + w["shift"][None])
    return z @ w["out"] + w["bias"][None]


def loss(w: Params, hparams: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy in nats; of training and validation images alike."""
    out = logits(w, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()


def rate(log_rates: jax.Array, part: Any) -> jax.Array:
    """The rate after a part of the run, in [0, 1): a cosine to zero times the knots' curve."""
    knots = jnp.linspace(0.0, 1.0, len(log_rates))
    return 0.5 * (1 + jnp.cos(jnp.pi * part)) * jnp.exp(jnp.interp(part, knots, log_rates))


def sgd(config: Config, steps: int) -> Any:
    """The inner optimizer as a function of ``{"log_rates": (knots,)}``, for a run of ``steps``."""

    def tx(hparams: Any) -> optax.GradientTransformation:
        return optax.sgd(lambda step: rate(hparams["log_rates"], step / steps), config.momentum)

    return tx
