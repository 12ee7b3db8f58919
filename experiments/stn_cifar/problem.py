"""Colour images, and a CNN with the hyperparameters of the STN paper's: fifteen for its AlexNet."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data, stn_cnn
from experiments.stn_cifar.config import Config

SIDE = 32
# Of the pixels of CIFAR-10's training images, as in the paper's code.
MEAN = np.array([0.4914, 0.4824, 0.4467], np.float32)
STD = np.array([0.2471, 0.2435, 0.2616], np.float32)


def normalized(x: jax.Array) -> jax.Array:
    """Pixels in [0, 1] to channels of mean 0 and variance 1."""
    return (x - MEAN.reshape(1, 1, 1, 3)) / STD.reshape(1, 1, 1, 3)


def task(config: Config) -> stn_cnn.Task:
    """The network on these images."""
    return stn_cnn.Task(config, SIDE, 3, normalized)


def parts(config: Config, seed: int) -> dict[str, Any]:
    """``x`` of shape (n, 32, 32, 3) in [0, 1], and ``y``, of the three parts."""
    if config.data == "digits":
        found = data.digits(valid=config.valid, test=config.test, seed=seed)
        found = data.Dataset(*(data.Split(_coloured(part.x), part.y) for part in found))
    else:
        found = data.cifar10(valid=config.valid, seed=seed)
    return jax.tree.map(jnp.asarray, stn_cnn.chosen(found, config, np.random.default_rng(seed)))


def _coloured(x: np.ndarray) -> np.ndarray:
    """8 x 8 to 32 x 32 x 3: each pixel four times along a side, in three colours alike."""
    return np.repeat(x.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
