r"""Preconditioned conjugate gradients, which never evaluates :math:`A 0`."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Scalar, Vector
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.settings import check_settings, count, real
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import (
    LinearSolution,
    as_map,
    finish,
    require_fixed,
    require_symmetric,
    rounding,
)
from bilevel.linear.precondition import CarryingPreconditioner, Preconditioner, prepared_from


class _Carry(NamedTuple):
    step: jax.Array
    x: Vector
    r: Vector
    p: Vector
    rz: Scalar
    curvature: jax.Array  # (2,), the least and greatest met; as one buffer XLA packs tighter
    rr: Scalar
    smooth: Vector  # the point of least residual among the iterates' weighted means
    weight: Scalar  # sum of |r_0|^2 / |r|^2 over the iterates: |r_0|^2 / (its residual)^2
    stuck: jax.Array  # a direction without positive curvature was met


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CG:
    r"""Solves :math:`A q = g` for symmetric positive definite A.

    .. math:: ‖q_k - q‖_A ≤
        2 \left(\frac{\sqrt κ - 1}{\sqrt κ + 1}\right)^k ‖q_0 - q‖_A

    with :math:`κ` the condition number (of :math:`P^{-1}A` when preconditioned).

    Args:
      max_steps: most products of the iteration. When no tolerance is given it is the budget, and a
        warm start's product is taken from it (but never the last one).
      rtol, atol: stop at :math:`‖r‖ ≤ max(rtol ‖g‖, atol)`. Both ``None``: a fixed
        budget was asked for, and spending it is status ``ok``; with a tolerance, an unmet one
        is ``max_steps``. One unit of rounding, :math:`ϵ ‖g‖`, always ends
        it as converged.
      preconditioner: ``None``, :class:`Diagonal`, :class:`KFAC`, :class:`EKFAC`,
        :class:`Nystrom`, or anything with their ``prepare``.
      unroll: write the loop out step by step (then all ``max_steps`` products are
        computed, those after convergence without effect); ``None`` decides by itself
        (convolutions on CPU).

    The value returned is never worse than zero: beside the iterates :math:`q_j`, whose residuals
    :math:`r_j` need not fall, their mean with weights :math:`1/‖r_j‖^2` is kept. It is the
    iterate of MINRES: its residual falls in every step, and on a singular positive semi-definite
    matrix it tends to the least-squares solution (of least norm where the system is consistent),
    where the plain iterates grow without bound. It is returned in their place when the last
    residual is above :math:`‖g‖`, and when the curvature vanishes.

    A direction of negative curvature ends the iteration, with status ``negative_curvature`` and
    its value in ``stats["min_curvature"]``; one whose curvature is zero up to rounding ends it
    too, with ``singular`` unless the residual is at rounding level by then. If the recurrence
    claims a convergence that the recomputed residual denies by a factor of ten, the status is
    ``stagnated``. A warm start worse than zero is dropped for zero, which
    ``stats["warm_start_used"]`` tells. Vectors and inner products are at least float32; rounding
    is that of the products, so half precisions converge to what they can resolve.

    Cost: one product per step, one for a warm start that is not zero, those of the preconditioner;
    five vectors (six preconditioned). Raises ``ValueError`` for settings out of range and
    for fresh batches, under which the directions lose conjugacy and the iteration diverges.

    Reference: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems",
    1952; the smoothing is that of Zhou, Walker, "Residual smoothing techniques for iterative
    methods", 1994; for hypergradients Pedregosa, ICML 2016, and Rajeswaran et al., NeurIPS 2019.
    """

    max_steps: int = count(100)
    rtol: float | jax.Array | None = real(None, low=0, optional=True)
    atol: float | jax.Array | None = real(None, low=0, optional=True)
    preconditioner: Preconditioner | None = None
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
        return self.solve_from(mv, rhs, None, x0, key=key, certify=certify)[0]

    def init_state(self, like: Vector) -> Any:
        """That of the preconditioner; ``None`` where it is prepared anew in each call."""
        if not isinstance(self.preconditioner, CarryingPreconditioner):
            return None
        return self.preconditioner.init_state(like)

    def solve_from(
        self,
        mv: MatVec,
        rhs: Vector,
        state: Any = None,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> tuple[LinearSolution, Any]:
        """Iterate from ``x0`` with the preconditioner in ``state``, where that is to be kept."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        require_fixed(amap, "CG")
        require_symmetric(amap, "CG")
        unroll = amap.unroll if self.unroll is None else self.unroll
        eps = rounding(amap, rhs)
        tolerance, has_tolerance = tolerance_of(self.rtol, self.atol, rhs, eps)

        inverse, extra, told = None, 0, {}
        if self.preconditioner is not None:
            (inverse, extra, told), state = prepared_from(
                self.preconditioner, amap, rhs, key, state
            )
        x, r, used, spent = start_from(amap, rhs, x0, unroll)
        limit = self.max_steps if has_tolerance else jnp.maximum(self.max_steps - spent, 1)
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
            smooth=x,
            weight=jnp.ones_like(rr),
            stuck=jnp.asarray(False),
        )

        def going(c: _Carry) -> jax.Array:
            # `not <=` rather than `>`: a NaN residual must run into the value, not hide.
            unmet = ~(c.rr <= tolerance**2)
            return (c.step < limit) & unmet & ~c.stuck & ~jnp.isnan(c.rr)

        def advance(c: _Carry) -> _Carry:
            return _advance(amap, inverse, first.rr, c)

        if unroll:
            last = first
            for _ in range(self.max_steps):
                last = tree.where(going(last), advance(last), last)
        else:
            last = jax.lax.while_loop(going, advance, first)

        products = last.step + extra + spent
        low, high = last.curvature
        stats = {**told, "num_matvecs": products, "min_curvature": low, "max_curvature": high}
        if x0 is not None:
            stats["warm_start_used"] = used
        gg = tree.vdot(rhs, rhs)
        indefinite = last.stuck & (low < -10 * eps * high) | (high <= 0) & (low < 0)
        flat = last.stuck & ~indefinite
        averaged = (last.rr > gg) | flat
        value = tree.where(averaged, last.smooth, last.x)
        least = jnp.minimum(last.rr, first.rr / last.weight)
        result = status_of(
            Status.ok,
            (indefinite, Status.negative_curvature),
            (flat & (least > eps * gg), Status.singular),
            ((last.rr > tolerance**2) & ~last.stuck & has_tolerance, Status.max_steps),
        )
        # A NaN or an overflow on the way makes the whole value NaN: an infinite right side
        # would otherwise meet its infinite tolerance at zero, and look like an answer.
        lost = ~jnp.isfinite(last.rr)
        value = jax.tree.map(lambda v: jnp.where(lost, jnp.nan, v), value)
        known = None if has_tolerance else _recurrence(eps, first, last, averaged)
        solution = finish(amap, rhs, value, stats, result, certify, known)
        if not (certify and has_tolerance):
            return solution, state
        stale = (solution.stats["residual_norm"] > 10 * tolerance) & (solution.result == 0)
        result = status_of(solution.result, (stale, Status.stagnated))
        return solution._replace(result=result), state


