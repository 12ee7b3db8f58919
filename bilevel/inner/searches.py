"""The steps of :func:`bilevel.minimize`: L-BFGS, accelerated and proximal gradient steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Params, Scalar, Vector
from bilevel.ground.loops import strong_types


class Search(NamedTuple):
    params: Params
    memory: Any
    value: Scalar
    size: Scalar
    steps: jax.Array
    gradients: jax.Array
    stuck: jax.Array


Step = Callable[[Search], Search]
ZERO: Any = np.int32(0)  # an array of JAX would start its back end on import


def lbfgs(loss: Callable[[Params], Scalar], params: Params) -> tuple[Search, Step]:
    if any(tree.explicit_spec(x) is not None for x in jax.tree.leaves(params)):
        return _divided_lbfgs(loss, params)
    tx = optax.lbfgs()
    eps = jnp.finfo(tree.norm(params).dtype).eps

    def advance(search: Search) -> Search:
        gradient = optax.tree.get(search.memory, "grad")
        updates, memory = tx.update(
            gradient, search.memory, search.params,
            value=search.value, grad=gradient, value_fn=loss,
        )  # fmt: skip
        tried = optax.tree.get(memory, "info").num_linesearch_steps
        # The search has evaluated value and gradient where it stopped.
        return Search(
            optax.apply_updates(search.params, updates),
            memory,
            optax.tree.get(memory, "value").astype(search.value.dtype),
            tree.norm(optax.tree.get(memory, "grad")),
            search.steps + 1,
            search.gradients + jnp.asarray(tried, jnp.int32),
            tree.norm(updates) <= eps * tree.norm(search.params),
        )

    value, gradient = jax.value_and_grad(loss)(params)
    memory = strong_types(optax.tree.set(tx.init(params), grad=gradient, value=value))
    stuck = jnp.asarray(False)
    return Search(params, memory, value, tree.norm(gradient), ZERO, ZERO + 1, stuck), advance


MEMORY = 10
"""Pairs of differences that L-BFGS keeps, as ``optax.lbfgs`` does."""


class _Pairs(NamedTuple):
    gradient: Vector
    moves: Vector  # differences of the parameters, stacked
    bends: Vector  # those of the gradients
    weights: jax.Array  # one over the product of both; zero where there is no pair yet
    first: Scalar  # what the gradient is scaled with before the pairs


def _divided_lbfgs(loss: Callable[[Params], Scalar], params: Params) -> tuple[Search, Step]:
    """The steps of ``optax.lbfgs`` for parameters that an explicit mesh divides.

    There optax fails: its inner products lay a leaf out as one axis, and its memory is on every
    device. So the pairs are kept here, divided as the parameters, and optax's search sees the loss
    along the line alone, a function of one number. The gradient at its end is taken once more.
    """
    line = optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one")
    dtype = tree.norm(params).dtype
    eps = jnp.finfo(dtype).eps
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)

    def direction(pairs: _Pairs, count: jax.Array) -> Vector:
        def pair(i: jax.Array) -> tuple[Vector, Vector]:
            return jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False),
                (pairs.moves, pairs.bends),
            )

        def back(v: Vector, i: jax.Array) -> tuple[Vector, Scalar]:
            move, bend = pair(i)
            share = pairs.weights[i] * tree.vdot(move, v)
            return tree.axpy(-share, bend, v), share

        def forth(v: Vector, at: tuple[jax.Array, Scalar]) -> tuple[Vector, None]:
            i, share = at
            move, bend = pair(i)
            return tree.axpy(share - pairs.weights[i] * tree.vdot(bend, v), move, v), None

        order = (count + jnp.arange(MEMORY)) % MEMORY  # the oldest first
        v, shares = jax.lax.scan(back, pairs.gradient, order, reverse=True)
        v, _ = jax.lax.scan(forth, tree.scale(pairs.first, v), (order, shares))
        return tree.scale(-1, v)

    def advance(search: Search) -> Search:
        pairs, w = search.memory, search.params
        d = direction(pairs, search.steps)

        def along(t: Scalar) -> Scalar:
            return loss(tree.axpy(t, d, w))

        length, found = line.update(
            one, line.init(zero), zero,
            value=search.value, grad=tree.vdot(d, pairs.gradient), value_fn=along,
        )  # fmt: skip
        tried = optax.tree.get(found, "info").num_linesearch_steps
        updates = tree.scale(length, d)
        new = tree.add(w, updates)
        value, gradient = jax.value_and_grad(loss)(new)
        move, bend = tree.sub(new, w), tree.sub(gradient, pairs.gradient)
        product, square = tree.vdot(move, bend), tree.vdot(bend, bend)
        place = search.steps % MEMORY
        return Search(
            new,
            _Pairs(
                gradient,
                tree.put(pairs.moves, move, place),
                tree.put(pairs.bends, bend, place),
                pairs.weights.at[place].set(jnp.where(product == 0, 0, 1 / product)),
                jnp.where(square > 0, product / square, 1),
            ),
            value,
            tree.norm(gradient),
            search.steps + 1,
            search.gradients + jnp.asarray(tried, jnp.int32) + 1,
            tree.norm(updates) <= eps * tree.norm(w),
        )

    value, gradient = jax.value_and_grad(loss)(params)
    size = tree.norm(gradient)
    room = tree.stacked_zeros(MEMORY, params)
    # The first step is at most one long: nothing is known of the curvature.
    pairs = _Pairs(gradient, room, room, jnp.zeros(MEMORY, dtype), jnp.minimum(1, 1 / size))
    stuck = jnp.asarray(False)
    return Search(params, pairs, value, size, ZERO, ZERO + 1, stuck), advance


class _Coasting(NamedTuple):
    gradient: Vector
    behind: Params
    weight: Scalar


def accelerated(
    loss: Callable[[Params], Scalar], params: Params, least: Any, largest: Any
) -> tuple[Search, Step]:
    dtype = tree.norm(params).dtype
    eps = jnp.finfo(dtype).eps
    longest = (1 / jnp.asarray(largest)).astype(dtype)
    q = jnp.clip(jnp.asarray(least).astype(dtype) * longest, 0, 1)

    def advance(search: Search) -> Search:
        gradient, behind, t = search.memory
        w = tree.cast_like(tree.axpy(-longest, gradient, search.params), search.params)
        flat = 1 - q * t**2
        following = (flat + jnp.sqrt(flat**2 + 4 * t**2)) / 2
        # Where all curvatures are one, a step ends at the minimum, and 1 - q is zero.
        push = (t - 1) * (1 - q * following) / (following * jnp.where(q < 1, 1 - q, 1))
        ahead = tree.cast_like(tree.axpy(push, tree.sub(w, behind), w), w)
        value, slope = jax.value_and_grad(loss)(ahead)
        return Search(
            ahead,
            _Coasting(slope, w, following),
            value,
            tree.norm(slope),
            search.steps + 1,
            search.gradients + 1,
            longest * search.size <= eps * tree.norm(search.params),
        )

    value, gradient = jax.value_and_grad(loss)(params)
    memory = _Coasting(gradient, params, jnp.ones((), dtype))
    stuck = jnp.asarray(False)
    return Search(params, memory, value, tree.norm(gradient), ZERO, ZERO + 1, stuck), advance


class _Momentum(NamedTuple):
    ahead: Params
    step: Scalar
    weight: Scalar


SHORTEST = 60
"""Halvings of the step size before a proximal search gives up."""

LONGEST = 30
"""Doublings of the first step size, from one."""

GROWTH = 1.1
"""Of the step size from step to step: curvature falls along the way, and a start may be short."""


def proximal(
    loss: Callable[[Params], Scalar],
    params: Params,
    prox: Callable[[Params, Scalar], Params],
    first: Any = None,
) -> tuple[Search, Step]:
    def moved(y: Params, gradient: Vector, s: Scalar) -> Params:
        return tree.cast_like(prox(tree.cast_like(tree.axpy(-s, gradient, y), y), s), y)

    def judged(y: Params, value: Scalar, gradient: Vector, s: Scalar) -> tuple[Any, Any]:
        """Whether a step is too long for its model, and whether rounding lets it tell."""
        w = moved(y, gradient, s)
        d = tree.sub(w, y)
        bend = tree.vdot(d, d) / (2 * s)
        slack = 4 * jnp.finfo(bend.dtype).eps * jnp.abs(value)
        too_long = ~(loss(w) <= value + tree.vdot(gradient, d) + bend + slack)
        return too_long, bend > slack

    def advance(search: Search) -> Search:
        y, s, t = search.memory
        value, gradient = jax.value_and_grad(loss)(y)

        def too_long(s: Scalar) -> jax.Array:
            return judged(y, value, gradient, s)[0]

        s, halvings = jax.lax.while_loop(
            lambda c: (c[1] < SHORTEST) & too_long(c[0]), lambda c: (c[0] / 2, c[1] + 1), (s, ZERO)
        )
        w, tells = moved(y, gradient, s), judged(y, value, gradient, s)[1]
        step = tree.sub(w, search.params)
        uphill = tree.vdot(tree.sub(y, w), step) > 0
        following = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        push = jnp.where(uphill, 0, (t - 1) / following)
        ahead = tree.cast_like(tree.axpy(push, step, w), w)
        return Search(
            w,
            _Momentum(
                ahead,
                jnp.where(tells, GROWTH, 1).astype(s.dtype) * s,
                jnp.where(uphill, 1, following).astype(t.dtype),
            ),
            value,
            tree.norm(tree.sub(y, w)) / s,
            search.steps + 1,
            search.gradients + 1,
            halvings == SHORTEST,
        )

    value, gradient = jax.value_and_grad(loss)(params)
    one = jnp.ones((), tree.norm(params).dtype)
    size = tree.norm(tree.sub(params, moved(params, gradient, one)))

    def may_grow(s: Scalar) -> jax.Array:
        too_long, tells = judged(params, value, gradient, 2 * s)
        return tells & ~too_long

    if first is None:  # one in units of the loss says nothing: it may be far too short
        first = jax.lax.while_loop(
            lambda c: (c[1] < LONGEST) & may_grow(c[0]), lambda c: (2 * c[0], c[1] + 1), (one, ZERO)
        )[0]
    memory = _Momentum(params, jnp.asarray(first, one.dtype), one)
    stuck = jnp.asarray(False)
    return Search(params, memory, value, size, ZERO, ZERO + 1, stuck), advance
