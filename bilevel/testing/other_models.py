r"""Cases beyond linear models: two general quadratics, and a network at a stationary point."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.testing.case import (
    Case,
    Exact,
    add_direct,
    direct_grads,
    draw,
    flatten,
    newton,
    unflatten,
)


def _vector(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def _definite(rng: np.random.Generator, n: int) -> np.ndarray:
    """A dense positive definite matrix with eigenvalues in [0.5, 3]."""
    basis = np.linalg.qr(draw(rng, n, n))[0]
    return (basis * np.linspace(0.5, 3.0, n)) @ basis.T


def quadratic_case(rng: np.random.Generator) -> Case:
    r"""The general quadratic pair in inner z (5 numbers) and outer x (4 numbers).

    .. math::
        h = ½ zᵀ A z + ½ xᵀ B x + xᵀ C z + aᵀ z + bᵀ x,
        f = ½ zᵀ F z + ½ xᵀ G x + xᵀ K z + cᵀ z + eᵀ x

    with minimizer :math:`z^* = -A^{-1}(Cᵀ x + a)` and hypergradient
    :math:`Gx + Kz^* + e - CA^{-1}(Fz^* + Kᵀ x + c)`.
    """
    n, p = 5, 4

    def batch() -> tuple[np.ndarray, ...]:
        return _definite(rng, n), _definite(rng, p), draw(rng, p, n), draw(rng, n), draw(rng, p)

    inner_batch, outer_batch = batch(), batch()

    def loss(params: Any, hparams: Any, batch: Any) -> jax.Array:
        zz, xx, xz, z_only, x_only = batch
        z, x = _vector(params), _vector(hparams)
        return z @ zz @ z / 2 + x @ xx @ x / 2 + x @ xz @ z + z_only @ z + x_only @ x

    def exact(x: np.ndarray) -> Exact:
        a_zz, _, c_xz, a_z, _ = inner_batch
        f_zz, g_xx, k_xz, c_z, e_x = outer_batch
        z = -np.linalg.solve(a_zz, c_xz.T @ x + a_z)
        return Exact(z, a_zz, c_xz.T, f_zz @ z + k_xz.T @ x + c_z, g_xx @ x + k_xz @ z + e_x)

    hparams = (jnp.asarray(draw(rng, 2)), {"x": jnp.asarray(draw(rng, 1, 2))})
    like = {"u": jnp.zeros(2), "v": {"w": jnp.zeros((3, 1))}}
    return Case(
        name="quadratic",
        inner=loss,
        outer=loss,
        params=unflatten(exact(flatten(hparams)).params, like),
        hparams=hparams,
        inner_batch=jax.tree.map(jnp.asarray, inner_batch),
        outer_batch=jax.tree.map(jnp.asarray, outer_batch),
        exact=exact,
        tags=frozenset({"quadratic", "convex", "swappable"}),
    )


def least_squares_case(rng: np.random.Generator) -> Case:
    r"""Least squares, :math:`|A_2 x + A_3 t - b_2|^2/2` below, :math:`|A_1 x - b_1|^2/2` above.

    The inner matrix has no penalty, so Gauss–Newton is exact but definite by its data alone.
    """
    m, n, p = 12, 5, 3
    a2, a3, b2 = draw(rng, m, n), draw(rng, m, p), draw(rng, m)
    a1, b1 = draw(rng, 7, n), draw(rng, 7)
    direction = draw(rng, n)

    def model(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return batch[0] @ _vector(params) + batch[1] @ _vector(hparams)

    def output_loss(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        return jnp.sum((z - batch[2]) ** 2) / 2

    def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return jnp.sum((batch[0] @ _vector(params) - batch[1]) ** 2) / 2

    def exact(t: np.ndarray) -> Exact:
        hessian = a2.T @ a2
        x = np.linalg.solve(hessian, a2.T @ (b2 - a3 @ t))
        through, direct = direct_grads(direction, x, t)
        return Exact(x, hessian, a2.T @ a3, a1.T @ (a1 @ x - b1) + through, direct)

    hparams = [jnp.asarray(draw(rng, 1)), jnp.asarray(draw(rng, 2))]
    like = (jnp.zeros((2, 1)), jnp.zeros(3))
    operator = GaussNewton(model, output_loss)
    return Case(
        name="least_squares",
        inner=operator.loss,
        outer=add_direct(outer, unflatten(direction, like)),
        params=unflatten(exact(flatten(hparams)).params, like),
        hparams=hparams,
        inner_batch=tuple(map(jnp.asarray, (a2, a3, b2))),
        outer_batch=tuple(map(jnp.asarray, (a1, b1))),
        exact=exact,
        tags=frozenset({"quadratic", "convex", "gauss_newton", "gauss_newton_exact"}),
        gauss_newton=operator,
    )


def network_case(rng: np.random.Generator) -> Case:
    """A two-layer tanh network, one log-penalty per tensor, at a minimum found by Newton's method.

    No closed form: the truth is dense linear algebra on dense derivatives at the stationary
    point, which the tests hold against central differences of the re-solved problem.
    """
    n, d, width, c = 8, 3, 3, 2
    like = {
        "first": {"bias": jnp.zeros(width), "kernel": jnp.zeros((d, width))},
        "second": {"kernel": jnp.zeros((width, c))},
    }
    hparams = {
        "first": {"bias": jnp.asarray(-2.0), "kernel": jnp.asarray(-2.3)},
        "second": {"kernel": jnp.asarray(-1.8)},
    }
    batches = [tuple(map(jnp.asarray, (draw(rng, n, d), draw(rng, n, c)))) for _ in range(2)]
    start = draw(rng, len(flatten(like)), scale=0.7)
    direction = unflatten(draw(rng, len(start)), like)

    def model(params: Any, hparams: Any, batch: Any) -> jax.Array:
        first = params["first"]
        scores = batch[0] @ first["kernel"]
        hidden = jnp.tanh(scores + jnp.broadcast_to(first["bias"], scores.shape))
        return hidden @ params["second"]["kernel"]

    def output_loss(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        return jnp.sum((z - batch[1]) ** 2) / (2 * z.shape[0])

    def penalty(params: Any, hparams: Any) -> jax.Array:
        terms = jax.tree.map(lambda w, lam: jnp.exp(lam) * jnp.sum(w**2) / 2, params, hparams)
        leaves = jax.tree.leaves(terms)
        return jnp.sum(jnp.stack(leaves))

    operator = GaussNewton(model, output_loss, penalty=penalty)

    def data_loss(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return output_loss(model(params, hparams, batch), hparams, batch)

    outer = add_direct(data_loss, direction)
    unravel_w, unravel_lam = ravel_pytree(like)[1], ravel_pytree(hparams)[1]

    @jax.jit
    def derivatives(w: jax.Array, lam: jax.Array) -> tuple[jax.Array, ...]:
        inner_grad = jax.grad(
            lambda w, lam: operator.loss(unravel_w(w), unravel_lam(lam), batches[0])
        )
        outer_grads = jax.grad(
            lambda w, lam: outer(unravel_w(w), unravel_lam(lam), batches[1]), argnums=(0, 1)
        )
        hessian, cross = jax.jacfwd(inner_grad, argnums=(0, 1))(w, lam)
        return inner_grad(w, lam), hessian, cross, *outer_grads(w, lam)

    @functools.cache
    def stationary_point() -> np.ndarray:
        return minimize(flatten(hparams), start)

    def minimize(lam: np.ndarray, w: np.ndarray) -> np.ndarray:
        def first_two(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            gradient, hessian = derivatives(w, lam)[:2]
            return np.asarray(gradient), np.asarray(hessian)

        return newton(first_two, w)

    def exact(lam: np.ndarray) -> Exact:
        with jax.ensure_compile_time_eval():  # numbers, also where a caller is being traced
            w = minimize(lam, stationary_point())  # the minimum that continues the case's own
            _, hessian, cross, g, direct = map(np.asarray, derivatives(w, lam))
        return Exact(w, hessian, cross, g, direct)

    return Case(
        name="network",
        inner=operator.loss,
        outer=outer,
        params=unflatten(stationary_point(), like),
        hparams=hparams,
        inner_batch=batches[0],
        outer_batch=batches[1],
        exact=exact,
        tags=frozenset({"gauss_newton", "separable_penalty", "swappable"}),
        gauss_newton=operator,
    )
