r"""Knots: where a condition has no derivative, because a number is just at its threshold.

A weight of the lasso leaves zero, a bound begins or ceases to hold: on the two sides the condition
has different Jacobians, and the solution different derivatives.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Params, Scalar, Vector
from bilevel.problem.conditions import Composite, FixedPoint
from bilevel.problem.two_losses import Problem, pushed

ROUNDINGS = 32
"""Units of rounding, of the largest number of a leaf, within which a threshold counts as met."""

JUMP = 0.1
"""Relative change of a derivative, between two points that close, that no smooth map shows."""


def knots(problem: Problem, params: Params, hparams: Hparams, batch: Batch) -> jax.Array:
    r"""How many numbers of a condition change their derivative within the point's own error.

    Compares the derivatives along one direction, of parameters and hyperparameters, at two points on
    both sides of ``params`` (of :math:`w - s\nabla f(w)`, for the proximal operator of a composite
    condition). They lie as far away as rounding and what is left of the condition, :math:`\max_i |R_i|`, may have put the
    point: what an unfinished solve cannot decide counts too. A :class:`~bilevel.Root`, whose
    equation has other units than its solution, counts rounding alone.

    Cost: two derivatives of ``prox``; of a fixed point or a root two of the whole condition.
    """
    problem = problem.settled(params, hparams, batch)
    residual = problem.condition(params, hparams, batch)
    if isinstance(problem.inner, Composite):
        point = problem.ahead(params, hparams, batch)
        unsolved = problem.inner.step_size * _largest(residual)

        function = problem.proximal
    else:
        point = params
        unsolved = _largest(residual) if isinstance(problem.inner, FixedPoint) else 0.0

        def function(v: Params, lam: Hparams) -> Vector:
            return problem.condition(v, lam, batch)

    return _jumps(function, point, hparams, unsolved)


def _jumps(
    function: Callable[[Params, Hparams], Vector], point: Params, hparams: Hparams, unsolved: Any
) -> jax.Array:
    whole = _largest(point)
    # A threshold may show in either: the step of a map that forgets its start has no other slope.
    direction, beside = jax.tree.map(_direction, (point, hparams))

    def displaced(x: jax.Array, t: jax.Array) -> jax.Array:
        size = jnp.max(jnp.abs(x)).astype(whole.dtype)
        size = jnp.where(size > 0, size, jnp.where(whole > 0, whole, 1))
        reach = ROUNDINGS * jnp.finfo(x.dtype).eps * size + unsolved
        return reach.astype(x.dtype) * t

    shift = jax.tree.map(displaced, point, direction)
    one, other = (
        tree.accumulate(pushed(lambda x: function(*x), (side, hparams), (direction, beside)))
        for side in (tree.add(point, shift), tree.sub(point, shift))
    )
    typical = tree.norm(one) / tree.size(one) ** 0.5

    def count(a: jax.Array, b: jax.Array) -> jax.Array:
        size = jnp.maximum(jnp.abs(a), jnp.abs(b)) + JUMP * typical.astype(a.dtype)
        return jnp.sum(jnp.abs(a - b) > JUMP * size, dtype=jnp.int32)

    return sum(jax.tree.leaves(jax.tree.map(count, one, other)), jnp.int32(0))


def _largest(vector: Vector) -> Scalar:
    parts = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree.accumulate(vector)) if x.size]
    return jnp.max(jnp.stack([p.astype(jnp.result_type(*parts)) for p in parts]))


def _direction(x: jax.Array) -> jax.Array:
    """Fixed numbers of both signs and different sizes, in no pattern that a problem may have."""
    k = jnp.arange(x.size, dtype=tree.accumulator_dtype(x.dtype)).reshape(x.shape)
    sign = jnp.where(jnp.sin(1.7 * k + 0.3) > 0, 1, -1)
    return (sign * (1 + 0.5 * jnp.cos(2.3 * k))).astype(x.dtype)
