"""Data for the workloads: MNIST where it is at hand, Gaussian numbers of its shape elsewhere."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data


@functools.lru_cache(maxsize=2)
def images(count: int, pixels: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(count, pixels) float32, (count,) int32 labels of ten classes, and where they came from."""
    if pixels == 784 and os.environ.get("BILEVEL_DATA"):
        try:
            train = data.mnist(seed=seed).train
        except data.DataMissing:
            pass
        else:
            order = np.random.default_rng(seed).permutation(len(train.y))[:count]
            return train.x[order].reshape(count, -1), train.y[order], "MNIST"
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.int32)
    # Non-negative and sparse like pixels, with a class mean, so that training has a meaning.
    means = np.maximum(rng.normal(size=(10, pixels)) - 0.5, 0)
    x = np.clip(0.5 * means[labels] + 0.3 * np.maximum(rng.normal(size=(count, pixels)), 0), 0, 1)
    return x.astype(np.float32), labels, "Gaussian numbers"


def decaying(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Gaussian features, the j-th of scale 1 / sqrt(j), and labels by a random linear model."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size)) / np.sqrt(np.arange(1, size + 1))
    labels = np.argmax(x @ rng.normal(size=(size, 10)) + rng.gumbel(size=(count, 10)), axis=1)
    return x.astype(np.float32), labels.astype(np.int32), "Gaussian numbers"


def log_decay(key: jax.Array, like: jax.Array, centre: float) -> jax.Array:
    """Logarithms of penalties scattered by a factor of about two around `centre`."""
    return jnp.log(centre) + 0.7 * jax.random.normal(key, like.shape, jnp.float32)
