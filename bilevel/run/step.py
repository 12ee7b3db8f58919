"""One step of a run as one compiled program: move, judge, keep the best."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Key, Scalar
from bilevel.ground.loops import keep_types
from bilevel.outer.base import Algorithm
from bilevel.run.best import Best, keep_best, point_of
from bilevel.run.packed import Packed, pack
from bilevel.run.record import numbers_of

PARTS = ("outer_loss", "inner_loss", "hypergradient", "params", "hparams", "model_state", "state")
"""What is judged in a step, causes before their effects; ``state`` is the rest of it."""


class Carry(NamedTuple):
    """What goes from step to step on the device.

    Attributes:
      state: that of the algorithm; always the result of finite steps only.
      best: the best point so far.
      halted: whether a step that was not finite has ended the run: nothing moves any more. The
        host reads numbers one step late, and must still find the state from before.
    """

    state: Any
    best: Best
    halted: jax.Array


def one_step(
    alg: Algorithm, state: Any, batches: dict[str, Batch], key: Key | None, i: Any
) -> tuple[Any, Any]:
    """Step ``i`` of the run, with its own key."""
    key = None if key is None else jax.random.fold_in(key, i)
    return alg.step(state, **batches, key=key)


@functools.lru_cache(maxsize=8)
def compiled_step(alg: Algorithm, min_delta: float, by_loss: bool) -> Callable[..., Any]:
    """``advance(carry, batches, key, i, hold) -> carry, numbers, hparams before the step``.

    A step that is not finite is dropped: the state stays as it was, but for its counter of
    steps, which moves on unless ``hold`` ends the run there. Kept for a few algorithms, so
    that another seed or a resumed run does not compile again.
    """

    def advance(
        carry: Carry, batches: dict[str, Batch], key: Key | None, i: Any, hold: Any
    ) -> tuple[Carry, Packed, Any]:
        old, best, halted = carry
        new, info = one_step(alg, old, batches, key, i)
        new = keep_types(new, old, "state", "`alg.step` must return the state as it received it.")
        parts = finite_parts(new, old, info)
        finite = jnp.all(jnp.stack(list(parts.values())))
        moves = finite & ~halted
        state = tree.where(moves, new, old)
        counts = moves | (~halted & ~jnp.asarray(hold))
        state = _with_step(state, jnp.where(counts, new.step, old.step))
        halted = halted | (~finite & hold)
        if by_loss:
            # NaN is never better: a step that was dropped leaves no best point.
            value = jnp.where(moves, info.value, jnp.nan)
            best = keep_best(best, point_of(alg, state, old.hparams), value, i, min_delta)
        numbers = {
            **numbers_of(info, old.hparams),
            "mark_step": best.mark_step,
            "finite": parts,
        }
        return Carry(state, best, halted), pack(numbers), (None if by_loss else old.hparams)

    return jax.jit(advance, donate_argnums=0)


def finite_parts(new: Any, old: Any, info: Any) -> dict[str, Scalar]:
    """Whether each part of a step is finite, by its name in messages and the log.

    Mostly all is: the sum of all squares says so, and parts are looked through only where it does
    not, as where squares overflow.
    """
    told = [new, *(getattr(info, name, ()) for name in ("value", "inner_value", "hypergrad_norm"))]
    numbers = [x for x in jax.tree.leaves(told) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    fine = jnp.isfinite(sum(tree.sum_of_squares(x) for x in numbers))
    exact = jax.eval_shape(_finite_parts, new, old, info)
    return jax.lax.cond(
        fine, lambda: dict.fromkeys(exact, jnp.asarray(True)), lambda: _finite_parts(new, old, info)
    )


def _finite_parts(new: Any, old: Any, info: Any) -> dict[str, Scalar]:
    parts = {"outer_loss": tree.all_finite(info.value)}
    for field, name in (("inner_value", "inner_loss"), ("hypergrad_norm", "hypergradient")):
        if hasattr(info, field):
            parts[name] = tree.all_finite(getattr(info, field))
    named = set()
    for name in ("params", "hparams", "model_state"):
        if hasattr(new, name):
            parts[name] = stays_finite(getattr(new, name), getattr(old, name))
            named |= {id(leaf) for leaf in jax.tree.leaves(getattr(new, name))}
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    rest = [(x, y) for x, y in pairs if id(x) not in named]
    parts["state"] = stays_finite([x for x, _ in rest], [y for _, y in rest], memory=True)
    return parts


def stays_finite(new: Any, old: Any, memory: bool = False) -> Scalar:
    """Whether nothing is NaN or infinite that was finite before: a mask may hold infinities.

    ``memory``: that of optimizers and responses, where a scalar may become infinite. Line
    searches and schedules carry the best value and the largest error so far.
    """
    result = jnp.asarray(True)
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            scalar = memory and jnp.ndim(x) == 0
            good = (lambda z: ~jnp.isnan(z)) if scalar else jnp.isfinite
            result = result & jnp.all(good(x) | ~good(y))
    return result


def _fields(state: Any) -> tuple[str, ...]:
    if hasattr(state, "_fields"):
        return state._fields
    return tuple(field.name for field in dataclasses.fields(state))


def _with_step(state: Any, step: Any) -> Any:
    if hasattr(state, "_replace"):
        return state._replace(step=step)
    return dataclasses.replace(state, step=step)


def check_step(
    alg: Algorithm, state: Any, batches: dict[str, Batch], key: Key | None, i: int
) -> jnp.dtype:
    """Trace one step, to refuse what ``fit`` cannot drive; the dtype of the outer loss."""
    _check_own(alg, state)
    info = jax.eval_shape(lambda *args: one_step(alg, *args)[1], state, batches, key, i)
    if not hasattr(info, "value") or info.value.shape != ():
        raise TypeError(
            "`alg.step` must return an info with a scalar `value`, got "
            f"{getattr(info, 'value', info)}: `fit` drives one run, map over several with "
            "`jax.vmap(alg.step)` in a loop of your own."
        )
    return info.value.dtype


def _check_own(alg: Algorithm, state: Any) -> None:
    """Refuse a state that ``alg.init`` would not make: optimizers pass on what is not theirs."""
    model_state = getattr(state, "model_state", None)
    try:
        own = jax.eval_shape(alg.init, state.params, state.hparams, model_state)
    except Exception:
        return  # an `init` of another form cannot say; what the step raises is told instead
    remedy = "Pass `alg.init(params, hparams)`, or the state of a run of this very algorithm."
    if type(own) is not type(state):
        raise TypeError(
            f"`state` is of type {type(state).__name__}, but this `alg` carries "
            f"{type(own).__name__}. {remedy}"
        )
    for field in _fields(own):
        mine = jax.tree.structure(getattr(own, field))
        theirs = jax.tree.structure(getattr(state, field))
        if mine != theirs:
            raise TypeError(
                f"`state` is of an algorithm with other settings: its `{field}` is {theirs}, this "
                f"`alg` carries {mine}. {remedy}"
            )
