r"""Materialise the operator and factorise it: the oracle, and right for small problems."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.aliases import Key, MatVec, Vector
from bilevel.linear.base import LinearSolution, as_map, finish, require_fixed, status_of
from bilevel.settings import check_settings, count
from bilevel.status import Status


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    r"""Solves :math:`A q = g` by LU of the whole matrix, all leaves coupled.

    Args:
      max_size: largest n accepted; the matrix takes :math:`n^2` numbers.

    An indefinite matrix is solved too (the value is exact) and reported as
    ``negative_curvature`` with its smallest eigenvalue, since the inner point is then no
    minimum.

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
        flat, unravel = ravel_pytree(rhs)
        basis = jnp.eye(n, dtype=flat.dtype)
        columns = jax.vmap(lambda e: ravel_pytree(amap(unravel(e)))[0])(basis)
        matrix = (columns + columns.T) / 2  # rounding aside, a Hessian is symmetric
        value = unravel(jnp.linalg.solve(matrix, flat))
        eigenvalues = jnp.linalg.eigvalsh(matrix)
        stats = {
            "num_matvecs": jnp.asarray(n, jnp.int32),
            "min_curvature": eigenvalues[0],
            "max_curvature": eigenvalues[-1],
        }
        result = status_of(Status.ok, (eigenvalues[0] <= 0, Status.negative_curvature))
        return finish(amap, rhs, value, stats, result, certify)
