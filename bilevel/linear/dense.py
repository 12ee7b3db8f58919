r"""Materialize the operator and diagonalize it: the exact reference, for small problems."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.settings import check_settings, count
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import LinearSolution, as_map, finish, require_fixed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    r"""Solves :math:`A q = g` by the eigenvalues of the whole matrix, all leaves coupled.

    .. math:: q = ∑_{|λ_i| > τ} \frac{v_iᵀ g}{λ_i} v_i,
        τ = n ϵ max_i|λ_i|

    Args:
      max_size: largest n accepted; the matrix takes :math:`n^2` numbers.

    A singular matrix gives the solution of least norm, least-squares where there is no other;
    the latter is status ``singular``. An indefinite matrix is solved too (the value is exact)
    and reported as ``negative_curvature`` with its smallest eigenvalue, since the inner point is
    then no minimum. The matrix of a ``FixedPoint`` or a ``Root`` is not symmetric: it is solved by
    its singular values, likewise.

    Cost: n products (batched), :math:`O(n^3)` arithmetic, :math:`O(n^2)` memory. Raises
    ``ValueError`` above ``max_size``.
    """

    max_size: int = count(4096)

    def __post_init__(self) -> None:
        check_settings(self)

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """Solve; ``x0`` and ``key`` are not used."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        require_fixed(amap, "Dense")
        n = tree.size(rhs)
        if n > self.max_size:
            raise ValueError(
                f"Dense would build a {n} x {n} matrix, above `max_size`={self.max_size}. Use "
                "`CG()` or `Neumann(...)`, or raise `max_size` if the memory is there."
            )
        flat, unravel = _raveled(rhs)
        basis = jnp.eye(n, dtype=flat.dtype)
        columns = jax.vmap(lambda e: _raveled(amap(unravel(e)))[0])(basis)
        if amap.transpose is not None:
            return _solve_by_singular_values(amap, rhs, columns.T, flat, unravel, certify)
        matrix = (columns + columns.T) / 2  # rounding aside, a Hessian is symmetric
        eigenvalues, vectors = jnp.linalg.eigh(matrix)
        cut = n * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(eigenvalues))
        kept = ~(jnp.abs(eigenvalues) <= cut)  # a NaN is kept, and shows in the value
        parts = vectors.T @ flat
        value = unravel(vectors @ jnp.where(kept, parts / jnp.where(kept, eigenvalues, 1), 0))
        stats = {
            "num_matvecs": jnp.asarray(n, jnp.int32),
            "min_curvature": eigenvalues[0],
            "max_curvature": eigenvalues[-1],
        }
        lost = jnp.linalg.norm(jnp.where(kept, 0, parts))
        unsolved = lost > jnp.sqrt(jnp.finfo(flat.dtype).eps) * jnp.linalg.norm(flat)
        result = status_of(
            Status.ok,
            (eigenvalues[0] < -cut, Status.negative_curvature),
            (unsolved, Status.singular),
        )
        return finish(amap, rhs, value, stats, result, certify)


def _raveled(v: Vector) -> tuple[jax.Array, Any]:
    """``v`` as one array on every device, as factorizations need it, and the way back."""
    flat, unravel = ravel_pytree(jax.tree.map(tree.replicated, v))
    return flat, lambda x: jax.tree.map(tree.placed_like, unravel(x), v)


def _solve_by_singular_values(
    amap: MatVec, rhs: Vector, matrix: jax.Array, flat: jax.Array, unravel: Any, certify: bool
) -> LinearSolution:
    """The solution of least norm of a matrix that is not symmetric."""
    left, singular, right = jnp.linalg.svd(matrix)
    cut = flat.size * jnp.finfo(flat.dtype).eps * singular[0]
    kept = ~(singular <= cut)
    parts = left.T @ flat
    value = unravel(right.T @ jnp.where(kept, parts / jnp.where(kept, singular, 1), 0))
    lost = jnp.linalg.norm(jnp.where(kept, 0, parts))
    unsolved = lost > jnp.sqrt(jnp.finfo(flat.dtype).eps) * jnp.linalg.norm(flat)
    stats = {"num_matvecs": jnp.asarray(flat.size, jnp.int32)}
    result = status_of(Status.ok, (unsolved, Status.singular))
    return finish(amap, rhs, value, stats, result, certify)