def tolerance_of(rtol: Any, atol: Any, rhs: Vector, eps: float) -> tuple[Scalar, bool]:
    """The residual norm at which to stop, and whether one was asked for."""
    norm = tree.norm(rhs)
    # Below this the recurrence goes on shrinking while the true residual no longer does,
    # and its inner products end in underflow.
    tolerance = eps * norm
    if rtol is not None:
        tolerance = jnp.maximum(tolerance, jnp.asarray(rtol, norm.dtype) * norm)
    if atol is not None:
        tolerance = jnp.maximum(tolerance, jnp.asarray(atol, norm.dtype))
    return tolerance, rtol is not None or atol is not None


def start_from(
    mv: LinearMap, rhs: Vector, x0: Vector | None, unroll: bool
) -> tuple[Vector, Vector, jax.Array | bool, jax.Array | int]:
    """``(x, g - A x, used, products)`` at the better of ``x0`` and zero, which needs none."""
    zero = jax.tree.map(jnp.zeros_like, rhs)
    if x0 is None:
        return zero, rhs, False, 0
    # The barrier keeps a zero start a runtime value: XLA on CPU miscompiles products with a
    # constant zero operand inside fused row reductions, and A(0) would be one.
    x0 = jax.lax.optimization_barrier(tree.cast_like(x0, rhs))
    there = tree.vdot(x0, x0) > 0
    if unroll:  # a branch would be as slow as a loop
        residual = tree.where(there, tree.sub(rhs, mv(x0)), rhs)
    else:
        residual = jax.lax.cond(there, lambda: tree.sub(rhs, mv(x0)), lambda: rhs)
    better = tree.vdot(residual, residual) < tree.vdot(rhs, rhs)
    spent = there.astype(jnp.int32)
    return tree.where(better, x0, zero), tree.where(better, residual, rhs), better, spent


