r"""Factorizations of one matrix, which ``jax.vmap`` runs one after the other.

On CPU jaxlib deals the matrices of a batch out to a pool of threads, and waits for them in one of
these threads. Two such calls at once wait for each other forever where the pool has two threads
(seen with jaxlib 0.10.2 for Cholesky and LU). A single matrix is not dealt out.
"""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_batching.sequential_vmap
def _cholesky(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(matrix, symmetrize_input=False)


@jax.custom_batching.sequential_vmap
def _solve(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.linalg.solve(matrix, rhs)


@jax.custom_jvp
def cholesky(matrix: jax.Array) -> jax.Array:
    """L with L Lᵀ the matrix, of which only the part on and below the diagonal is read."""
    return _cholesky(matrix)


@cholesky.defjvp
def _cholesky_rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (matrix,), (moved,) = primals, tangents
    factor = cholesky(matrix)
    moved = jnp.tril(moved) + jnp.tril(moved, -1).T
    # L^-1 dA L^-T, whose lower part with half the diagonal is L^-1 dL.
    left = jax.scipy.linalg.solve_triangular(factor, moved, lower=True)
    inside = jax.scipy.linalg.solve_triangular(factor, left.T, lower=True)
    lower = jnp.tril(inside) - 0.5 * jnp.diag(jnp.diagonal(inside))
    return factor, factor @ lower


def solve(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    """The solution of a system with one right side."""
    fixed = jax.lax.stop_gradient(matrix)
    return jax.lax.custom_linear_solve(
        lambda v: matrix @ v,
        rhs,
        solve=lambda _, r: _solve(fixed, r),
        transpose_solve=lambda _, r: _solve(fixed.T, r),
    )
