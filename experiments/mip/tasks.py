r"""The models whose weights are predicted, and their training losses.

Weights are a dictionary of layers, so that one function initializes and evaluates all of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data
from experiments.common.stn import pool
from experiments.mip.config import Task

CLASSES = 10
WINDOW = 5  # side of the pixels that a convolution sees
DEVIATION = 0.1  # of the Gaussian likelihood of a linear model's outputs


def images(task: Task, seed: int) -> tuple[jax.Array, jax.Array]:
    """``(x, y)``: rows of pixels and labels; for "linear" the first image of each class."""
    if task.data == "mnist":
        part = data.mnist(seed=seed).train
    else:
        part = data.digits(valid=100, test=1797 - task.train - 100, seed=seed).train
    x, y = part.x.reshape(len(part.y), -1), part.y
    if task.kind == "linear":
        chosen = [int(np.flatnonzero(y == c)[0]) for c in range(CLASSES)]
    else:
        chosen = list(range(task.train))
    return jnp.asarray(x[chosen]), jnp.asarray(y[chosen])


def initial(task: Task, pixels: int, key: jax.Array) -> dict[str, Any]:
    """He's weights and biases of zero: where base weights start from."""
    layers = {}
    for i, (inputs, outputs) in enumerate(shapes(task, pixels)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (inputs, outputs))
        layers[f"layer{i}"] = {
            "kernel": math.sqrt(2 / inputs) * kernel,
            "bias": jnp.zeros(outputs),
        }
    return layers


def shapes(task: Task, pixels: int) -> list[tuple[int, int]]:
    """Of all kernels; that of a convolution is the matrix of a product with windows."""
    side, channels = math.isqrt(pixels), (1, *task.channels)
    for _ in task.channels:
        side = (side - WINDOW + 1) // 2
    widths = (side * side * channels[-1] if task.channels else pixels, *task.widths, CLASSES)
    convolutions = [(WINDOW**2 * a, b) for a, b in zip(channels, channels[1:], strict=False)]
    return [*convolutions, *zip(widths, widths[1:], strict=False)]


def windows(x: jax.Array) -> jax.Array:
    """``(C, H, W, B)`` to its windows of 5 x 5, ``(25 C, H - 4, W - 4, B)``.

    A product with them is a convolution, which XLA would run slowly within a scan on CPU.
    Images come last because every copy is then one of whole rows of numbers.
    """
    height, width = x.shape[1] - WINDOW + 1, x.shape[2] - WINDOW + 1
    x = jnp.concatenate([x[:, i : i + height] for i in range(WINDOW)])
    return jnp.concatenate([x[:, :, j : j + width] for j in range(WINDOW)])


def convolved(task: Task, w: Any, x: jax.Array) -> jax.Array:
    """Rows of pixels after all convolutions, each with ReLU and a pool, as rows again."""
    side = math.isqrt(x.shape[1])
    x = x.T.reshape(1, side, side, -1)
    for i in range(len(task.channels)):
        layer, seen = w[f"layer{i}"], windows(x)
        x = layer["kernel"].T @ seen.reshape(len(seen), -1) + layer["bias"][:, None]
        x = pool(jax.nn.relu(x.reshape(-1, *seen.shape[1:])))  # of each channel, image by image
    return x.reshape(-1, x.shape[-1]).T


def forward(task: Task, w: Any, x: jax.Array) -> jax.Array:
    """Convolutions, if there are any, then a network of ReLU layers, the last one linear."""
    first = len(task.channels)
    x = convolved(task, w, x) if first else x
    for i in range(first, len(w)):
        layer = w[f"layer{i}"]
        x = (jax.nn.relu(x) if i > first else x) @ layer["kernel"] + layer["bias"][None]
    return x


def data_loss(task: Task, w: Any, batch: Any) -> jax.Array:
    """Cross-entropy, or minus the log-likelihood of one-hot targets under N(output, 0.1^2)."""
    x, y = batch
    outputs = forward(task, w, x)
    if task.kind != "linear":
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()
    errors = jnp.mean((outputs - jax.nn.one_hot(y, CLASSES)) ** 2)
    return errors / (2 * DEVIATION**2) + 0.5 * math.log(2 * math.pi * DEVIATION**2)


def training_loss(task: Task, w: Any, lam: jax.Array, batch: Any) -> jax.Array:
    r"""With the penalty, or weighted against it.

    The penalty is :math:`10^{\ldots} |W|^2` of the kernels, or :math:`e^\lambda |w|`. Weighted, by
    :math:`1 - g` and g, are the data loss and :math:`|w|^2 / 2n` of all weights: for n images and
    a standard normal prior, the least loss at g = 1/2 is at the mode of the posterior.
    """
    if task.kind == "classifier":
        decay = 10.0 ** (task.low + (task.high - task.low) * lam)
        squares = [jnp.sum(layer["kernel"] ** 2) for layer in w.values()]
        return data_loss(task, w, batch) + decay * jnp.sum(jnp.stack(squares))
    if task.kind == "weighted":
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(w)]
        prior = jnp.sum(jnp.stack(squares)) / (2 * task.train)
        return (1 - lam) * data_loss(task, w, batch) + lam * prior
    return data_loss(task, w, batch) + jnp.exp(lam) * norm(w)


def norm(w: Any) -> jax.Array:
    """Of all leaves together; the subgradient at zero is zero, not NaN."""
    squares = jnp.sum(jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(w)]))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def input_range(task: Task) -> tuple[float, float]:
    """What the hypernetwork sees: g in [0, 1], or the log decay as it is."""
    return (task.low, task.high) if task.kind == "linear" else (0.0, 1.0)


@functools.cache
def loss_of_zero(task: Task) -> float:
    """The training loss of weights of zero, mean over inputs: that of having learnt nothing."""
    if task.kind == "classifier":
        return math.log(CLASSES)
    if task.kind == "weighted":
        return math.log(CLASSES) / 2
    return 1 / (2 * DEVIATION**2 * CLASSES) + 0.5 * math.log(2 * math.pi * DEVIATION**2)
