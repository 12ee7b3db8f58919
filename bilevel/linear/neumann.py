r"""The truncated Neumann series :math:`q = a \sum_{j=0}^{K} (I - aA)^j g`."""

import dataclasses

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
        eigenvalue by power iteration started at :math:`g` (the series never leaves the
        Krylov space of :math:`g`) and takes its inverse.
      power_steps: products of that estimate; they come on top of K.
      unroll: write the loop out step by step; ``None`` decides by itself (convolutions
        on CPU).

    The norm of the terms of a convergent series on one symmetric matrix falls in every step;
    a term longer than the one before it, or a Rayleigh quotient outside
    :math:`(0, 2/a)`, proves divergence and gives status ``diverged``. The sum up to K is
    returned all the same. With fresh batches each product uses its own (the stochastic
    series of stocBiO).

    For a ``FixedPoint`` of T and a step of one (``None`` means that there), it is the series
    :math:`\sum_j (\partial T^\top)^j g` of the map, convergent where T contracts.

    Cost: K products (+ ``power_steps``) and three vectors. ``x0`` is not used: partial sums
    cannot be warm-started. Raises ``ValueError``/``TypeError`` for a bad count or step.

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
        """Products a solve makes (static)."""
        return self.num_matvecs + (self.power_steps if self.step_size is None else 0)

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
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        unroll = amap.unroll if self.unroll is None else self.unroll
        product = amap.fresh or (lambda v, i: amap(v))
        offset, step, made = 0, self.step_size, self.num_products()
        if step is None and amap.transpose is not None:
            step, made = 1.0, self.num_matvecs
        if step is None:
            offset = self.power_steps
            largest = _largest_eigenvalue(product, rhs, self.power_steps, unroll)
            step = 1 / jnp.where(largest == 0, 1, largest)  # a NaN stays one
        step = jnp.asarray(step)

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
        last, total, low, high, growth = loop(self.num_matvecs, body, start, unroll)
        value = tree.scale(step, total)
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
        return finish(amap, rhs, value, stats, result, certify)


def _largest_eigenvalue(product, rhs: Vector, steps: int, unroll: bool) -> Scalar:
    """Power iteration from ``rhs``: the norm of a unit vector's image, so the absolute value."""
    length = tree.norm(rhs)
    unit = tree.scale(1 / jnp.where(length > 0, length, 1), rhs)

    def body(i, carry):
        v, _ = carry
        image = product(v, i)
        norm = tree.norm(image)
        return tree.scale(1 / jnp.where(norm > 0, norm, 1), image), norm

    return loop(steps, body, (unit, jnp.zeros_like(length)), unroll)[1]
