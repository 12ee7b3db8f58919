r"""KFAC and EKFAC: the inverse layer by layer, as a preconditioner of CG or on its own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.factor import cholesky
from bilevel.ground.keys import require_key
from bilevel.ground.linear_map import Kronecker, LinearMap
from bilevel.ground.settings import check_settings, count, real
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import (
    LinearSolution,
    as_map,
    contract,
    finish,
    require_fixed,
    require_symmetric,
)
from bilevel.linear.precondition import Prepared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KFAC:
    r"""The preconditioner with one Kronecker product per layer, for a Gauss–Newton matrix.

    .. math:: P = ⨁_l A_l ⊗ G_l + m ρ_l I

    with :math:`A_l = E[a aᵀ]` of the layer's inputs (a one behind them for its bias)
    and :math:`G_l = E[δδᵀ]` of the gradients at its outputs, drawn from the
    Hessian of the output loss; a convolution counts each position as an example.
    :math:`ρ_l` is the damping plus the mean of the penalty's diagonal in the layer, and m
    ``damping_multiple``. It is added as it is, through the eigenvectors of both factors; split
    between them, as is usual for cheaper inverses, it also multiplies what is large in one factor
    alone.

    Layers are read off the model's program: kernels of dense layers and convolutions, and biases
    added to them. Every other leaf (scales of a normalization, embeddings, a kernel in a loop or in
    two layers) is scaled by its mean curvature; the share of the parameters that is in layers
    is ``stats["covered"]``.

    Args:
      num_samples: backward passes for the :math:`G_l`, with random signs drawn from ``key``.
        ``None``: one for each output of an example, and nothing is drawn.
      damping_multiple: m. On a small batch the factors' product has a far higher rank than the
        matrix, and what is small in it is mostly curvature that is not there; above 1, less of it
        is divided out.

    Cost: ``num_samples`` products, :math:`O(∑_l d_l^3)` arithmetic for the eigenvectors of the
    factors and :math:`O(∑_l d_l n_l)` a step of CG, with d the width of the layer and
    n its parameters: on a small batch as much as a product itself. It pays for loose tolerances,
    and for batch times outputs well above the widths of the layers: a residual of 0.1 at damping
    1e-3, after 100 steps of SGD, takes an MLP 784-512-512-10 on 1024 images of MNIST 33 products
    instead of 94 (30 with exact factors and ``damping_multiple=10``), a CNN on 64 of CIFAR-10 34
    instead of 78 (44 with that multiple). On a small batch the Gauss–Newton matrix is of low rank
    and no Kronecker product is: on 256 of those images 93 are left of 98 (67 with the multiple),
    and on standardized inputs all (``python -m experiments.bench.products``); there ``DualCG``
    makes each product cheaper, and ``Woodbury`` needs none. Raises ``ValueError`` without a
    ``GaussNewton`` operator, for a model without layers, and for a missing key.

    Reference: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", ICML 2015; Grosse, Martens, "A Kronecker-factored approximate Fisher matrix for
    convolution layers", ICML 2016.
    """

    num_samples: int | None = count(1, optional=True)
    damping_multiple: float | jax.Array = real(1.0, low=0, strict=True)

    def __post_init__(self) -> None:
        check_settings(self)

    def prepare(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Prepared:
        """The factors, inverted."""
        found = _found(mv, self.num_samples, key, "KFAC")
        pairs = [(jnp.linalg.eigh(a), jnp.linalg.eigh(g)) for a, g in found.factors]
        bases = [(u, w) for (_, u), (_, w) in pairs]
        scales = [jnp.maximum(a, 0)[:, None] * jnp.maximum(g, 0)[None] for (a, _), (g, _) in pairs]
        return _prepared(found, rhs, bases, scales, [], found.num_products, self.damping_multiple)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EKFAC:
    r"""The inverse in the eigenbases of KFAC's factors, with the diagonal measured there.

    .. math:: P = V (diag(s - ∑_j b_j^2) + m ρ + ∑_{j=1}^r b_j b_jᵀ) Vᵀ,
        V = ⨁_l U_l ⊗ W_l, s = diag(Vᵀ M V)

    with M the Gauss–Newton matrix, ρ in each layer as for :class:`KFAC`, and r the ``rank``. A
    solver of its own, which makes no products, and a preconditioner of CG. Of all matrices diagonal
    in these bases, P without rank is the nearest to each layer's block; it equals the block where
    the block is a Kronecker product (one layer and one example, or a squared loss), and between
    layers it sees nothing. The recomputed residual says how far it is off.

    Gauss–Newton matrices of classifiers have a few dozen large eigenvalues, with eigenvectors near
    mean gradients of classes, which no Kronecker product holds. With a ``rank`` they are read off
    the same backward passes: examples are put in ten groups of equal size, neighbours in the order
    of their largest output, and :math:`BBᵀ` is the best of rank r, merged unit by unit, for the
    part of M between the groups. It spans all layers, and lies below M, so that what is left for
    the diagonal is positive.

    Args:
      num_samples: as in :class:`KFAC`; ``None``, the default, is exact where examples do not
        depend on each other.
      damping_multiple: m, as in :class:`KFAC`, for the preconditioner; the solver has 1.
      rank: r, the vectors beside the diagonal; needs ``num_samples=None``, and the batch as first
        axis of the outputs and of each layer's inputs.

    Cost: that of :class:`KFAC` with twice the backward passes. A rank takes 3r + 20 vectors of
    memory while it is made, r after that, and :math:`O(r n)` arithmetic in each step of CG. In the
    setting of :class:`KFAC` CG makes 33 products of 94 on the MLP and 24 of 78 on the CNN, with
    ``rank=20`` 24 and 16 (on a CNN from another seed 32 of 85), on 256 images 52 of 98 (without
    rank). Raises as :class:`KFAC`, and for a rank with samples.

    Reference: George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis", NeurIPS 2018. Means over classes: Papyan, "Traces
    of class/cross-class structure pervade deep learning spectra", JMLR 2020.
    """

    num_samples: int | None = count(None, optional=True)
    damping_multiple: float | jax.Array = real(10.0, low=0, strict=True)
    rank: int = count(0, low=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.rank > 0 and self.num_samples is not None:
            raise ValueError(
                f"`rank`={self.rank} needs the same columns from all examples: leave `num_samples` "
                f"at None, got {self.num_samples}."
            )

    def prepare(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Prepared:
        """Eigenbases, and the diagonals in them."""
        return self._prepare(mv, rhs, key, self.damping_multiple)

    def _prepare(self, mv: LinearMap, rhs: Vector, key: Key | None, multiple: Any) -> Prepared:
        found = _found(mv, self.num_samples, key, "EKFAC")
        bases = [(jnp.linalg.eigh(a)[1], jnp.linalg.eigh(g)[1]) for a, g in found.factors]
        moments, largest = found.moments(bases, self.rank)
        # What the vectors hold is not counted twice; rounding may leave less than nothing.
        pairs = zip(moments, largest, strict=True)
        rest = [jnp.maximum(s - jnp.sum(b * b, 0), 0) for s, b in pairs]
        return _prepared(found, rhs, bases, rest, largest, 2 * found.num_products, multiple)

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """Apply the inverse once; ``x0`` is not used."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        require_fixed(amap, "EKFAC")
        require_symmetric(amap, "EKFAC")
        prepared = self._prepare(amap, rhs, key, 1.0)
        stats = {**prepared.stats, "num_matvecs": jnp.asarray(prepared.num_products, jnp.int32)}
        value = prepared.apply(rhs)
        return finish(amap, rhs, value, stats, status_of(Status.ok), certify)


