r"""A Krylov subspace that is carried from solve to solve and grows by one product per call."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Scalar, Vector
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.settings import check_settings, count
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import (
    LinearSolution,
    as_map,
    contract_leaf,
    finish,
    require_fixed,
    require_symmetric,
)
from bilevel.linear.lanczos import orthogonal


class Subspace(NamedTuple):
    """What :class:`DynamicLanczos` carries.

    Attributes:
      basis: (m, ...) orthonormal vectors; rows from ``size`` on are zero.
      direction: the next of them, zero where the subspace is exhausted.
      matrix: (m, m), the tridiagonal projection of the operator, row by row as it was then.
      origin, image: the value at which the subspace began, and the operator on it.
      value: of the last solve.
      size: int32, vectors in the subspace.
    """

    basis: Vector
    direction: Vector
    matrix: jax.Array
    origin: Vector
    image: Vector
    value: Vector
    size: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicLanczos:
    r"""Solves :math:`A q = g` along an outer loop, one Lanczos vector per call.

    .. math::
        q_k = \bar q + Q_j T_j^{-1} Q_jᵀ (g_k - A\bar q),
        A_k q_j^⊥ → (Q_{j+1}, T_{j+1})

    An outer loop solves a sequence of systems whose matrix and right side move little from call to
    call. The Krylov subspace :math:`Q` and the projection :math:`T` of the matrix are kept, and
    each call extends them by one product with its own matrix. After ``subspace`` vectors they begin
    anew at the value that was reached. On a matrix and a right side that stand still, the first
    ``subspace`` calls give the iterates of CG; later ones go on from there.

    Args:
      subspace: m, the vectors that are kept; larger is more exact on slow sequences, and more
        outdated on fast ones. 10 in the paper; where the system moves by a tenth in m steps, fewer.

    Status ``negative_curvature``: the projection has an eigenvalue below zero; its directions are
    left out of the value. ``truncated`` and ``worse_than_zero`` come from the recomputed residual,
    as for every solver; in the first calls of a run ``truncated`` is to be expected. A call
    without a state (outside a loop, or with ``warm_start=False``) is a first one: a single step of
    steepest descent from zero. Batches should not change from call to call more than the matrix.

    Cost: one product per call, and one more every m calls, where the subspace begins anew (the
    first time too); m + 5 vectors of state, :math:`O(m n)` arithmetic. Mapped with ``jax.vmap``
    every call computes both. Raises ``ValueError`` for fresh batches and for matrices that are not
    symmetric.

    Reference: Gao, Yang et al., "LancBiO: dynamic Lanczos-aided bilevel optimization via Krylov
    subspace", ICLR 2025. New vectors are made orthogonal to all kept ones, twice, here.
    """

    subspace: int = count(10)

    def __post_init__(self) -> None:
        check_settings(self)

    def init_state(self, like: Vector) -> Subspace:
        """A subspace without vectors, at zero."""
        zero = tree.zeros_accumulated(like)
        real = jnp.result_type(*jax.tree.leaves(zero), jnp.float32)
        m = self.subspace
        return Subspace(
            basis=tree.stacked_zeros(m, zero),
            direction=zero,
            matrix=jnp.zeros((m, m), real),
            origin=zero,
            image=zero,
            value=zero,
            size=jnp.zeros((), jnp.int32),
        )

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """A first call: a subspace of one vector."""
        return self.solve_from(mv, rhs, None, x0, key=key, certify=certify)[0]

    def solve_from(
        self,
        mv: MatVec,
        rhs: Vector,
        state: Subspace | None = None,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> tuple[LinearSolution, Subspace]:
        """Extend the subspace by one vector and solve in it; ``x0`` and ``key`` are not used."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        require_fixed(amap, "DynamicLanczos")
        require_symmetric(amap, "DynamicLanczos")
        empty = self.init_state(rhs)
        given = empty if state is None else state
        # Spoilt by an earlier call, it counts as none; this one's own NaN passes through.
        old: Subspace = tree.where(tree.all_finite(given), given, empty)
        begins = (old.size == 0) | (old.size == self.subspace) | _is_zero(old.direction)
        begun = jax.lax.cond(begins, lambda: self._begin(amap, rhs, old), lambda: old)
        grown = self._extend(amap, begun)
        residual = tree.sub(rhs, grown.image)
        value, low, high = self._project(grown, residual)
        value = tree.add(grown.origin, value)
        stats = {
            "num_matvecs": 1 + begins.astype(jnp.int32),
            "min_curvature": low,
            "max_curvature": high,
            "subspace": grown.size,
        }
        rounding = 10 * jnp.finfo(high.dtype).eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
        result = status_of(Status.ok, (low < -rounding, Status.negative_curvature))
        solution = finish(amap, rhs, value, stats, result, certify)
        return solution, grown._replace(value=value)

    def _begin(self, amap: LinearMap, rhs: Vector, state: Subspace) -> Subspace:
        """An empty subspace at the value that was reached, with the residual as its direction."""
        image = tree.cast_like(amap(state.value), rhs)
        residual = tree.sub(rhs, image)
        return Subspace(
            basis=jax.tree.map(jnp.zeros_like, state.basis),
            direction=tree.unit(residual),
            matrix=jnp.zeros_like(state.matrix),
            origin=state.value,
            image=image,
            value=state.value,
            size=jnp.zeros_like(state.size),
        )

    def _extend(self, amap: LinearMap, state: Subspace) -> Subspace:
        """One Lanczos step with the matrix of now."""
        i, v = state.size, state.direction
        image = tree.cast_like(amap(v), v)
        alpha = tree.vdot(v, image).astype(state.matrix.dtype)
        basis = tree.put(state.basis, v, i)
        scale, left = tree.norm(image), image
        for _ in range(2):
            left = orthogonal(basis, left)
        beta = tree.norm(left)
        # Below rounding the Krylov space is exhausted; what is left is noise, not a direction.
        alive = ~(beta <= 10 * jnp.finfo(beta.dtype).eps * scale)
        beta = jnp.where(alive, beta, 0)
        matrix = state.matrix.at[i, i].set(alpha)
        # The last row has no neighbour: an index out of range drops.
        beside = beta.astype(matrix.dtype)
        matrix = matrix.at[i, i + 1].set(beside, mode="drop").at[i + 1, i].set(beside, mode="drop")
        direction = tree.scale(jnp.where(alive, 1 / jnp.where(alive, beta, 1), 0), left)
        return state._replace(basis=basis, matrix=matrix, direction=direction, size=i + 1)

    def _project(self, state: Subspace, residual: Vector) -> tuple[Vector, Scalar, Scalar]:
        """The solution in the subspace, and the extreme eigenvalues of the projection."""
        rows = jnp.arange(self.subspace)
        known = rows < state.size
        # A Rayleigh quotient in the empty rows adds no eigenvalue outside those of the others.
        matrix = jnp.where(known[:, None] & known[None, :], state.matrix, 0)
        matrix = matrix + jnp.diag(jnp.where(known, 0, state.matrix[0, 0]))
        values, vectors = jnp.linalg.eigh(matrix)
        floor = self.subspace * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
        kept = ~(values <= floor)  # a NaN goes into the value instead of being left out
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        parts = [
            contract_leaf(b, x.astype(b.dtype), 0)
            for b, x in zip(jax.tree.leaves(state.basis), jax.tree.leaves(residual), strict=True)
        ]
        coefficients = sum(p.astype(values.dtype) for p in parts)
        solved = vectors @ (inverse * (vectors.T @ coefficients))
        value = jax.tree.map(
            lambda b: jnp.tensordot(solved.astype(b.dtype), b, axes=1), state.basis
        )
        return value, values[0], values[-1]


def _is_zero(v: Vector) -> Scalar:
    """Whether every entry is zero."""
    return tree.norm(v) == 0
