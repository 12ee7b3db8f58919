r"""The exact inverse of a damped Gauss–Newton matrix, in the batch x outputs dimension."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.factor import cholesky, solve
from bilevel.ground.linear_map import Dual
from bilevel.ground.settings import check_settings, count
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import (
    LinearSolution,
    as_map,
    contract,
    contract_leaf,
    finish,
    require_fixed,
    require_symmetric,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Woodbury:
    r"""Solves :math:`(Jᵀ Q J + D) q = g` exactly by the push-through identity

    .. math:: q = D^{-1}(g - Jᵀ (I + Q J D^{-1}Jᵀ)^{-1} Q J D^{-1} g)

    with J (m x n) the Jacobian of the model's m = batch x outputs numbers, Q (m x m) the
    Hessian of the output loss, and D the damping plus the diagonal of a separable penalty.

    Args:
      max_outputs: largest m accepted: the method stores an m x m matrix, and m vectors where it
        cannot go through layers.
      structured: go through the layers of the model where there are any.

    With ``GaussNewton(..., independent_examples=True)`` no row of J is stored for dense layers and
    convolutions with their biases: for a layer with inputs a and gradients :math:`δ` at its
    outputs

    .. math:: (J D^{-1} Jᵀ)_{nc,md} =
        ∑_l (a_{l n}ᵀ a_{l m} + 1) δ_{l n c}ᵀδ_{l m d} / ρ

    with sums over positions for a convolution, and unit by unit where a penalty gives every
    weight its own D. Layers are read off the model's program; other leaves keep their rows, and
    ``stats["covered"]`` is the share of the parameters that needs none.

    Needs ``GaussNewton(...)`` with :math:`D > 0`; where D is negative the value is not finite and
    the status ``negative_curvature``, where it is zero ``nonfinite_output``. A penalty whose
    Hessian is not diagonal is outside the method, and shows in the recomputed residual. The
    inverse is never taken of Q, which is singular for softmax.

    Cost: m backward passes, :math:`O(m^2 n + m^3)` arithmetic, mn numbers of memory. Through
    layers as many backward passes of the batch as an example has outputs,
    :math:`O(m^2 ∑_l d_l + m^3)` arithmetic with d the layers' outputs (times their inputs over
    m where D is not one number), some m x m matrices of memory: 668 672 weights and 2560 outputs
    take about 45 gradients and 90 MiB, where rows would take 7 GB. Worth it for m below about 2500
    and accuracy beyond some thirty CG steps. Raises ``ValueError`` without a Gauss–Newton operator
    and above ``max_outputs``.

    Over several devices the kernel pairs all examples. On explicit axes of a mesh each device takes
    the whole batch and all parameters, divided or not, and makes the whole kernel: more devices
    save neither time nor memory. On automatic ones the compiler divides a part. ``DualCG`` and
    ``CG`` divide all of their work.

    Reference: Korbit, Adeoye, Bemporad, Zanon, "Exact Gauss–Newton optimization for training
    deep neural networks", 2024; here for a general right side and a diagonal D.
    """

    max_outputs: int = count(8192)
    structured: bool = dataclasses.field(default=True, metadata={"static": True})

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
        require_fixed(amap, "Woodbury")
        require_symmetric(amap, "Woodbury")
        if amap.factors is None:
            raise ValueError(
                "Woodbury inverts J'QJ + D through its factors, which only a "
                "`GaussNewton(model, output_loss, ...)` operator has: pass one as "
                "`Implicit(operator=...)`."
            )
        if isinstance(amap.damping, (int, float)) and amap.damping == 0 and not amap.penalized:
            raise ValueError(
                "Woodbury divides by D, the damping plus the diagonal of the penalty, and this "
                "operator has neither: set `GaussNewton(damping=...)` above 0, or give it a "
                "`penalty`."
            )
        dual = amap.dual() if self.structured and amap.dual is not None else None
        if dual is not None:
            self._check_size(dual.size)
            diagonal = tree.cast_like(dual.diagonal, rhs)
            value = _by_layers(dual, diagonal, rhs)
            stats = {
                "num_matvecs": jnp.asarray(dual.num_products, jnp.int32),
                "covered": jnp.asarray(dual.covered, tree.norm(rhs).dtype),
            }
        else:
            rows, weights, diagonal = amap.factors()
            self._check_size(weights.shape[0])
            diagonal = tree.cast_like(diagonal, rhs)
            value = _by_rows(tree.accumulate(rows), tree.replicated(weights), diagonal, rhs)
            stats = {"num_matvecs": jnp.asarray(weights.shape[0], jnp.int32)}
        low = jnp.min(jnp.stack([jnp.min(d) for d in jax.tree.leaves(diagonal)]))
        stats["min_curvature"] = low
        solution = finish(amap, rhs, value, stats, status_of(Status.ok), certify)
        # The cause rather than its symptom, which would be a value that is not finite.
        result = status_of(solution.result, (low < 0, Status.negative_curvature))
        return solution._replace(result=result)

    def _check_size(self, m: int) -> None:
        if m > self.max_outputs:
            raise ValueError(
                f"Woodbury would store {m} Jacobian rows (batch x outputs), or as many equations, "
                f"above `max_outputs`={self.max_outputs}. Use a smaller inner batch, or `CG()`."
            )


def _by_rows(rows: Vector, weights: jax.Array, diagonal: Vector, rhs: Vector) -> Vector:
    """The solution from all rows of the Jacobian."""
    m = weights.shape[0]
    # Both factors of J D^-1 J' are the same J D^-1/2, so that one m x n array is enough.
    # D^-1/2; where D is negative it is NaN, and with it the value.
    root = jax.tree.map(jax.lax.rsqrt, diagonal)
    half = jax.tree.map(lambda j, d: j * d[None], rows, root)
    kernel = contract(half, half)
    system = jnp.eye(m, dtype=kernel.dtype) + weights.astype(kernel.dtype) @ kernel
    scaled = jax.tree.map(jnp.multiply, rhs, root)
    # As a vector: a product with one column would walk the m x n array far more slowly.
    projected = functools.reduce(
        jnp.add,
        [
            contract_leaf(h, g, 0)
            for h, g in zip(jax.tree.leaves(half), jax.tree.leaves(scaled), strict=True)
        ],
    )
    inner = solve(system, weights.astype(kernel.dtype) @ projected)
    return jax.tree.map(
        lambda g, d, h: (g - jnp.tensordot(inner.astype(h.dtype), h, axes=1)) * d,
        scaled,
        root,
        half,
    )


def _by_layers(dual: Dual, diagonal: Vector, rhs: Vector) -> Vector:
    """The solution from the m x m kernel alone: rows appear only as products with J and J'."""
    root = jax.tree.map(jax.lax.rsqrt, diagonal)  # NaN where D is negative, and with it the value
    inverse = jax.tree.map(jnp.square, root)
    kernel = dual.kernel(inverse, dual.root)
    scaled = jax.tree.map(jnp.multiply, rhs, inverse)
    projected = dual.push(scaled).astype(kernel.dtype)

    def blocks(u: jax.Array, transposed: bool) -> jax.Array:
        pattern = "nij,ni->nj" if transposed else "nij,nj->ni"
        root = dual.root.astype(u.dtype)
        return jnp.einsum(pattern, root, u.reshape(root.shape[:2])).reshape(-1)

    def by_root(kernel: jax.Array, u: jax.Array) -> jax.Array:
        # (I + QK)^-1 Q = R (I + R'KR)^-1 R', symmetric: half the work of a general system.
        system = kernel + jnp.eye(dual.size, dtype=kernel.dtype)
        factor = cholesky(system)
        return blocks(jax.scipy.linalg.cho_solve((factor, True), blocks(u, True)), False)

    def by_weights(kernel: jax.Array, u: jax.Array) -> jax.Array:
        # (I + QK)^-1 Q = Q (I + KQ)^-1, and the rows of KQ are Q times the rows of K.
        whole = jnp.tril(kernel) + jnp.tril(kernel, -1).T
        system = jax.vmap(lambda row: dual.weigh(row).astype(row.dtype))(whole)
        system = system + jnp.eye(dual.size, dtype=kernel.dtype)
        return dual.weigh(solve(system, u)).astype(u.dtype)

    inner = jax.lax.cond(dual.is_root, by_root, by_weights, kernel, projected)
    back = tree.cast_like(dual.pull(inner), rhs)
    return jax.tree.map(lambda g, d, x: g - d * x, scaled, inverse, back)