def _found(mv: LinearMap, num_samples: int | None, key: Key | None, name: str) -> Kronecker:
    if mv.kronecker is None:
        raise ValueError(
            f"{name} reads its factors off the layers of a model, which only a "
            "`GaussNewton(model, output_loss, ...)` operator has: pass one as "
            "`Implicit(operator=...)`."
        )
    if isinstance(mv.damping, (int, float)) and mv.damping == 0 and not mv.penalized:
        raise ValueError(
            f"{name} inverts factors that may be singular, and this operator has neither "
            "damping nor a penalty: set `GaussNewton(damping=...)` above 0."
        )
    if num_samples is not None:
        key = require_key(key, f"{name} with `num_samples`")
    found = mv.kronecker(num_samples, key)
    if not found.factors:
        raise ValueError(
            f"{name} found no dense or convolutional layer in the model: no leaf of the parameters "
            "is the kernel of just one `dot_general` or `conv_general_dilated` outside loops. Use "
            "`CG(preconditioner=Diagonal())`."
        )
    return found


def _blocks(
    found: Kronecker,
    bases: list[tuple[jax.Array, jax.Array]],
    scales: list[jax.Array],
    largest: list[jax.Array],
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    r"""The inverse of diagonals in the bases, with the mean of D there, plus :math:`BBᵀ`.

    .. math:: (S + BBᵀ)^{-1} = S^{-1} - S^{-1}B(I + Bᵀ S^{-1}B)^{-1}Bᵀ S^{-1}
    """
    known = [jnp.mean(d) for d in found.split(found.known)]
    diagonals = [s + shift for s, shift in zip(scales, known, strict=True)]
    rank = largest[0].shape[0] if largest else 0
    if rank > 0:
        parts = [contract(b / s[None], b) for b, s in zip(largest, diagonals, strict=True)]
        # Factored here, once, and not in every step of CG.
        factor = cholesky(functools.reduce(jnp.add, parts, jnp.eye(rank, dtype=parts[0].dtype)))

    def blocks(matrices: list[jax.Array]) -> list[jax.Array]:
        made = []
        for v, (u, w), s in zip(matrices, bases, diagonals, strict=True):
            made.append(u.astype(v.dtype).T @ v @ w.astype(v.dtype) / s.astype(v.dtype))
        if rank > 0:
            both = zip(largest, made, strict=True)
            seen = [jnp.tensordot(b, v.astype(b.dtype), 2) for b, v in both]
            total = functools.reduce(jnp.add, seen)
            inner = jax.scipy.linalg.cho_solve((factor, True), total)
            lifts = zip(made, largest, diagonals, strict=True)
            made = [v - (jnp.tensordot(inner, b, 1) / s).astype(v.dtype) for v, b, s in lifts]
        turns = zip(made, bases, strict=True)
        return [u.astype(v.dtype) @ v @ w.astype(v.dtype).T for v, (u, w) in turns]

    return blocks


def _prepared(
    found: Kronecker,
    rhs: Vector,
    bases: list[tuple[jax.Array, jax.Array]],
    scales: list[jax.Array],
    largest: list[jax.Array],
    num_products: int,
    multiple: Any,
) -> Prepared:
    """The blocks on the layers, and a scalar on every other leaf, with ``multiple`` D added."""
    known = jax.tree.map(tree.replicated, tree.scale(multiple, found.known))
    found = found._replace(known=known)
    blocks = _blocks(found, bases, scales, largest)
    join = jax.linear_transpose(found.split, jax.tree.map(tree.replicated, rhs))

    def scale(r: jax.Array, inside: bool, mean: jax.Array, known: jax.Array) -> jax.Array:
        return jnp.zeros_like(r) if inside else r / (mean + known).astype(r.dtype)

    def apply(divided: Vector) -> Vector:
        # Both factors mix a whole axis of a weight: of an explicit mesh each device takes all.
        r = jax.tree.map(tree.replicated, divided)
        apart = jax.tree.map(scale, r, found.has_block, found.rest, known)
        whole = tree.add(join(blocks(found.split(r)))[0], apart)
        return jax.tree.map(tree.placed_like, whole, divided)

    covered = jnp.asarray(found.covered, tree.norm(rhs).dtype)
    return Prepared(apply, num_products, {"covered": covered})