def _recurrence(
    eps: float, first: _Carry, last: _Carry, averaged: jax.Array
) -> tuple[Scalar, Scalar]:
    r"""The residual norm of the value by recurrence, and a bound on its distance from the true one.

    Each step rounds its parts of x and r: Greenbaum, "Estimating the attainable accuracy of
    recursively computed residual methods", 1997, has :math:`O(k) ϵ (‖A‖ max_j ‖x_j‖ +
    ‖r‖)`. The largest curvature met stands for the norm of A, and a factor of ten for what it
    misses.
    """
    norm = jnp.sqrt(jnp.where(averaged, first.rr / last.weight, last.rr))
    curvature = jnp.max(jnp.where(jnp.isfinite(last.curvature), jnp.abs(last.curvature), 0))
    size = tree.norm(last.x) + tree.norm(first.x)
    return norm, 10 * eps * (last.step + 1) * (curvature * size + norm)


_Inverse: TypeAlias = Callable[[Vector], Vector] | None


def _apply(inverse: _Inverse, r: Vector) -> Vector:
    return r if inverse is None else inverse(r)


def _advance(mv: LinearMap, inverse: _Inverse, first_rr: Scalar, c: _Carry) -> _Carry:
    image = mv(c.p)
    pp, pap = tree.vdot(c.p, c.p), tree.vdot(c.p, image)
    curvature = pap / pp
    low = jnp.minimum(c.curvature[0], curvature)
    high = jnp.maximum(c.curvature[1], curvature)
    # Non-positive up to rounding, relative to the largest curvature met. Written so that a
    # NaN is not "stuck": it goes into the iterate instead.
    stuck = curvature <= jnp.finfo(pp.dtype).eps * jnp.maximum(high, 0)
    alpha = jnp.where(stuck, 0, c.rz / jnp.where(stuck, 1, pap))
    x, r = tree.axpy(alpha, c.p, c.x), tree.axpy(-alpha, image, c.r)
    z = _apply(inverse, r)
    rr = tree.vdot(r, r)
    rz = rr if inverse is None else tree.vdot(r, z)
    beta = jnp.where(c.rz > 0, rz / jnp.where(c.rz > 0, c.rz, 1), 0)
    p, bounds = tree.axpy(beta, c.p, z), jnp.stack([low, high])
    # Where the residual is zero the mean is the iterate itself.
    # Relative to the first residual, or the squares of small ones overflow when inverted.
    first_rr = jnp.where(first_rr > 0, first_rr, 1)
    share = jnp.where(stuck, 0, 1 / (1 + c.weight * (rr / first_rr)))
    smooth = tree.axpy(share, tree.sub(x, c.smooth), c.smooth)
    weight = jnp.where(stuck | (rr == 0), c.weight, c.weight + first_rr / jnp.where(rr > 0, rr, 1))
    return _Carry(c.step + 1, x, r, p, rz, bounds, rr, smooth, weight, stuck)
