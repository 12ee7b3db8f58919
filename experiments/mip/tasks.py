r"""The models whose weights are predicted, and their training losses.

Weights are a dictionary of layers, so that one function initialises and evaluates all of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data
from experiments.mip.config import Config, Task

CLASSES = 10
DEVIATION = 0.1  # of the Gaussian likelihood of a linear model's outputs


def images(config: Config, task: Task, seed: int) -> tuple[jax.Array, jax.Array]:
    """``(x, y)``: rows of pixels and labels; for "linear" the first image of each class."""
    if config.data == "mnist":
        part = data.mnist(seed=seed).train
    else:
        part = data.digits(valid=100, test=1797 - config.train - 100, seed=seed).train
    x, y = part.x.reshape(len(part.y), -1), part.y
    if task.kind == "linear":
        chosen = [int(np.flatnonzero(y == c)[0]) for c in range(CLASSES)]
    else:
        chosen = list(range(config.train))
    return jnp.asarray(x[chosen]), jnp.asarray(y[chosen])


def initial(task: Task, pixels: int, key: jax.Array) -> dict[str, Any]:
    """He's weights and biases of zero: where base weights start from."""
    widths = (pixels, *task.widths, CLASSES)
    layers = {}
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (inputs, outputs))
        layers[f"layer{i}"] = {
            "kernel": math.sqrt(2 / inputs) * kernel,
            "bias": jnp.zeros(outputs),
        }
    return layers


def forward(w: Any, x: jax.Array) -> jax.Array:
    """A network of ReLU layers, the last one linear."""
    for i in range(len(w)):
        layer = w[f"layer{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"][None]
    return x


def data_loss(task: Task, w: Any, batch: Any) -> jax.Array:
    """Cross-entropy, or minus the log-likelihood of one-hot targets under N(output, 0.1^2)."""
    x, y = batch
    outputs = forward(w, x)
    if task.kind == "classifier":
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()
    errors = jnp.mean((outputs - jax.nn.one_hot(y, CLASSES)) ** 2)
    return errors / (2 * DEVIATION**2) + 0.5 * math.log(2 * math.pi * DEVIATION**2)


def training_loss(task: Task, w: Any, lam: jax.Array, batch: Any) -> jax.Array:
    r"""With the penalty: :math:`10^{\ldots} |W|^2` of the kernels, or :math:`e^\lambda |w|`."""
    if task.kind == "classifier":
        decay = 10.0 ** (task.low + (task.high - task.low) * lam)
        squares = [jnp.sum(layer["kernel"] ** 2) for layer in w.values()]
        return data_loss(task, w, batch) + decay * jnp.sum(jnp.stack(squares))
    return data_loss(task, w, batch) + jnp.exp(lam) * norm(w)


def norm(w: Any) -> jax.Array:
    """Of all leaves together; the subgradient at zero is zero, not NaN."""
    squares = jnp.sum(jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(w)]))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def input_range(task: Task) -> tuple[float, float]:
    """What the hypernetwork sees: g in [0, 1], or the log decay as it is."""
    return (0.0, 1.0) if task.kind == "classifier" else (task.low, task.high)


@functools.cache
def loss_of_zero(task: Task) -> float:
    """The training loss of weights of zero, which is that of having learnt nothing."""
    if task.kind == "classifier":
        return math.log(CLASSES)
    return 1 / (2 * DEVIATION**2 * CLASSES) + 0.5 * math.log(2 * math.pi * DEVIATION**2)
