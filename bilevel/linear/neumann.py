r"""The truncated Neumann series :math:`q = a \sum_{j=0}^{K} (I - aA)^j g`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Scalar, Vector
from bilevel.ground.loops import loop
from bilevel.ground.settings import check_settings, count, real
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import LinearSolution, as_map, finish, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neumann:
    r""":math:`q_K = a \sum_{j=0}^{K} (I - aA)^j g` with exactly :math:`K` products.

    K products make K+1 terms. For :math:`0 < a < 2/\lambda_{max}` and :math:`A \succeq \mu I`

    .. math:: \|q_K - A^{-1}g\| \le \rho^{K+1}\,\|g\|/\mu, \qquad \rho = \max_i |1 - a\lambda_i|,

    and a truncated series acts like damping of about :math:`1/(a(K+1))`.

    Args:
      num_matvecs: :math:`K \ge 0`.
      step_size: :math:`a > 0`, in units of 1/curvature. ``None`` estimates the largest
        eigenvalue by power iteration and takes its inverse. The first call starts it at
        :math:`g` (the series never leaves the Krylov space of :math:`g`); each later one goes
        on by one product from the direction carried in ``state``, at its own matrix.
      power_steps: products of the first estimate; they come on top of K.
      unroll: write the loop out step by step; ``None`` decides by itself (convolutions
        on CPU).

    The norm of the terms of a convergent series on one symmetric matrix falls in every step;
    a term longer than the one before it, or a Rayleigh quotient outside
    :math:`(0, 2/a)`, proves divergence and gives status ``diverged``. The sum up to K is
    returned all the same, and the next call of a loop starts its estimate from the direction that
    grew. With fresh batches each product uses its own (the stochastic series of stocBiO).

    For a ``FixedPoint`` of T and a step of one (``None`` means that there), it is the series
    :math:`\sum_j (\partial T^\top)^j g` of the map, convergent where T contracts.

    Cost: K products and three vectors; without a step size ``power_steps`` products more in the
    first call and one more in each later call of a loop, which carries one vector. ``x0`` is not
    used: partial sums cannot be warm-started. Raises ``ValueError``/``TypeError`` for a bad count
    or step.

    Reference: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020, Algorithm 3; here the leading step size is kept, which
    the direct term needs.
    """

    num_matvecs: int = count(20, low=0)
    step_size: float | jax.Array | None = real(None, low=0, strict=True, optional=True)
    power_steps: int = count(10)
    unroll: bool | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        check_settings(self)

    def num_products(self) -> int:
        """Products a cold solve makes (static), the most of any."""
        return self.num_matvecs + (self.power_steps if self.step_size is None else 0)

    def init_state(self, like: Vector) -> Vector | None:
        """No direction yet: zeros; ``None`` where the step size is given."""
        return tree.zeros_accumulated(like) if self.step_size is None else None

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """Sum the series; ``x0`` and ``key`` are not used."""
        return self.solve_from(mv, rhs, None, x0, key=key, certify=certify)[0]

    def solve_from(
        self,
        mv: MatVec,
        rhs: Vector,
        state: Vector | None = None,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> tuple[LinearSolution, Vector | None]:
        """Sum the series with a step from the direction in ``state``, for one more product."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        unroll = amap.unroll if self.unroll is None else self.unroll
        product = amap.fresh or (lambda v, i: amap(v))
        offset, step, made, following = 0, self.step_size, self.num_matvecs, None
        if step is None and amap.transpose is not None:
            step = 1.0
            following = tree.zeros_accumulated(rhs)
        if step is None:
            offset = self.power_steps
            unit, spent = self._direction(product, rhs, state, unroll)
            image = product(unit, offset - 1)
            # The norm of a unit vector's image: an absolute value, should one be negative.
            largest = tree.norm(image)
            step = 1 / jnp.where(largest == 0, 1, largest)  # a NaN stays one
            following, made = _mixed(image, rhs), made + spent
        step = jnp.asarray(step)
        last, total, low, high, growth = self._series(product, rhs, step, offset, unroll)
        value = tree.scale(step, total)
        real = tree.vdot(rhs, rhs).dtype
        stats = {
            "num_matvecs": jnp.asarray(made, jnp.int32),
            "step_size": step.astype(real),
        }
        result = status_of(Status.ok)
        if self.num_matvecs > 0:
            if amap.transpose is None:
                stats |= {"min_curvature": low, "max_curvature": high}
            # One ulp of slack: at rho = 1 (a singular matrix) rounding may tip the ratio over.
            slack = 8 * jnp.finfo(real).eps
            if amap.fresh is None and amap.transpose is None:
                grows = (growth > 1 + slack) | (step * high > 2 * (1 + slack))
                indefinite = low < -slack * jnp.maximum(jnp.abs(high), jnp.abs(low))
            else:  # random or not normal: terms may grow in one step and still converge
                grows = tree.vdot(last, last) > tree.vdot(rhs, rhs)
                indefinite = jnp.asarray(False)
            result = status_of(
                Status.ok, (grows, Status.diverged), (indefinite, Status.negative_curvature)
            )
            if offset:
                # What grew is the direction that was missed: after K steps the last term has it.
                following = tree.where(grows, tree.unit(last), following)
        return finish(amap, rhs, value, stats, result, certify), following

    def _direction(
        self, product, rhs: Vector, state: Vector | None, unroll: bool
    ) -> tuple[Vector, Any]:
        """A unit vector along the largest curvature and its products, the one to come included.

        Without a state (or one of zeros, or spoilt) by power iteration from ``rhs``.
        """

        def power(i: Any, v: Vector) -> Vector:
            return tree.unit(product(v, i))

        start = tree.unit(rhs)
        if state is None:
            return loop(self.power_steps - 1, power, start, unroll), self.power_steps
        carried = tree.cast_like(state, rhs)
        length = tree.norm(carried)
        warm = jnp.isfinite(length) & (length > 0)
        start = tree.where(warm, tree.unit(carried), start)
        # A trip count, not a branch: under `vmap` a branch would compute both sides.
        trips = jnp.where(warm, 0, self.power_steps - 1)
        return jax.lax.fori_loop(0, trips, power, start), trips + 1

    def _series(
        self, product, rhs: Vector, step: Scalar, offset: int, unroll: bool
    ) -> tuple[Vector, Vector, Scalar, Scalar, Scalar]:
        """The last term, the sum, the extreme Rayleigh quotients and the last ratio of terms."""

        def body(i, carry):
            term, total, low, high, growth = carry
            image = product(term, i + offset)
            low, high = widen(low, high, term, image)
            following = tree.axpy(-step, image, term)
            before, after = tree.vdot(term, term), tree.vdot(following, following)
            return (
                following,
                tree.add(total, following),
                low,
                high,
                jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 0),
            )

        real = tree.vdot(rhs, rhs).dtype
        start = (rhs, rhs, *(jnp.asarray(x, real) for x in (jnp.inf, -jnp.inf, 0)))
        return loop(self.num_matvecs, body, start, unroll)


MIXED = 0.1
"""Part of the right side in the direction that is carried; it lowers the estimate by 0.5 %.

A direction that was orthogonal to the carried one, and has grown since, would otherwise enter
through rounding alone.
"""


def _mixed(image: Vector, rhs: Vector) -> Vector:
    """The direction for the next call: that of ``image``, with some of ``rhs``."""
    return tree.axpy(MIXED, tree.unit(rhs), tree.unit(image))
