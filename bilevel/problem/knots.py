r"""Knots: where a condition has no derivative, because a number is exactly at its threshold.

A weight of the lasso leaves zero, a bound begins or ceases to hold: on the two sides the condition
has different Jacobians, and the solution different derivatives.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Params, Scalar, Vector
from bilevel.problem.conditions import Composite, FixedPoint
from bilevel.problem.two_losses import Problem, pushed

ROUNDINGS = 32
"""Units of rounding, of the largest number of a leaf, within which a threshold is reached."""

JUMP = 0.1
"""Relative change of a derivative, between two points that close, that no smooth map shows."""


def knots(problem: Problem, params: Params, hparams: Hparams, batch: Batch) -> jax.Array:
    r"""How many numbers of a condition change their derivative within the point's own error.

    Compares the derivatives in a direction of parameters, and of hyperparameters, at two points
    on both sides of ``params`` (of :math:`w - s∇f(w)`, for the proximal operator of a
    composite condition). They lie as far away as rounding and what is left of the condition,
    :math:`max_i |R_i|`, may have put the point: what an unfinished solve cannot decide counts too.
    A :class:`~bilevel.Root`, whose equation has other units than its solution, counts rounding
    alone.

    Cost: two derivatives of ``prox``; of a fixed point or a root four of the whole condition.
    """
    problem = problem.settled(params, hparams, batch)
    residual = problem.condition(params, hparams, batch)
    if isinstance(problem.inner, Composite):
        unsolved = problem.inner.step_size * _largest(residual)
        ahead = problem.ahead(params, hparams, batch)
        return _jumps(lambda point: problem.proximal(point[0], hparams), (ahead,), unsolved)
    unsolved = _largest(residual) if isinstance(problem.inner, FixedPoint) else 0.0
    # Hyperparameters too: a map that forgets its start has a threshold in them alone.
    return _jumps(
        lambda point: problem.condition(point[0], point[1], batch), (params, hparams), unsolved
    )


def _jumps(function: Callable[[Any], Vector], point: tuple[Any, ...], unsolved: Any) -> jax.Array:
    """``unsolved`` is the error of the first part of ``point``."""
    whole = _largest(point[0])
    leaves, treedef = jax.tree.flatten(point)
    tangents = [_direction(x, i) for i, x in enumerate(leaves)]
    direction = jax.tree.unflatten(treedef, tangents)

    def displaced(x: jax.Array, t: jax.Array, unsolved: Any) -> jax.Array:
        size = jnp.max(jnp.abs(x), initial=0).astype(whole.dtype)
        size = jnp.where(size > 0, size, jnp.where(whole > 0, whole, 1))
        return (ROUNDINGS * jnp.finfo(x.dtype).eps * size + unsolved).astype(x.dtype) * t

    first = len(jax.tree.leaves(point[0]))
    left = [unsolved if i < first else 0.0 for i in range(len(leaves))]
    shift = jax.tree.unflatten(treedef, list(map(displaced, leaves, tangents, left)))
    sides = tree.add(point, shift), tree.sub(point, shift)

    def jumps(k: int) -> Vector:
        """Where the derivatives along part k of the direction differ on the two sides."""
        still = jax.tree.map(jnp.zeros_like, direction)
        along = tuple(direction[i] if i == k else still[i] for i in range(len(point)))
        one, other = (tree.accumulate(pushed(function, side, along)) for side in sides)
        typical = tree.norm(one) / tree.size(one) ** 0.5

        def differ(a: jax.Array, b: jax.Array) -> jax.Array:
            size = jnp.maximum(jnp.abs(a), jnp.abs(b)) + JUMP * typical.astype(a.dtype)
            return jnp.abs(a - b) > JUMP * size

        return jax.tree.map(differ, one, other)

    # Part by part: along both at once their jumps may cancel.
    found = functools.reduce(
        lambda a, b: jax.tree.map(jnp.logical_or, a, b), map(jumps, range(len(point)))
    )
    return sum((jnp.sum(x, dtype=jnp.int32) for x in jax.tree.leaves(found)), jnp.int32(0))


def _largest(vector: Vector) -> Scalar:
    parts = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree.accumulate(vector)) if x.size]
    return jnp.max(jnp.stack([p.astype(jnp.result_type(*parts)) for p in parts]))


def _direction(x: jax.Array, index: int) -> jax.Array:
    """Fixed numbers of both signs and different sizes, in no pattern that a problem may have."""
    k = jnp.arange(x.size, dtype=tree.accumulator_dtype(x.dtype)).reshape(x.shape) + 7.7 * index
    sign = jnp.where(jnp.sin(1.7 * k + 0.3) > 0, 1, -1)
    return (sign * (1 + 0.5 * jnp.cos(2.3 * k))).astype(x.dtype)
