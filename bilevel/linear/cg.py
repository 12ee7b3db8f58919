r"""Preconditioned conjugate gradients, which never evaluates :math:`A\,0`."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.aliases import Key, MatVec, Scalar, Vector
from bilevel.linear.base import (
    LinearSolution,
    as_map,
    finish,
    require_fixed,
    status_of,
)
from bilevel.linear.precondition import Diagonal
from bilevel.linear_map import LinearMap
from bilevel.settings import check_settings, count, real
from bilevel.status import Status


class _Carry(NamedTuple):
    step: jax.Array
    x: Vector
    r: Vector
    p: Vector
    rz: Scalar
    curvature: jax.Array  # (2,), the least and greatest met; as one buffer XLA packs tighter
    rr: Scalar
    indefinite: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CG:
    r"""Solves :math:`A q = g` for symmetric positive definite A.

    .. math:: \|q_k - q\|_A \le
        2 \left(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\right)^k \|q_0 - q\|_A

    with :math:`\kappa` the condition number (of :math:`P^{-1}A` when preconditioned).

    Args:
      max_steps: most products of the iteration, and the budget when no tolerance is given.
      rtol, atol: stop at :math:`\|r\| \le \max(rtol\,\|g\|, atol)`. Both ``None``: a fixed
        budget was asked for, and spending it is status ``ok``; with a tolerance, an unmet one
        is ``max_steps``. One unit of rounding, :math:`\epsilon\,\|g\|`, always counts as met.
      preconditioner: ``None`` or :class:`Diagonal`.
      unroll: straight-line code instead of a loop (then all ``max_steps`` products are
        computed, those after convergence without effect); ``None`` decides by itself
        (convolutions on CPU).

    A direction of non-positive curvature ends the iteration at the last good iterate with
    status ``negative_curvature`` and its value in ``stats["min_curvature"]``. If the
    recurrence claims a convergence that the recomputed residual denies by a factor of ten,
    the status is ``stagnated``. A warm start worse than zero is dropped for zero. Vectors
    and inner products are at least float32.

    Cost: one product a step, plus one for a warm start, plus those of the preconditioner;
    four vectors (five preconditioned). Raises ``ValueError`` for settings out of range and
    for fresh batches, under which the directions lose conjugacy and the iteration diverges.

    Reference: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems",
    1952; for hypergradients Pedregosa, ICML 2016, and Rajeswaran et al., NeurIPS 2019.
    """

    max_steps: int = count(100)
    rtol: float | jax.Array | None = real(None, low=0, optional=True)
    atol: float | jax.Array | None = real(None, low=0, optional=True)
    preconditioner: Diagonal | None = None
    unroll: bool | None = dataclasses.field(default=None, metadata={"static": True})

    uses_start: ClassVar[bool] = True

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
        """Iterate from ``x0`` (from zero, without a product, for ``None``)."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        require_fixed(amap, "CG")
        unroll = amap.unroll if self.unroll is None else self.unroll
        tolerance, has_tolerance = self._tolerance(rhs)

        inverse, extra = None, 0
        if self.preconditioner is not None:
            inverse = self.preconditioner.inverse(amap, rhs, key)
            extra = self.preconditioner.num_products(amap)
        x, r = _start(amap, rhs, x0)
        z = _apply(inverse, r)
        rr = tree.vdot(r, r)
        first = _Carry(
            step=jnp.zeros((), jnp.int32),
            x=x,
            r=r,
            p=z,
            rz=tree.vdot(r, z),
            curvature=jnp.asarray([jnp.inf, -jnp.inf], rr.dtype),
            rr=rr,
            indefinite=jnp.asarray(False),
        )

        def going(c: _Carry) -> jax.Array:
            # `not <=` rather than `>`: a NaN residual must run into the value, not hide.
            unmet = ~(c.rr <= tolerance**2)
            return (c.step < self.max_steps) & unmet & ~c.indefinite & ~jnp.isnan(c.rr)

        def advance(c: _Carry) -> _Carry:
            return _advance(amap, inverse, c)

        if unroll:
            last = first
            for _ in range(self.max_steps):
                last = tree.where(going(last), advance(last), last)
        else:
            last = jax.lax.while_loop(going, advance, first)

        products = last.step + extra + (0 if x0 is None else 1)
        low, high = last.curvature
        stats = {"num_matvecs": products, "min_curvature": low, "max_curvature": high}
        unmet = last.rr > tolerance**2
        result = status_of(
            Status.ok,
            (last.indefinite, Status.negative_curvature),
            (unmet & has_tolerance, Status.max_steps),
        )
        # A NaN or an overflow on the way makes the whole value NaN: an infinite right side
        # would otherwise meet its infinite tolerance at zero, and look like an answer.
        lost = ~jnp.isfinite(last.rr)
        value = jax.tree.map(lambda v: jnp.where(lost, jnp.nan, v), last.x)
        solution = finish(amap, rhs, value, stats, result, certify)
        if not (certify and has_tolerance):
            return solution
        stale = (solution.stats["residual_norm"] > 10 * tolerance) & (solution.result == 0)
        return solution._replace(result=status_of(solution.result, (stale, Status.stagnated)))

    def _tolerance(self, rhs: Vector) -> tuple[Scalar, bool]:
        norm = tree.norm(rhs)
        # Below this the recurrence goes on shrinking while the true residual no longer does,
        # and its inner products end in underflow.
        tolerance = jnp.finfo(norm.dtype).eps * norm
        if self.rtol is not None:
            tolerance = jnp.maximum(tolerance, jnp.asarray(self.rtol, norm.dtype) * norm)
        if self.atol is not None:
            tolerance = jnp.maximum(tolerance, jnp.asarray(self.atol, norm.dtype))
        return tolerance, self.rtol is not None or self.atol is not None


