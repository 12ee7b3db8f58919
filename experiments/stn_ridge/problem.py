r"""Ridge regression with a log decay, and everything that is known about it in closed form.

:math:`h = \tfrac1{2n}|Xw - y|^2 + \tfrac12 e^\lambda |w|^2`, and f the same on other examples,
without the penalty. Closed forms are in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stn_ridge.config import Config

LOW, HIGH, POINTS = -8.0, 5.0, 26_001  # the grid of the exact optimum: a spacing of 0.0005


def data(config: Config, seed: int) -> tuple[Any, Any]:
    """Training and validation part, ``(X, y)`` each, in float32."""
    draw = np.random.default_rng(seed)
    truth = draw.normal(0, config.truth, config.features)

    def part() -> tuple[np.ndarray, np.ndarray]:
        x = draw.normal(size=(config.examples, config.features))
        y = x @ truth + config.noise * draw.normal(size=config.examples)
        return x.astype(np.float32), y.astype(np.float32)

    return part(), part()


def outer(w: jax.Array, lam: Any, batch: Any) -> jax.Array:
    """Half the mean squared error."""
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def inner(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
    """The same with the penalty."""
    return outer(w, lam, batch) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def curve(train: Any, valid: Any, lam: Any) -> np.ndarray:
    """Validation loss of the exact ridge solution at every log decay of ``lam``."""
    x, y, z, v = (np.asarray(a, np.float64) for a in (*train, *valid))
    eigenvalues, basis = np.linalg.eigh(x.T @ x / len(y))
    decays = np.exp(np.asarray(lam, np.float64))
    weights = basis @ ((basis.T @ x.T @ y / len(y))[:, None] / (eigenvalues[:, None] + decays))
    return 0.5 * np.mean((z @ weights - v[:, None]) ** 2, axis=0)


def optimum(train: Any, valid: Any) -> tuple[float, float]:
    """The best log decay (of a dense grid, refined by a parabola) and its validation loss."""
    lam = np.linspace(LOW, HIGH, POINTS)
    losses = curve(train, valid, lam)
    best = int(np.clip(losses.argmin(), 1, POINTS - 2))
    left, middle, right = losses[best - 1 : best + 2]
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    return float(lam[best] + shift * (lam[1] - lam[0])), float(middle)


def jacobian(train: Any, lam: float, sigma: float = 0.0) -> np.ndarray:
    r"""The response that minimizes Delta-STN's objective; dw*/dlam as sigma goes to 0.

    :math:`-(H + e^\lambda(1 + \sigma^2) k)^{-1} e^\lambda k w^*`, with
    :math:`k = e^{\sigma^2/2}` from the moments of a log-normal variable.
    """
    x, y = (np.asarray(a, np.float64) for a in train)
    h, one, decay = x.T @ x / len(y), np.eye(x.shape[1]), np.exp(lam)
    k = np.exp(sigma**2 / 2)
    best = np.linalg.solve(h + decay * one, x.T @ y / len(y))
    return -np.linalg.solve(h + decay * (1 + sigma**2) * k * one, decay * k * best)


def joint(train: Any, lam: float, sigma: float) -> np.ndarray:
    r"""The slope that minimizes STN's objective, in which weights at lam are fitted along with it.

    The normal equations in :math:`(\bar w, \theta)` of :math:`\mathrm E\, h(\bar w +
    \theta\sigma\varepsilon, \lambda + \sigma\varepsilon)`.
    """
    x, y = (np.asarray(a, np.float64) for a in train)
    h, one = x.T @ x / len(y), np.eye(x.shape[1])
    decay, s = np.exp(lam + sigma**2 / 2), sigma**2
    blocks = [
        [h + decay * one, decay * s * one],
        [decay * s * one, s * h + decay * (s + s**2) * one],
    ]
    right = np.concatenate([x.T @ y / len(y), np.zeros(x.shape[1])])
    return np.linalg.solve(np.block(blocks), right)[x.shape[1] :]
