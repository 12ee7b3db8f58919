"""Logistic regression with one log penalty per feature, tuned by cross-validation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.objectives import CrossValidation, HyperPrior, k_folds
from experiments.many.config import Config


class Rows(NamedTuple):
    """Examples of two classes: features and signs."""

    x: np.ndarray
    y: np.ndarray

    def at(self, index: np.ndarray) -> "Rows":
        """Some of them."""
        return Rows(self.x[index], self.y[index])


def rows(task: str, config: Config, seed: int) -> tuple[Rows, Rows]:
    """What is fitted and tuned on, and the test part; standardized by the first."""
    x, y = _loaded(task)
    order = np.random.default_rng(seed).permutation(len(y))
    fit, test = order[: config.rows], order[config.rows :]
    varies = x[fit].std(0) > 1e-3 * x.std(0).max()
    x = x[:, varies]
    x = (x - x[fit].mean(0)) / x[fit].std(0)
    return Rows(x[fit], y[fit]), Rows(x[test], y[test])


def _loaded(task: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer, load_digits

    if task == "breast_cancer":
        x, y = load_breast_cancer(return_X_y=True)
        return np.asarray(x), 2.0 * np.asarray(y) - 1
    x, y = load_digits(return_X_y=True)
    chosen = (y == 3) | (y == 8)
    return np.asarray(x)[chosen], np.where(np.asarray(y)[chosen] == 3, 1.0, -1.0)


def log_loss(w: Any, lam: Any, batch: Any) -> jax.Array:
    """Mean negative log-likelihood, with an intercept."""
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w["slopes"] + w["intercept"])))


def penalized(w: Any, lam: Any, batch: Any) -> jax.Array:
    """With one quadratic penalty per slope."""
    return log_loss(w, lam, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w["slopes"] ** 2)


def zeros(features: int) -> Any:
    """The start of a fit."""
    return {"slopes": jnp.zeros(features), "intercept": jnp.zeros(())}


def fit(w: Any, lam: Any, batch: Any, tol: float) -> Any:
    """The minimum."""
    return bilevel.minimize(penalized, w, lam, batch, tol=tol, max_steps=300).params


@functools.cache
def tuner(count: int, features: int, config: Config) -> Any:
    """`(strength, rows) -> log penalties`, compiled once per shape."""
    cv = CrossValidation(k_folds(count, config.folds, seed=0), log_loss, penalized)
    start = jnp.full(features, config.start)
    solve = cv.each(functools.partial(fit, tol=config.tolerance))
    response = bilevel.Implicit(bilevel.CG(50, rtol=1e-6), warm_start=False)
    tx = optax.adam(config.rate)

    @jax.jit
    def tune(strength: jax.Array, data: Any) -> jax.Array:
        prior = HyperPrior(start, strength, "all")
        outer, inner = prior.outer(cv.outer), prior.inner(cv.inner)
        train, test = cv.inner_batch(data), cv.outer_batch(data)

        def step(carry: Any, _: Any) -> Any:
            w, moved, state = carry
            w = solve(w, prior.hparams(moved), train)
            solution = bilevel.hypergrad_solve(
                outer, inner, response, w, moved, inner_batch=train, outer_batch=test
            )
            updates, state = tx.update(solution.grads, state)
            return (w, optax.apply_updates(moved, updates), state), solution.value

        first = prior.init(start)
        carry = (cv.init(zeros(features)), first, tx.init(first))
        (_, moved, _), _ = jax.lax.scan(step, carry, length=config.steps)
        return prior.hparams(moved)

    return tune


def tuned(strength: Any, data: Rows, config: Config) -> tuple[jax.Array, Any]:
    """Log penalties of a prior of this strength, and the fit with them to all the rows."""
    count, features = data.x.shape
    lam = tuner(count, features, config)(jnp.asarray(strength, jnp.float64), tuple(data))
    return lam, _fit(features, config)(lam, tuple(data))


@functools.cache
def _fit(features: int, config: Config) -> Any:
    start = zeros(features)
    return jax.jit(lambda lam, data: fit(start, lam, data, config.tolerance))


@jax.jit
def judged(w: Any, data: Any) -> tuple[jax.Array, jax.Array]:
    """Log-loss and share of errors."""
    x, y = data
    wrong = jnp.mean((x @ w["slopes"] + w["intercept"] > 0) != (y > 0))
    return log_loss(w, None, data), wrong