def _start(mv: LinearMap, rhs: Vector, x0: Vector | None) -> tuple[Vector, Vector]:
    """``(x, g - A x)``, at zero without a product, or at the better of ``x0`` and zero."""
    zero = jax.tree.map(jnp.zeros_like, rhs)
    if x0 is None:
        return zero, rhs
    # The barrier keeps a zero start a runtime value: XLA on CPU miscompiles products with a
    # constant zero operand inside fused row reductions, and A(0) would be one.
    x0 = jax.lax.optimization_barrier(tree.cast_like(x0, rhs))
    residual = tree.sub(rhs, mv(x0))
    better = tree.vdot(residual, residual) < tree.vdot(rhs, rhs)
    return tree.where(better, x0, zero), tree.where(better, residual, rhs)


def _apply(inverse: Vector | None, r: Vector) -> Vector:
    return r if inverse is None else jax.tree.map(jnp.multiply, inverse, r)


def _advance(mv: LinearMap, inverse: Vector | None, c: _Carry) -> _Carry:
    image = mv(c.p)
    pp, pap = tree.vdot(c.p, c.p), tree.vdot(c.p, image)
    curvature = pap / pp
    low = jnp.minimum(c.curvature[0], curvature)
    high = jnp.maximum(c.curvature[1], curvature)
    # Non-positive up to rounding, relative to the largest curvature met. Written so that a
    # NaN is not "indefinite": it goes into the iterate instead.
    indefinite = curvature <= jnp.finfo(pp.dtype).eps * jnp.maximum(high, 0)
    alpha = jnp.where(indefinite, 0, c.rz / jnp.where(indefinite, 1, pap))
    x, r = tree.axpy(alpha, c.p, c.x), tree.axpy(-alpha, image, c.r)
    z = _apply(inverse, r)
    rr = tree.vdot(r, r)
    rz = rr if inverse is None else tree.vdot(r, z)
    beta = jnp.where(c.rz > 0, rz / jnp.where(c.rz > 0, c.rz, 1), 0)
    p, bounds = tree.axpy(beta, c.p, z), jnp.stack([low, high])
    return _Carry(c.step + 1, x, r, p, rz, bounds, rr, indefinite)
