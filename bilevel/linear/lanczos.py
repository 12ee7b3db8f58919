r"""Extreme eigenvalues by Lanczos' method, with full reorthogonalization and no flattening."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.loops import loop
from bilevel.linear.base import as_map, contract_leaf, require_fixed, require_symmetric


class Tridiagonal(NamedTuple):
    """The coefficients of ``steps`` Lanczos steps: diagonal (k,), and the norms after them (k,)."""

    alpha: jax.Array
    beta: jax.Array


class Extremes(NamedTuple):
    r"""The smallest and largest Ritz value and how far an eigenvalue can be from each.

    Some eigenvalue lies within ``error`` of each value (the residual of its Ritz vector). The
    largest Ritz value is at most :math:`λ_{max}`, the smallest at least
    :math:`λ_{min}`.
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    steps: int


def lanczos(
    mv: MatVec,
    like: Vector,
    steps: int,
    key: Key,
    within: Callable[[Vector], Vector] = lambda v: v,
) -> Tridiagonal:
    r"""``steps`` steps on a symmetric :math:`A` from a random start, ``within`` a subspace of it.

    Every new vector is made orthogonal to all earlier ones, twice: without it the recurrence
    finds copies of converged eigenvalues. Vectors are trees like ``like`` in the accumulator
    dtype and keep their sharding.

    Cost: ``steps`` products, ``steps`` + 2 vectors, :math:`O(steps^2 n)` arithmetic. Reference:
    Lanczos 1950; Paige, "Error analysis of the Lanczos algorithm", 1976.
    """
    like = tree.accumulate(like)
    amap = as_map(mv, like)
    require_fixed(amap, "lanczos")
    require_symmetric(amap, "Lanczos")
    start = tree.accumulate(within(tree.random_like(key, like, jax.random.normal)))
    v = tree.unit(start)
    basis = tree.stacked_zeros(steps, v)
    real = tree.norm(start).dtype

    def body(i, carry):
        basis, v, alpha, beta = carry
        basis = tree.put(basis, v, i)
        image = amap(v)
        alpha = alpha.at[i].set(tree.vdot(v, image).astype(real))
        scale = tree.norm(image)
        for _ in range(2):
            image = orthogonal(basis, image)
        norm = tree.norm(image)
        # Below rounding the Krylov space is exhausted; what is left is noise, not a direction.
        alive = norm > 10 * jnp.finfo(real).eps * scale
        beta = beta.at[i].set(jnp.where(alive, norm, 0).astype(real))
        v = tree.scale(jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0), image)
        return basis, v, alpha, beta

    empty = jnp.zeros(steps, real)
    _, _, alpha, beta = loop(steps, body, (basis, v, empty, empty), amap.unroll)
    return Tridiagonal(alpha, beta)


def orthogonal(basis: Vector, v: Vector) -> Vector:
    """``v`` minus its projection on the rows of ``basis`` (rows not yet filled are zero)."""
    parts = jax.tree.map(lambda b, x: contract_leaf(b, x, 0), basis, v)
    coefficients = jax.tree.reduce(lambda a, b: a + b.astype(a.dtype), parts)
    return jax.tree.map(
        lambda b, x: x - jnp.tensordot(coefficients.astype(b.dtype), b, axes=1), basis, v
    )


def extremes(coefficients: Tridiagonal) -> Extremes:
    """Ritz values on the host, from the steps before the Krylov space was exhausted."""
    alpha, beta = np.asarray(coefficients.alpha, float), np.asarray(coefficients.beta, float)
    dead = np.flatnonzero(beta == 0)
    k = int(dead[0]) + 1 if dead.size else len(alpha)
    matrix = np.diag(alpha[:k]) + np.diag(beta[: k - 1], 1) + np.diag(beta[: k - 1], -1)
    if not np.all(np.isfinite(matrix)):
        return Extremes(np.nan, np.nan, np.nan, np.nan, k)
    values, vectors = np.linalg.eigh(matrix)
    errors = beta[k - 1] * np.abs(vectors[-1])
    return Extremes(float(values[0]), float(values[-1]), float(errors[0]), float(errors[-1]), k)
