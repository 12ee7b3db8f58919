"""Ridge and logistic regression with one log penalty per feature, tuned by cross-validation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel import Status
from bilevel.linear import LinearSolution
from bilevel.objectives import CrossValidation, HyperPrior, k_folds
from experiments.many.config import Config


class Moments(NamedTuple):
    """All that a squared error needs of its rows."""

    xx: jax.Array
    xy: jax.Array
    yy: jax.Array
    count: jax.Array


class Kind(NamedTuple):
    """Loss, loss with penalties, and solver of a kind of regression; what they read of the rows.

    `nats(loss, shared)` is the negative log-likelihood behind a loss, with the noise that the loss
    of one shared penalty tells.
    """

    loss: Callable[..., jax.Array]
    penalized: Callable[..., jax.Array]
    fit: Callable[..., jax.Array]
    read: Callable[[Any], Any]
    nats: Callable[[jax.Array, jax.Array], jax.Array]


def moments(rows: Any) -> Moments:
    """Means of products, with a constant as the last feature."""
    x, y = constant(rows)
    n = x.shape[0]
    return Moments(x.T @ x / n, x.T @ y / n, jnp.mean(y**2), jnp.asarray(n, x.dtype))


def constant(rows: Any) -> tuple[jax.Array, jax.Array]:
    """The rows, with a constant as the last feature."""
    x, y = rows
    return jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1), y


def penalties(lam: jax.Array, count: Any) -> jax.Array:
    """Per weight, beside a mean over so many rows; the intercept has none."""
    return jnp.append(jnp.exp(lam), 0.0) / count


@jax.custom_batching.sequential_vmap
def solved(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    """By Cholesky; under `vmap` one after the other.

    Two batched factorizations at once wait for each other forever on a CPU of two cores (jaxlib
    0.10.2: each blocks a thread of the pool that its own parts need).
    """
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), rhs)


def squared_error(w: jax.Array, lam: Any, told: Moments) -> jax.Array:
    """Mean over the rows."""
    return w @ told.xx @ w - 2 * w @ told.xy + told.yy


def ridge(w: jax.Array, lam: jax.Array, told: Moments) -> jax.Array:
    """Half of it, and a quadratic penalty per feature."""
    return 0.5 * squared_error(w, lam, told) + 0.5 * penalties(lam, told.count) @ w**2


def closed_form(w: jax.Array, lam: jax.Array, told: Moments) -> jax.Array:
    """The minimum of `ridge`."""
    return solved(told.xx + jnp.diag(penalties(lam, told.count)), told.xy)


def log_loss(w: jax.Array, lam: Any, rows: Any) -> jax.Array:
    """Mean negative log-likelihood."""
    x, y = rows
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def logistic(w: jax.Array, lam: jax.Array, rows: Any) -> jax.Array:
    """With a quadratic penalty per feature."""
    return log_loss(w, lam, rows) + 0.5 * penalties(lam, rows[1].shape[0]) @ w**2


def newton(w: jax.Array, lam: jax.Array, rows: Any, tol: float = 1e-5) -> jax.Array:
    """The minimum of `logistic`, by Newton steps from ``w``.

    One more step follows a gradient below ``tol``: its error is about the square.
    """
    x, y = rows
    penalty = penalties(lam, y.shape[0])

    def going(carry: Any) -> jax.Array:
        _, size, steps = carry
        return (size > tol) & (steps < 25)

    def step(carry: Any) -> Any:
        w, _, steps = carry
        p = jax.nn.sigmoid(-y * (x @ w))
        gradient = -x.T @ (p * y) / y.shape[0] + penalty * w
        weighted = x * jnp.sqrt(p * (1 - p) / y.shape[0])[:, None]
        matrix = weighted.T @ weighted + jnp.diag(penalty + 1e-10)
        move = solved(matrix, gradient)
        size = jnp.linalg.norm(move)
        return w - move * jnp.minimum(1, 5 / size), jnp.linalg.norm(gradient), steps + 1

    first = (w, jnp.full((), jnp.inf, w.dtype), 0)
    return jax.lax.while_loop(going, step, first)[0]


RIDGE = Kind(squared_error, ridge, closed_form, moments, lambda loss, shared: 0.5 * loss / shared)
LOGISTIC = Kind(log_loss, logistic, newton, constant, lambda loss, shared: loss)


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """The adjoint system by a factor of the whole matrix, small and positive definite here."""

    def solve(self, mv: Any, rhs: Any, x0: Any = None, *, key: Any = None, certify: bool = True):
        """As `bilevel.linear.LinearSolver`."""
        matrix = jax.vmap(mv)(jnp.eye(rhs.shape[0], dtype=rhs.dtype))
        q = solved(matrix, rhs)
        stats = {"rhs_norm": jnp.linalg.norm(rhs), "residual_norm": jnp.linalg.norm(rhs - mv(q))}
        return LinearSolution(q, jnp.asarray(Status.ok, jnp.int32), stats)


def cross_validation(kind: Kind, count: int, config: Config, repeats: int = 1) -> CrossValidation:
    """Of one fit to ``count`` rows; repeats cut them into other folds."""
    folds = [f for seed in range(repeats) for f in k_folds(count, config.folds, seed=seed)]
    return CrossValidation(folds, kind.loss, kind.penalized, partition=repeats == 1)


def value(cv: CrossValidation, kind: Kind, rows: Any) -> Callable[..., Any]:
    """`(log penalties, start) -> (cross-validated loss, solutions)`, differentiable."""
    read = jax.vmap(kind.read)
    train, test = (tuple(map(read, batch(rows))) for batch in (cv.inner_batch, cv.outer_batch))
    response = bilevel.Implicit(Cholesky())
    solve = cv.each(bilevel.with_response(kind.fit, kind.penalized, response))

    def call(lam: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = solve(w, lam, train)
        return cv.outer(w, lam, test), jax.lax.stop_gradient(w)

    return call


def search(loss: Any, start: Any, features: int, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best of the grid, and its loss: as `RidgeCV` and `LogisticRegressionCV` do."""

    def step(w: Any, point: jax.Array) -> Any:
        found, w = loss(jnp.full(features, point), w)
        return w, found

    # From strong penalties to weak ones: each fit is near the one before.
    grid = grid[::-1]
    losses = jax.lax.scan(step, start, grid)[1]
    return grid[jnp.argmin(losses)], jnp.min(losses)


