r"""The Nyström inverse: a low-rank sketch of the operator, inverted exactly."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.factor import solve
from bilevel.ground.keys import require_key
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.settings import check_settings, count
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import (
    LinearSolution,
    Refreshed,
    as_map,
    contract,
    contract_leaf,
    finish,
    refreshed,
    replicated_if_explicit,
    require_fixed,
    require_symmetric,
)
from bilevel.linear.precondition import Prepared


class _Sketch(NamedTuple):
    low_rank: Vector  # C, (k, ...) in each leaf
    eigenvalues: jax.Array  # of the core


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nystrom:
    r"""Solves :math:`(M_k + ρ I) q = g` with :math:`M_k` of rank k, :math:`ρ` the damping.

    .. math:: M_k = (MΩ)(Ωᵀ M Ω)^{+}(MΩ)ᵀ,
        q = \tfrac1ρ(g - C(ρ I + Cᵀ C)^{-1}Cᵀ g),  M_k = CCᵀ

    :math:`Ω` (n x k) picks k random coordinates, or is Gaussian. With :math:`M` PSD and
    :math:`e = ‖M - M_k‖`

    .. math:: ‖q - (M+ρ I)^{-1}g‖ ≤ ‖g‖/ρ \frac{e}{ρ + e},

    exact at full rank. No iteration, so nothing can diverge for any :math:`ρ > 0`.

    ``CG(preconditioner=Nystrom(rank))`` uses the same sketch to turn the largest eigenvalues into
    one, and CG does the rest: k products more, and the exact solution.

    Args:
      rank: k, the number of products.
      gaussian: draw a Gaussian sketch instead of coordinates: better where curvature is
        spread over many coordinates.
      refresh_every: calls of a loop that one sketch serves, carried in the state of the response.
        The residual, which is that of the matrix as it is now, tells when it is too old.

    The operator must be damped (``Hessian(damping=...)``); the core :math:`Ωᵀ MΩ`
    is inverted on its positive eigenvalues only, and a clearly negative one gives status
    ``negative_curvature``.

    Cost: k products in sequence (none where a sketch is carried), k + 3 vectors of memory,
    :math:`O(k^2 n)` arithmetic. Raises ``ValueError`` for a missing key, zero damping, or
    ``rank`` above n.

    Reference: Hataya, Yamada, "Nyström method for accurate and scalable implicit
    differentiation", AISTATS 2023. The core is inverted through its eigenvalues here, where
    theirs is a plain solve that dead coordinates make singular. As a preconditioner Frangella,
    Tropp, Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 2023.
    """

    rank: int = count(20)
    gaussian: bool = dataclasses.field(default=False, metadata={"static": True})
    refresh_every: int = count(1)

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
        """Sketch and solve; ``x0`` is not used."""
        return self.solve_from(mv, rhs, None, x0, key=key, certify=certify)[0]

    def init_state(self, like: Vector) -> Refreshed | None:
        """No sketch yet; ``None`` where each call draws its own."""
        if self.refresh_every == 1:
            return None
        like = tree.zeros_accumulated(like)
        stack = tree.stacked_zeros(self.rank, like)
        dtype = jnp.result_type(*jax.tree.leaves(like))
        return Refreshed(_Sketch(stack, jnp.zeros(self.rank, dtype)), jnp.zeros((), jnp.int32))

    def solve_from(
        self,
        mv: MatVec,
        rhs: Vector,
        state: Refreshed | None = None,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> tuple[LinearSolution, Refreshed | None]:
        """Solve with the sketch in ``state`` while it is to be kept, else with a new one."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        (low_rank, eigenvalues), made, state = self._sketch_from(amap, rhs, key, state)
        small = self._negligible(eigenvalues)
        damping = jnp.asarray(amap.damping, eigenvalues.dtype)
        gram = contract(low_rank, low_rank)
        system = gram + damping * jnp.eye(self.rank, dtype=gram.dtype)
        inner = solve(system, _inner(low_rank, rhs))
        value = jax.tree.map(
            lambda g, c: (
                (g - jnp.tensordot(inner.astype(c.dtype), c, axes=1)) / damping.astype(g.dtype)
            ),
            rhs,
            low_rank,
        )
        stats = {"num_matvecs": jnp.asarray(made, jnp.int32)}
        if not self.gaussian:  # a coordinate core is a principal submatrix: its spectrum is inside
            stats["min_curvature"] = eigenvalues[0] + damping
            stats["max_curvature"] = eigenvalues[-1] + damping
        # Rounding alone makes tiny negative eigenvalues of a PSD core.
        indefinite = eigenvalues[0] < -1e3 * small
        result = status_of(Status.ok, (indefinite, Status.negative_curvature))
        return finish(amap, rhs, value, stats, result, certify), state

    def prepare(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Prepared:
        """The preconditioner of CG, see :meth:`prepare_from`."""
        return self.prepare_from(mv, rhs, key, None)[0]

    def prepare_from(
        self, mv: LinearMap, rhs: Vector, key: Key | None, state: Refreshed | None
    ) -> tuple[Prepared, Refreshed | None]:
        r"""The preconditioner of CG; its stats tell nothing.

        With :math:`M_k = U Λ Uᵀ`, and :math:`λ_k` the least of :math:`Λ`,

        .. math:: P^{-1} = (λ_k + ρ) U(Λ + ρ I)^{-1}Uᵀ + (I - UUᵀ)
        """
        (low_rank, _), made, state = self._sketch_from(mv, rhs, key, state)
        gram = contract(low_rank, low_rank)
        values, basis = jnp.linalg.eigh((gram + gram.T) / 2)
        kept = values > self.rank * jnp.finfo(values.dtype).eps * values[-1]
        damping = jnp.asarray(mv.damping, values.dtype)
        # A direction the sketch did not see is left as it is, like all outside of it.
        least = jnp.min(jnp.where(kept, values, values[-1])) + damping
        safe = jnp.where(kept, values, 1)
        weights = jnp.where(kept, (least / (safe + damping) - 1) / safe, 0)
        core = (basis * weights[None]) @ basis.T

        def apply(r: Vector) -> Vector:
            inner = core @ _inner(low_rank, r)
            return jax.tree.map(
                lambda x, c: x + jnp.tensordot(inner.astype(c.dtype), c, axes=1).astype(x.dtype),
                r,
                low_rank,
            )

        return Prepared(apply, made, {}), state

    def _sketch_from(
        self, amap: LinearMap, rhs: Vector, key: Key | None, state: Refreshed | None
    ) -> tuple["_Sketch", Any, Refreshed | None]:
        """The sketch of this call, its products, and the next state."""
        key = require_key(key, "Nystrom")
        require_fixed(amap, "Nystrom")
        require_symmetric(amap, "Nystrom")
        if isinstance(amap.damping, (int, float)) and amap.damping <= 0:
            raise ValueError(
                "Nystrom approximates (M + damping I)^-1 and needs `damping` > 0 in its operator, "
                f"got {amap.damping}: use e.g. `Hessian(damping=0.1)`."
            )
        n = tree.size(rhs)
        if self.rank > n:
            raise ValueError(f"`rank`={self.rank} exceeds the {n} inner parameters.")
        if self.refresh_every == 1:
            return self._sketch(amap, rhs, key), self.rank, None
        return refreshed(lambda: self._sketch(amap, rhs, key), self.rank, self.refresh_every, state)

    def _sketch(self, amap: LinearMap, rhs: Vector, key: Key) -> "_Sketch":
        r"""C with :math:`M_k = CCᵀ`, by k products, and the eigenvalues of the core."""
        # The k largest of n uniform numbers are a uniform draw without replacement.
        chosen = (
            None
            if self.gaussian
            else jax.lax.top_k(jax.random.uniform(key, (tree.size(rhs),)), self.rank)[1]
        )
        test = self._test_vectors(key, rhs, chosen)
        if amap.unroll:
            images = [amap.undamped(test(i)) for i in range(self.rank)]
            columns = jax.tree.map(lambda *x: jnp.stack(x), *images)
        else:
            columns = jax.lax.map(lambda i: amap.undamped(test(i)), jnp.arange(self.rank))
        columns = tree.accumulate(columns)

        if chosen is None:
            core = jax.lax.map(lambda i: _inner(columns, test(i)), jnp.arange(self.rank))
        else:
            core = _entries(columns, chosen)
        eigenvalues, basis = jnp.linalg.eigh((core + core.T) / 2)
        kept = eigenvalues > self._negligible(eigenvalues)
        root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, eigenvalues, 1)), 0)
        low_rank = jax.tree.map(  # C: the columns in the core's eigenbasis, scaled
            lambda c: jnp.tensordot((basis * root[None, :]).T.astype(c.dtype), c, axes=1), columns
        )
        return _Sketch(low_rank, eigenvalues)

    def _negligible(self, eigenvalues: jax.Array) -> jax.Array:
        """What rounding alone may leave of an eigenvalue of zero."""
        eps = jnp.finfo(eigenvalues.dtype).eps
        return self.rank * eps * jnp.max(jnp.abs(eigenvalues))

    def _test_vectors(self, key: Key, rhs: Vector, chosen: jax.Array | None) -> Any:
        """``i -> column i`` of the test matrix, made when asked for: it is never stored."""
        if chosen is None:
            keys = jax.random.split(key, self.rank)
            # Added to zeros, which have the sharding of the vectors on an explicit mesh.
            return lambda i: tree.add(
                jax.tree.map(jnp.zeros_like, rhs),
                tree.random_like(keys[i], rhs, jax.random.normal),
            )
        leaves, treedef = jax.tree.flatten(rhs)
        offsets = np.cumsum([0, *(leaf.size for leaf in leaves)])

        def unit(i: Any) -> Vector:
            return jax.tree.unflatten(
                treedef,
                [
                    _unit_like(leaf, chosen[i] - offset)
                    for offset, leaf in zip(offsets, leaves, strict=False)
                ],
            )

        return unit


