r"""A matrix as a function that may also tell its structure: what operators give to solvers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector


class Factors(NamedTuple):
    r""":math:`A = Jᵀ Q J + D` with :math:`D` diagonal and positive.

    Attributes:
      rows: tree like the vectors, each leaf with a leading axis of ``m`` = batch x outputs:
        the Jacobian of the flattened model outputs.
      weights: (m, m), the Hessian :math:`Q` of the output loss, PSD.
      diagonal: tree like the vectors, damping included.
    """

    rows: Vector
    weights: jax.Array
    diagonal: Vector


class Dual(NamedTuple):
    r""":math:`A = Jᵀ Q J + D` as :class:`Factors`, without the rows of J.

    Attributes:
      kernel: :math:`(d, R) ↦ Rᵀ J diag(d) Jᵀ R`, (m, m), for blocks R;
        the lower triangle of it, with anything above.
      root: blocks R, (N, C, C), with :math:`R Rᵀ = Q`, or the identity; NC = m.
      is_root: whether R is that root rather than the identity, traced.
      push: :math:`v ↦ J v`, (m,).
      pull: :math:`u ↦ Jᵀ u`.
      weigh: :math:`u ↦ Q u`.
      diagonal: D, tree like the vectors, damping included.
      size: m.
      num_products: products that the kernel costs, at most.
      covered: share of the entries of a vector that no row is stored for.
    """

    kernel: Callable[[Vector, jax.Array], jax.Array]
    root: jax.Array
    is_root: jax.Array
    push: Callable[[Vector], jax.Array]
    pull: Callable[[jax.Array], Vector]
    weigh: Callable[[jax.Array], jax.Array]
    diagonal: Vector
    size: int
    num_products: int
    covered: float


class Parts(NamedTuple):
    r""":math:`A = Jᵀ Q J + D` as its factors, for methods whose vectors are outputs.

    Attributes:
      push: :math:`v ↦ J v`, shaped like the outputs.
      pull: :math:`u ↦ Jᵀ u`.
      weigh: :math:`u ↦ Q u`.
      kernel: :math:`d ↦ (u ↦ J diag(d) Jᵀ u)`.
      diagonal: D, tree like the vectors, damping included.
      covered: share of the entries of a vector that the kernel makes no gradient for.
    """

    push: Callable[[Vector], Any]
    pull: Callable[[Any], Vector]
    weigh: Callable[[Any], Any]
    kernel: Callable[[Vector], Callable[[Any], Any]]
    diagonal: Vector
    covered: float


class Kronecker(NamedTuple):
    r"""Blocks :math:`L_i ⊗ R_i` of :math:`M`, and what stands beside them.

    Attributes:
      split: the parts of a vector that the blocks act on, as matrices; linear.
      factors: :math:`(L_i, R_i)`; block i maps :math:`V ↦ L_i V R_i`.
      moments: for orthogonal :math:`(U_i, W_i)` and a rank r the diagonals of M in those bases,
        shaped like the matrices, and r vectors there with :math:`BBᵀ ≤ M`, stacked.
      known: D, tree like the vectors, damping included.
      rest: mean curvature of each leaf, as scalars, without D.
      has_block: whether a leaf is in a block, as Python booleans.
      num_products: products that the factors cost, at most; the moments cost as many again.
      covered: share of the entries of a vector that are in a block.
    """

    split: Callable[[Vector], list[jax.Array]]
    factors: list[tuple[jax.Array, jax.Array]]
    moments: Callable[
        [list[tuple[jax.Array, jax.Array]], int], tuple[list[jax.Array], list[jax.Array]]
    ]
    known: Vector
    rest: Vector
    has_block: Any
    num_products: int
    covered: float


class SampledDiagonal(NamedTuple):
    r""":math:`diag(M + ρ I) = d + E[s]`.

    Attributes:
      known: returns :math:`d ≥ 0`, damping included.
      sample: draws :math:`s` from a key; its mean is not negative.
    """

    known: Callable[[], Vector]
    sample: Callable[[Key], Vector]


@dataclasses.dataclass(frozen=True)
class LinearMap:
    r""":math:`v ↦ (M + ρ I) v`, with optional structure.

    Attributes:
      undamped: :math:`v ↦ M v`.
      damping: :math:`ρ`, a Python float or a scalar array.
      unroll: loops over products should be written out (convolutions on CPU).
      diagonal: returns the exact diagonal of :math:`M + ρ I`, where known.
      sampled: :class:`SampledDiagonal`, where there is a better estimate than Hutchinson's.
      factors: returns :class:`Factors`, where known.
      penalized: whether :class:`Factors` have a diagonal of their own, beside the damping.
      fresh: ``fresh(v, i)`` is the damped product on batch ``i``, where batches are fresh.
      transpose: :math:`v ↦ Mᵀ v`; ``None`` for a symmetric M.
      dual: returns a :class:`Dual`, or None where the model has no layers to read it from.
      parts: returns :class:`Parts`, where known.
      kronecker: returns a :class:`Kronecker`, of a number of samples (None: no sampling) and key.
    """

    undamped: MatVec
    damping: Any = 0.0
    unroll: bool = False
    diagonal: Callable[[], Vector] | None = None
    sampled: SampledDiagonal | None = None
    factors: Callable[[], Factors] | None = None
    penalized: bool = False
    fresh: Callable[[Vector, Any], Vector] | None = None
    transpose: MatVec | None = None
    dual: Callable[[], Dual | None] | None = None
    parts: Callable[[], Parts] | None = None
    kronecker: Callable[[int | None, Key | None], Kronecker] | None = None

    def transposed(self) -> "LinearMap":
        """The map of the transposed matrix; a symmetric one is its own."""
        if self.transpose is None:
            return self
        return dataclasses.replace(self, undamped=self.transpose, transpose=self.undamped)

    def __call__(self, v: Vector) -> Vector:
        product = tree.cast_like(self.undamped(v), v)
        if isinstance(self.damping, (int, float)) and self.damping == 0:
            return product
        return tree.axpy(self.damping, v, product)
