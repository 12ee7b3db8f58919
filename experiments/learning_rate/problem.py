"""Two small networks on Fashion-MNIST, and the batches of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.common import data
from experiments.learning_rate.config import Config

OUT = {"mlp": (64, 64, 10), "cnn": (8, 16, 10)}


def initial(model: str, key: jax.Array) -> list[Any]:
    """One (kernel, bias) a layer; He's variance."""
    inputs = {"mlp": (784, 64, 64), "cnn": (9, 9 * 8, 7 * 7 * 16)}[model]
    keys = jax.random.split(key, len(inputs))
    return [
        (jnp.sqrt(2 / m) * jax.random.normal(k, (m, n)), jnp.zeros(n))
        for k, m, n in zip(keys, inputs, OUT[model], strict=True)
    ]


def _patches(z: jax.Array) -> jax.Array:
    """The 3 x 3 neighbourhoods of every second pixel, (n, h/2, w/2, 9 c).

    Slices and a product instead of a convolution: its gradients are fast inside a loop on CPU.
    """
    _, h, w, _ = z.shape
    z = jnp.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [z[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)], -1
    )


def logits(params: list[Any], images: jax.Array) -> jax.Array:
    """MLP or CNN, told apart by the width of the first kernel."""
    if params[0][0].shape[0] == 784:
        z = images.reshape(len(images), -1)
        for kernel, bias in params[:-1]:
            z = jax.nn.relu(z @ kernel + bias)
    else:
        z = images[..., None]
        for kernel, bias in params[:-1]:
            z = jax.nn.relu(_patches(z) @ kernel + bias)
        z = z.reshape(len(z), -1)
    kernel, bias = params[-1]
    return z @ kernel + bias


def loss(params: list[Any], schedule: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy in nats; inner and outer loss are the same, as in Wu et al."""
    z = logits(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()


def images(config: Config, seed: int) -> dict[str, Any]:
    """`train` images of the training part, and the first 2000 of the two others."""
    sets = data.fashion_mnist(seed=seed)
    parts = {
        "train": (sets.train, config.train),
        "validation": (sets.valid, 2000),
        "test": (sets.test, 2000),
    }
    return {
        name: (jnp.asarray(part.x[:count]), jnp.asarray(part.y[:count]))
        for name, (part, count) in parts.items()
    }
