"""Gray images with an occluder, and a CNN with the fifteen hyperparameters of the STN paper's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data, stn, stn_cnn
from experiments.stn_fashion.config import Config

SIDE = 28
MEAN, STD = 0.286, 0.353  # of the pixels of Fashion-MNIST's training images
# On gray images these two do nothing: nothing that is learnt may move them.
IDLE = ("saturation", "hue")


def normalized(x: jax.Array) -> jax.Array:
    """``(B, 28, 28, 3)``, the colours alike, to ``(B, 28, 28, 1)`` of mean 0 and variance 1."""
    return (x[..., :1] - MEAN) / STD


def shown(x: np.ndarray) -> np.ndarray:
    """Back from ``normalized`` to gray values in [0, 1]."""
    return np.clip(x[..., 0] * STD + MEAN, 0, 1)


def task(config: Config) -> stn_cnn.Task:
    """The network on these images."""
    return stn_cnn.Task(config, SIDE, 1, normalized)


def start(config: Config, rate: float | None = None) -> dict[str, jax.Array]:
    """Where tuning starts; with ``rate`` all dropout starts there."""
    moved = {} if rate is None else {name: jnp.float32(rate) for name in stn.dropouts(config)}
    return {**stn.start(config), **moved}


def sets(config: Config, seed: int) -> dict[str, Any]:
    """The parts, and validation and test with an occluder on every image.

    The square has the mean gray of the set, as a hole of cutout, and a place drawn by ``seed``.
    """
    if config.data == "digits":
        found = data.digits(valid=config.valid, test=config.test, seed=seed)
        found = data.Dataset(*(data.Split(_enlarge(part.x), part.y) for part in found))
    else:
        found = data.fashion_mnist(valid=config.valid, seed=seed)
    rng = np.random.default_rng(seed)
    parts = stn_cnn.chosen(found, config, rng)
    for name in ("valid", "test"):
        hidden = _occlude(parts[name]["x"], config.occluder, MEAN, rng)
        parts[f"{name}_occluded"] = {"x": hidden, "y": parts[name]["y"]}
    return jax.tree.map(jnp.asarray, parts)


def _enlarge(x: np.ndarray) -> np.ndarray:
    """8 x 8 to 28 x 28: each pixel thrice, within a margin of two."""
    return np.pad(x.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))


def _occlude(x: np.ndarray, side: int, value: float, draw: np.random.Generator) -> np.ndarray:
    """A square of one gray value somewhere inside every image."""
    x = x.copy()
    for image, (i, j) in zip(x, draw.integers(0, SIDE - side + 1, (len(x), 2)), strict=True):
        image[i : i + side, j : j + side] = value
    return x