def _unit_like(leaf: jax.Array, position: jax.Array) -> jax.Array:
    """1 at ``position`` of ``leaf`` laid out as one axis, 0 elsewhere; 0 for a position outside.

    Compared axis by axis, in the shape and sharding of ``leaf``.
    """
    here = (position >= 0) & (position < leaf.size)
    for axis, index in enumerate(jnp.unravel_index(position, leaf.shape)):
        here = here & (jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis) == index)
    return jnp.where(here, 1, jnp.zeros_like(leaf))


def _entries(columns: Vector, chosen: jax.Array) -> jax.Array:
    """(k, k) entries of the stacked columns at the chosen coordinates: read, not multiplied out."""
    core, offset = jnp.zeros((), jnp.float32), 0
    for c in jax.tree.leaves(columns):
        size = c[0].size
        local = chosen - offset
        here = (local >= 0) & (local < size)
        # Read axis by axis: laying a sharded leaf out as one axis would gather it.
        index = jnp.unravel_index(jnp.clip(local, 0, size - 1), c.shape[1:])
        ndim = 2 if index else 1
        read = c.at[(slice(None), *index)].get(
            mode="promise_in_bounds", out_sharding=replicated_if_explicit(c, ndim)
        )
        read = read if index else read[:, None]
        core = core + jnp.where(here[None, :], read, 0)
        offset += size
    return core


def _inner(columns: Vector, v: Vector) -> jax.Array:
    """(k,) inner products of the stacked columns with one vector."""
    parts = [
        contract_leaf(c, x.astype(c.dtype), 0)
        for c, x in zip(jax.tree.leaves(columns), jax.tree.leaves(v), strict=True)
    ]
    return functools.reduce(jnp.add, parts)