@functools.cache
def tuner(
    kind: Kind, count: int, features: int, strengths: tuple[float, ...], config: Config
) -> Any:
    """`rows -> log penalties`: one that is searched, then those of each of these strengths.

    All strengths in one program, compiled once per shape.
    """
    cv = cross_validation(kind, count, config)
    tx = optax.adam(config.rate)
    start = cv.init(jnp.zeros(features + 1))

    @jax.jit
    def tune(rows: Any) -> jax.Array:
        of_rows = value(cv, kind, rows)
        grid = jnp.linspace(*config.grid, config.points)
        shared, least = search(of_rows, start, features, grid)

        def with_prior(strength: jax.Array) -> jax.Array:
            prior = HyperPrior(jnp.zeros(features), strength, "all")

            def loss(moved: Any, w: jax.Array) -> Any:
                found, w = of_rows(prior.hparams(moved), w)
                # In nats a strength of 1 / (n s^2) lets log penalties deviate by s, on all sets.
                return kind.nats(found, least) + prior.penalty(moved), w

            def step(carry: Any, _: Any) -> Any:
                moved, state, w = carry
                (_, w), grads = jax.value_and_grad(loss, has_aux=True)(moved, w)
                updates, state = tx.update(grads, state)
                return (optax.apply_updates(moved, updates), state, w), None

            first = prior.init(jnp.full(features, shared))
            carry = (first, tx.init(first), start)
            (moved, *_), _ = jax.lax.scan(step, carry, length=config.steps)
            return prior.hparams(moved)

        return jnp.concatenate(
            [jnp.full((1, features), shared), jax.vmap(with_prior)(jnp.asarray(strengths))]
        )

    return tune


@functools.cache
def repeated(kind: Kind, count: int, features: int, config: Config) -> Any:
    """`(rows, log penalty) -> log penalty`: searched again beside it, by folds drawn many times."""
    cv = cross_validation(kind, count, config, config.repeats)

    @jax.jit
    def again(rows: Any, near: jax.Array) -> jax.Array:
        grid = near + jnp.linspace(-config.beside, config.beside, config.points_beside)
        start = cv.init(jnp.zeros(features + 1))
        return search(value(cv, kind, rows), start, features, grid)[0]

    return again


@functools.cache
def fitter(kind: Kind, features: int) -> Any:
    """`(log penalties, rows) -> weights` of each row of penalties."""
    start = jnp.zeros(features + 1)

    @jax.jit
    def fit(lam: jax.Array, rows: Any) -> jax.Array:
        told = kind.read(rows)
        return jax.vmap(lambda one: kind.fit(start, one, told))(lam)

    return fit


def losses(kind: Kind, w: Any, rows: Any) -> np.ndarray:
    """Of each row, in numpy: tests come in many shapes."""
    x, y = rows
    outputs = x @ np.asarray(w)[:-1] + np.asarray(w)[-1]
    return (outputs - y) ** 2 if kind is RIDGE else np.logaddexp(0, -y * outputs)
