r"""Ten images and one log decay: the training loss, and its exact minimum for every decay.

:math:`h(w, \lambda) = -\overline{\log N(t; Xw, 0.1^2)} + e^\lambda |w|`, with the norm itself and
not its square, over weights and biases. Its minimum is that of ridge regression at the decay
:math:`\mu` for which :math:`\mu |w_\mu| = e^\lambda`, found by bisection, in float64.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data
from experiments.hypernet.config import Curve

CLASSES = 10
DEVIATION = 0.1
CONSTANT = 0.5 * math.log(2 * math.pi * DEVIATION**2)


def images(config: Curve, seed: int) -> tuple[Any, Any]:
    """``(train, valid)``: rows of pixels and one-hot targets; one training image of each class."""
    if config.data == "mnist":
        sets = data.mnist(valid=config.valid, seed=seed)
    else:
        sets = data.digits(valid=config.valid, test=500, seed=seed)
    labels = sets.train.y
    chosen = [int(np.flatnonzero(labels == c)[0]) for c in range(CLASSES)]

    def part(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x.reshape(len(y), -1), np.eye(CLASSES, dtype=np.float32)[y]

    train = part(sets.train.x[chosen], labels[chosen])
    return train, part(sets.valid.x, sets.valid.y)


def initial(pixels: int) -> dict[str, jax.Array]:
    """Zeros: hypernetworks predict all of the weights, so only shapes count."""
    return {"kernel": jnp.zeros((pixels, CLASSES)), "bias": jnp.zeros(CLASSES)}


def outer(w: Any, lam: Any, batch: Any) -> jax.Array:
    """Minus the mean log-likelihood of the targets."""
    x, t = batch
    errors = jnp.mean((x @ w["kernel"] + w["bias"][None] - t) ** 2)
    return errors / (2 * DEVIATION**2) + CONSTANT


def inner(w: Any, lam: jax.Array, batch: Any) -> jax.Array:
    """The same and the decay; the subgradient of the norm at zero is zero, not NaN."""
    squares = jnp.sum(w["kernel"] ** 2) + jnp.sum(w["bias"] ** 2)
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    return outer(w, lam, batch) + jnp.exp(lam) * norm


def solutions(train: Any, lam: Any) -> np.ndarray:
    """The weights that minimize the training loss, ``(len(lam), pixels + 1, classes)``."""
    x, t = (np.asarray(a, np.float64) for a in train)
    features = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    # h = curvature / 2 * |features w - t|^2 + e^lam |w| + constant
    curvature = 1 / (DEVIATION**2 * t.size)
    eigenvalues, basis = np.linalg.eigh(features @ features.T)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    powers = np.sum((basis.T @ t) ** 2, axis=1)
    decay = np.exp(np.asarray(lam, np.float64))

    def norm(mu: np.ndarray) -> np.ndarray:
        shrunk = curvature / (curvature * eigenvalues[:, None] + mu)
        return np.sqrt(np.sum(eigenvalues[:, None] * powers[:, None] * shrunk**2, axis=0))

    low, high = np.full(decay.shape, -60.0), np.full(decay.shape, 60.0)
    for _ in range(100):  # mu |w(mu)| grows with mu
        middle = 0.5 * (low + high)
        above = np.exp(middle) * norm(np.exp(middle)) > decay
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    mu = np.exp(0.5 * (low + high))
    shrunk = curvature / (curvature * eigenvalues[:, None] + mu)
    weights = np.einsum("np,nm,ml,mc->lpc", features, basis, shrunk, basis.T @ t)
    # From the norm of the gradient at zero on, zero is the minimum.
    largest = curvature * np.sqrt(np.sum(eigenvalues * powers))
    return np.where((decay < largest)[:, None, None], weights, 0.0)


def exact_curve(train: Any, valid: Any, lam: Any) -> np.ndarray:
    """Validation loss at the exact minimum of the training loss, for every log decay."""
    x, t = (np.asarray(a, np.float64) for a in valid)
    losses = []
    for w in solutions(train, lam):
        losses.append(np.mean((x @ w[:-1] + w[-1] - t) ** 2) / (2 * DEVIATION**2) + CONSTANT)
    return np.array(losses)


def lowest(lam: np.ndarray, losses: np.ndarray) -> float:
    """Where a curve is lowest: the best point of a grid, refined by a parabola."""
    best = int(np.argmin(losses))
    if best in (0, len(lam) - 1):
        return float(lam[best])
    left, middle, right = losses[best - 1 : best + 2]
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    return float(lam[best] + shift * (lam[1] - lam[0]))
