"""The data, the network with averaged transformations, and its likelihood."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data
from experiments.evidence.config import Config


class Task(NamedTuple):
    """Examples to train on, further ones, and those to judge on: `(images, labels)`."""

    train: tuple[jax.Array, jax.Array]
    more: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def task(name: str, config: Config, seed: int, augmented: bool = False) -> Task:
    """A data set by name; the ending `_rotated` or `_shifted` transforms each of its images."""
    n = config.augmented_examples if augmented else config.examples
    side = config.augmented_pooled if augmented else config.pooled
    source = name.removesuffix("_rotated").removesuffix("_shifted")
    kinds = {"digits": data.digits, "mnist": data.mnist, "fashion_mnist": data.fashion_mnist}
    full = kinds[source](seed=seed)
    draw = np.random.default_rng((seed, 7))
    count = min(len(full.train.y), n + config.more)
    rows = draw.permutation(len(full.train.y))[:count]
    tested = draw.permutation(len(full.test.y))[: config.test]
    parts = [
        (full.train.x[rows[:n]], full.train.y[rows[:n]]),
        (full.train.x[rows[n:]], full.train.y[rows[n:]]),
        (full.test.x[tested], full.test.y[tested]),
    ]
    return Task(*(_prepared(name, x, y, side, config.moved, draw) for x, y in parts))


def _prepared(
    name: str, x: np.ndarray, y: np.ndarray, side: int, moved: float, draw: np.random.Generator
) -> tuple[jax.Array, jax.Array]:
    images = jnp.asarray(x)
    if name.endswith("_rotated"):
        angles = jnp.asarray(draw.uniform(-np.pi, np.pi, len(y)), jnp.float32)
        images = transformed(images, angles, jnp.zeros((len(y), 2)))
    if name.endswith("_shifted"):
        moves = jnp.asarray(draw.uniform(-1, 1, (len(y), 2)) * moved * side, jnp.float32)
        images = transformed(images, jnp.zeros(len(y)), moves)
    b, rows, columns = images.shape
    images = images.reshape(b, rows // side, side, columns // side, side).mean((2, 4))
    return images, jnp.asarray(y)


def _one_transformed(image: jax.Array, angle: jax.Array, move: jax.Array) -> jax.Array:
    """Turned about the centre, then moved; linear between pixels, zero outside."""
    rows, columns = image.shape
    y = jnp.arange(rows)[:, None] - (rows - 1) / 2 - move[0]
    x = jnp.arange(columns)[None] - (columns - 1) / 2 - move[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    down = (cos * y - sin * x + (rows - 1) / 2).reshape(-1, 1)
    right = (sin * y + cos * x + (columns - 1) / 2).reshape(-1, 1)
    # Weights of all rows and columns, mostly zero: faster than gathers, forward and backward.
    of_rows = jnp.maximum(1 - jnp.abs(down - jnp.arange(rows)[None]), 0)
    of_columns = jnp.maximum(1 - jnp.abs(right - jnp.arange(columns)[None]), 0)
    return jnp.sum((of_rows @ image) * of_columns, axis=1).reshape(rows, columns)


transformed = jax.jit(jax.vmap(_one_transformed))


def initial(key: jax.Array, inputs: int, config: Config) -> dict[str, Any]:
    """The weights of the network, by layer."""
    sizes = (inputs, *config.hidden, 10)
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer{i}": {"kernel": jax.random.normal(k, (m, n)) / jnp.sqrt(m), "bias": jnp.zeros(n)}
        for i, (k, m, n) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def network(w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Logits of flat images."""
    for i in range(len(w)):
        x = x @ w[f"layer{i}"]["kernel"] + w[f"layer{i}"]["bias"][None]
        x = jax.nn.relu(x) if i < len(w) - 1 else x
    return x


def ranges(hparams: Any, side: int) -> tuple[jax.Array, jax.Array]:
    """Greatest angle in radians, at most a half turn, and greatest shift in (pooled) pixels."""
    return (
        jnp.pi * jax.nn.sigmoid(hparams["rotation"]),
        0.4 * side * jax.nn.sigmoid(hparams["shift"]),
    )


def model(draws: int) -> Any:
    """`model(w, hparams, (images, labels[, key]))`; with a key, logits averaged over transforms.

    Angles and shifts are uniform within ranges that are hyperparameters; those of one image are
    spread evenly, so that their mean varies little.
    """

    def call(w: Any, hparams: Any, batch: Any) -> jax.Array:
        images, _, *keys = batch
        b, side = images.shape[0], images.shape[1]
        if not keys:
            return network(w, images.reshape(b, -1))
        steps = (jnp.arange(draws) + 0.5) / draws * 2 - 1
        first, *orders = jax.random.split(keys[0], 3)
        offset = jax.random.uniform(first, (b, 1, 3), minval=-1, maxval=1) / draws
        order = jnp.stack([steps, *(jax.random.permutation(k, steps) for k in orders)], -1)
        u = order[None] + offset  # (b, draws, 3), in [-1, 1]
        angle, move = ranges(hparams, side)
        copies = jnp.repeat(images, draws, 0)
        copies = transformed(copies, angle * u[..., 0].ravel(), move * u[..., 1:].reshape(-1, 2))
        return jnp.mean(network(w, copies.reshape(b * draws, -1)).reshape(b, draws, -1), 1)

    return call


def likelihood(f: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Cross-entropy of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(f, batch[1])


def first_hparams(w: Any, transforms: bool) -> dict[str, Any]:
    """Log precisions of all tensors at 0, and narrow ranges."""
    paths = jax.tree_util.tree_flatten_with_path(w)[0]
    told: dict[str, Any] = {
        "log_precision": {jax.tree_util.keystr(path): jnp.zeros(()) for path, _ in paths}
    }
    if transforms:
        told |= {"rotation": jnp.asarray(-2.0), "shift": jnp.asarray(-2.0)}
    return told
