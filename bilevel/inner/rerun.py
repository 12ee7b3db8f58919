r"""A loop of steps whose backward pass keeps few states and runs the steps between them again.

``jax.checkpoint`` nests loops, and holds one state for each segment and each step of a segment.
Here the loop is one primitive with a backward rule of its own, which follows the schedule of
:mod:`bilevel.inner.reversal`: one array of kept states, written in place. Its trip counts are data,
so JAX cannot differentiate it in reverse: derivatives of these derivatives are those of the plain
loop of checkpointed steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bilevel.inner.mixed import is_float
from bilevel.inner.reversal import Reversal, plan


@jax.tree_util.register_static
class _Marks(tuple):
    """Which closed-over arrays are differentiated; decided when traced."""


class _Step(NamedTuple):
    """One step on lists of leaves: ``run(consts, state, index) -> (state, info)``."""

    run: Callable[..., tuple[list[Any], list[Any]]]
    consts: list[Any]
    info: list[jax.ShapeDtypeStruct]


def rerun(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    *,
    first: int,
    steps: int,
    places: int,
    unroll: bool,
) -> tuple[Any, Any]:
    """``steps`` applications of ``step(state, index) -> (state, info)``, as a scan returns them.

    Args:
      step: no derivative flows through its ``info``; it may close over arrays, also over those
        that are differentiated.
      places: how many states are kept beside the first.
      unroll: write the loops out.

    Cost of a derivative: each step once, and as many again as
    :func:`~bilevel.inner.reversal.recomputed` counts, before it is pulled back. Derivatives of a
    derivative cost as with ``jax.checkpoint`` around each step: one kept state per step.
    """
    leaves, treedef = jax.tree.flatten(state)
    closed, shape = jax.make_jaxpr(step, return_shape=True)(state, jnp.int32(0))
    info_shape = shape[1]

    def run(consts: list[Any], leaves: list[Any], index: Any) -> tuple[list[Any], list[Any]]:
        out = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))(*leaves, index)
        return out[: len(leaves)], out[len(leaves) :]

    one = _Step(run, list(closed.consts), jax.tree.leaves(info_shape))
    device = (_unrolled if unroll else _looped)(one, plan(steps, places), first, steps, places)
    end, info = _primitive(*device, _plain(one, first, steps, unroll))(one.consts, leaves)
    info = jax.tree.unflatten(jax.tree.structure(info_shape), info)
    return jax.tree.unflatten(treedef, end), info


def _plain(one: _Step, first: int, steps: int, unroll: bool) -> Callable[..., Any]:
    """``(consts, state) -> state`` as JAX differentiates it, to any order and in any mode."""

    def run(consts: list[Any], state: list[Any]) -> list[Any]:
        def step(state: list[Any], index: Any) -> tuple[list[Any], None]:
            return one.run(consts, state, index)[0], None

        step = jax.checkpoint(step, prevent_cse=unroll)
        indices = first + jnp.arange(steps, dtype=jnp.int32)
        return jax.lax.scan(step, state, indices, unroll=0 if unroll else 1)[0]

    return run


def _primitive(
    forward: Callable[..., Any], backward: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """``forward(consts, state) -> (state, info, kept)`` with the rule ``backward``.

    ``plain`` is what derivatives of both are taken of.
    """

    @jax.custom_vjp
    def loop(consts: list[Any], state: list[Any]) -> tuple[list[Any], list[Any]]:
        return forward(consts, state)[:2]

    @jax.custom_jvp
    def ahead(consts: list[Any], state: list[Any]) -> tuple[Any, Any, Any]:
        return forward(consts, state)

    @ahead.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        end, info, kept = ahead(*primals)
        pushed = _push(plain, *primals, *tangents)
        # Whoever differentiates what is pulled back takes the first state, not the kept ones.
        return (end, info, kept), (pushed, _no_tangents(info), _no_tangents(kept))

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def back(marks: _Marks, consts: Any, state: Any, kept: Any, given: Any) -> Any:
        return backward(consts, marks, kept, given)

    @back.defjvp
    def _(marks: _Marks, primals: Any, tangents: Any) -> tuple[Any, Any]:
        consts, state, kept, given = primals
        found = back(marks, consts, state, kept, given)

        def pull(consts: Any, state: Any, given: Any) -> Any:
            return _pull(plain, consts, marks, state, given)

        of = (consts, state, given), (tangents[0], tangents[1], tangents[3])
        return found, jax.jvp(pull, *of)[1]

    def rule_forward(consts: Any, state: Any) -> tuple[Any, Any]:
        marks = _Marks(c.perturbed and is_float(c.value) for c in consts)
        consts, state = [c.value for c in consts], [x.value for x in state]
        end, info, kept = ahead(consts, state)
        return (end, info), (marks, consts, state, kept, end)

    def rule_backward(residuals: Any, cotangents: Any) -> tuple[list[Any], list[Any]]:
        marks, consts, state, kept, end = residuals
        given = [
            jnp.zeros_like(x) if isinstance(c, jax.custom_derivatives.SymbolicZero) else c
            for c, x in zip(cotangents[0], end, strict=True)
            if is_float(x)
        ]
        found_state, found = map(iter, back(marks, consts, state, kept, given))
        return (
            [next(found) if mark else None for mark in marks],
            [next(found_state) if is_float(x) else None for x in end],
        )

    loop.defvjp(rule_forward, rule_backward, symbolic_zeros=True)
    return loop


def _no_tangents(tree: Any) -> Any:
    def leaf(x: Any) -> Any:
        zero = (
            jnp.zeros_like if is_float(x) else lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0)
        )
        return zero(x)

    return jax.tree.map(leaf, tree)


def _pull(
    run: Callable[..., list[Any]],
    consts: list[Any],
    marks: _Marks,
    state: list[Any],
    given: list[Any],
) -> tuple[list[Any], list[Any]]:
    """Cotangents of the floats of ``state`` and of the marked ``consts``, through ``run``."""
    varied = [is_float(x) for x in state]

    def floats(values: list[Any], marked: list[Any]) -> list[Any]:
        moved, known_moved = iter(values), iter(marked)
        here = [next(moved) if v else x for v, x in zip(varied, state, strict=True)]
        known = [next(known_moved) if m else c for m, c in zip(marks, consts, strict=True)]
        new = run(known, here)
        return [x for v, x in zip(varied, new, strict=True) if v]

    values = [x for v, x in zip(varied, state, strict=True) if v]
    marked = [c for m, c in zip(marks, consts, strict=True) if m]
    return jax.vjp(floats, values, marked)[1](given)


def _push(
    run: Callable[..., list[Any]],
    consts: list[Any],
    state: list[Any],
    consts_tangents: list[Any],
    state_tangents: list[Any],
) -> list[Any]:
    """Tangents of the state after ``run``: the transpose of :func:`_pull`.

    ``jax.jvp`` would refuse a gradient that has a backward rule, as that of ``mode="mixed"``.
    """
    marks = _Marks(is_float(c) for c in consts)
    like = [x for x in state if is_float(x)]
    pushed = jax.linear_transpose(lambda given: _pull(run, consts, marks, state, given), like)(
        (
            [t for x, t in zip(state, state_tangents, strict=True) if is_float(x)],
            [t for c, t in zip(consts, consts_tangents, strict=True) if is_float(c)],
        )
    )[0]
    moved = iter(pushed)
    zeros = _no_tangents(state)
    return [next(moved) if is_float(x) else zero for x, zero in zip(state, zeros, strict=True)]


def _puller(one: _Step) -> Callable[..., tuple[list[Any], list[Any]]]:
    """:func:`_pull` through the step of a number that is given with the state."""

    def pull(consts: Any, marks: _Marks, state: Any, index: Any, given: Any) -> Any:
        return _pull(lambda c, s: one.run(c, s, index)[0], consts, marks, state, given)

    return pull


def _write(places: list[Any], leaves: list[Any], at: Any) -> list[Any]:
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return [update(place, leaf, at) for place, leaf in zip(places, leaves, strict=True)]


def _looped(
    one: _Step, reversal: Reversal, first: int, steps: int, places: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    pull = _puller(one)

    def advance(consts: Any, start: Any, index: Any, count: Any, told: Any) -> tuple[Any, Any]:
        def body(i: Any, carried: Any) -> Any:
            state, told = carried
            state, info = one.run(consts, state, index + i)
            return state, (None if told is None else _write(told, info, index + i - first))

        return jax.lax.fori_loop(0, count, body, (start, told))

    def keep(consts: Any, runs: Any, count: Any, carried: Any) -> Any:
        """``runs``: arrays of steps and places, of which the first ``count`` are made."""

        def body(i: Any, carried: Any) -> Any:
            state, kept, index, told = carried
            state, told = advance(consts, state, index, runs[0][i], told)
            return state, _write(kept, state, runs[1][i]), index + runs[0][i], told

        return jax.lax.fori_loop(0, count, body, carried)

    def forward(consts: list[Any], state: list[Any]) -> tuple[Any, Any, Any]:
        kept = [jnp.broadcast_to(x[None], (places + 1, *jnp.shape(x))) for x in state]
        told = [jnp.zeros((steps, *x.shape), x.dtype) for x in one.info]
        runs = jnp.asarray(reversal.forward or [(0, 0)], jnp.int32).T
        carried = state, kept, jnp.int32(first), told
        state, kept, index, told = keep(consts, runs, len(reversal.forward), carried)
        state, told = advance(consts, state, index, first + steps - index, told)
        return state, told, kept

    def backward(consts: list[Any], marks: _Marks, kept: Any, given: Any) -> tuple[Any, Any]:
        phases = reversal.phases
        most = max([len(p.runs) for p in phases] + [1])
        padded = [p.runs + ((0, 0),) * (most - len(p.runs)) for p in phases]
        table = {
            "place": jnp.asarray([p.place for p in phases], jnp.int32),
            "first": jnp.asarray([first + p.first for p in phases], jnp.int32),
            "count": jnp.asarray([len(p.runs) for p in phases], jnp.int32),
            "runs": jnp.asarray(padded, jnp.int32).transpose(0, 2, 1),
            "tail": jnp.asarray([p.tail for p in phases], jnp.int32),
        }

        def phase(carried: Any, row: Any) -> tuple[Any, None]:
            kept, given, found = carried
            state = [jax.lax.dynamic_index_in_dim(x, row["place"], 0, False) for x in kept]
            carried = state, kept, row["first"], None
            state, kept, index, _ = keep(consts, row["runs"], row["count"], carried)
            state, _ = advance(consts, state, index, row["tail"], None)
            given, more = pull(consts, marks, state, index + row["tail"], given)
            found = [a + b for a, b in zip(found, more, strict=True)]
            return (kept, given, found), None

        found = [jnp.zeros_like(c) for m, c in zip(marks, consts, strict=True) if m]
        (_, given, found), _ = jax.lax.scan(phase, (kept, given, found), table)
        return given, found

    return forward, backward


def _unrolled(
    one: _Step, reversal: Reversal, first: int, steps: int, places: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    pull = _puller(one)

    def forward(consts: list[Any], state: list[Any]) -> tuple[Any, Any, Any]:
        kept, told, index = {0: state}, [], 0
        for count, place in (*reversal.forward, (steps, None)):
            for _ in range(min(count, steps - index)):
                state, info = one.run(consts, state, jnp.int32(first + index))
                told.append(info)
                index += 1
            if place is not None:
                kept[place] = state
        return state, [jnp.stack(x) for x in zip(*told, strict=True)], kept

    def backward(consts: list[Any], marks: _Marks, kept: Any, given: Any) -> tuple[Any, Any]:
        kept, found = (
            dict(kept),
            [jnp.zeros_like(c) for m, c in zip(marks, consts, strict=True) if m],
        )
        for phase in reversal.phases:
            # The barrier keeps the compiler from merging these steps with the first ones, and
            # from making them before the cotangent is there.
            state, given = jax.lax.optimization_barrier((kept[phase.place], given))
            index = phase.first
            for count, place in (*phase.runs, (phase.tail, None)):
                for _ in range(count):
                    state, _ = one.run(consts, state, jnp.int32(first + index))
                    index += 1
                if place is not None:
                    kept[place] = state
            given, more = pull(consts, marks, state, jnp.int32(first + index), given)
            found = [a + b for a, b in zip(found, more, strict=True)]
        return given, found

    return forward, backward
