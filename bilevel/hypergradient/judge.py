r"""How far a hypergradient can be trusted: is the point a minimum, is the dtype wide enough?

For an implicit one with :math:`A q = g` solved, two numbers cost nothing more than inner products:

.. math::
    \text{relative stationarity} = \frac{‖∇_w h‖}{c ‖w‖},
    \text{predicted change} = -qᵀ ∇_w h ≈ f(w^*) - f(w)

The first is how far, relative to their length, a gradient step against the curvature c would
move the parameters; c is the largest curvature that the solve met, or else
:math:`‖g‖/‖q‖`. It says little where curvatures differ by orders of magnitude, and the second
then says more: by how much the outer loss would change, to first order, if training were finished.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams, Params, Scalar, Stats, Vector
from bilevel.ground.status import STATIONARITY, Status, code, status_of, worst
from bilevel.inner.descend import StepInfo

LOST = 0.2
"""Largest part of their updates that parameters of half precision may lose to rounding."""

WALK = 0.025
"""Largest unit roundoff of the parameters times the root of the number of steps.

With both limits, bfloat16 (40 steps at most) errs by less than 6 % on ridge regressions and
small networks trained by SGD, momentum or Adam, and by 10 to 200 % from 80 steps on; float16 may
make 2600.
"""

SOLVED = 0.5
"""A solve with a larger relative residual predicts nothing."""


def stationarity_stats(
    inner_grad: Vector, params: Params, g: Vector, q: Vector, solve_stats: Stats
) -> Stats:
    """``stationarity``, ``relative_stationarity`` and ``predicted_change`` of a solved point."""
    length = tree.norm(inner_grad)
    curvature = solve_stats.get("max_curvature")
    if curvature is None:
        size = tree.norm(q)
        curvature = tree.norm(g) / jnp.where(size > 0, size, 1)
    scale = jnp.abs(curvature) * tree.norm(params)
    return {
        "stationarity": length,
        "relative_stationarity": jnp.where(length > 0, length / scale, 0),
        "predicted_change": -tree.vdot(q, inner_grad),
    }


def judged(
    value: Scalar, g: Vector, params: Params, grads: Hparams, result: jax.Array, stats: Stats
) -> jax.Array:
    """``result``, made worse where the point is not a minimum or a number is not finite."""
    finite = jnp.isfinite(value) & tree.all_finite(g)
    if "stationarity" in stats:
        finite &= jnp.isfinite(stats["stationarity"])
    if "predicted_change" in stats:
        far = not_stationary(value, g, params, stats)
        result = worst(result, status_of(Status.ok, (far, Status.not_stationary)))
    return status_of(
        result,
        (~finite, Status.nonfinite_input),
        (~tree.all_finite(grads), Status.nonfinite_output),
    )


def not_stationary(value: Scalar, g: Vector, params: Params, stats: Stats) -> jax.Array:
    """Whether the point is further from a minimum than :data:`~bilevel.ground.status.STATIONARITY`.

    That much of the parameters' length, or of the outer loss ``value``. Differences at the level
    of rounding, :math:`\\sqrt\\epsilon\\,\\|g\\|\\|w\\|`, do not count where the loss is near zero.
    """
    far = stats["relative_stationarity"] > STATIONARITY
    change = jnp.abs(stats["predicted_change"])
    noise = jnp.sqrt(jnp.finfo(change.dtype).eps) * tree.norm(g) * tree.norm(params)
    matters = change > STATIONARITY * jnp.maximum(jnp.abs(value), noise)
    residual: Any = stats.get("residual_norm", 0.0)
    return far | matters & (residual <= SOLVED * stats.get("rhs_norm", jnp.inf))


def rounding_of_solve(result: jax.Array, params: Params, stats: Stats) -> jax.Array:
    """``result``, or ``rounding`` where parameters of half precision cannot tell the curvatures.

    Products with the matrix then err by a unit roundoff of its largest curvature, and where that
    exceeds the smallest one met, the solution in that direction is noise, which a residual of the
    same products does not show. Says nothing of a solver that does not tell its curvatures.
    """
    low, high = stats.get("min_curvature"), stats.get("max_curvature")
    unit = _half_roundoff(params)
    if unit is None or low is None or high is None:
        return result
    lost = (low > 0) & (unit * high > low)
    return jnp.where(result < int(Status.singular), worst(result, _rounding_if(lost)), result)


def _half_roundoff(params: Params) -> float | None:
    """The largest unit roundoff of leaves of half precision; None where there are none."""
    units = [float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(params)]
    return max(units) if max(units) > 1e-4 else None


def _rounding_if(condition: jax.Array) -> jax.Array:
    return jnp.where(condition, code(Status.rounding), code(Status.ok))


def status_of_rounding(told: list[StepInfo], params: Params) -> jax.Array:
    """``rounding`` where parameters of half precision make the derivative untrustworthy.

    Either the additions to the parameters lost too much of what the optimizer asked for, or so
    many roundings followed each other that what they add up to, as a random walk, is too large.
    """
    rounded = [info.rounded for info in told if info.rounded is not None]
    if not rounded:
        return code(Status.ok)
    asked, lost = (sum(jnp.sum(norms[i]) for norms in rounded) for i in range(2))
    steps = sum(info.loss.size for info in told)
    return worst(_rounding_if(jnp.asarray(lost > LOST**2 * asked)), status_of_walk(steps, params))


def status_of_walk(steps: int, params: Params) -> jax.Array:
    """``rounding`` where the roundings of so many steps in half precision add up to too much."""
    unit = _half_roundoff(params)
    walked = unit is not None and unit * steps**0.5 > WALK
    return code(Status.rounding if walked else Status.ok)
