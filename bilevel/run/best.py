"""The best point of a run: parameters and hyperparameters that were measured together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Hparams, ModelState, Params
from bilevel.outer.base import Algorithm, keep_better, own


class Measured(NamedTuple):
    """Parameters with the hyperparameters and model state that belong to them.

    After a step the state already holds the *next* hyperparameters; the outer loss of that step
    was measured with the ones before, and those are what is kept here.
    """

    params: Params
    hparams: Hparams
    model_state: ModelState


class Best(NamedTuple):
    """The best point so far; ``mark`` is the last one that beat its forerunner by ``min_delta``."""

    value: jax.Array
    step: jax.Array
    mark_value: jax.Array
    mark_step: jax.Array
    point: Measured


def point_of(alg: Algorithm, state: Any, hparams: Hparams) -> Measured:
    """What the outer loss of a step was measured on: ``state`` after it, ``hparams`` before it."""
    deploy = getattr(alg, "deploy", None)
    params = state.params if deploy is None else deploy(state, hparams)
    return Measured(params, hparams, getattr(state, "model_state", None))


point_of_jitted = jax.jit(point_of, static_argnums=0)


def no_best(alg: Algorithm, state: Any, dtype: Any) -> Best:
    """No point yet: infinitely bad. Steps without improvement count from ``state.step``."""
    worst = jnp.asarray(jnp.inf, dtype)
    none = jnp.asarray(-1, jnp.int32)
    first = jnp.asarray(state.step - 1, jnp.int32)
    return own(Best(worst, none, worst, first, point_of(alg, state, state.hparams)))


def keep_best(best: Best, point: Measured, value: Any, i: Any, min_delta: Any) -> Best:
    """The better of two points; a NaN is never better."""
    value = jnp.asarray(value, best.value.dtype)
    step = jnp.asarray(i, jnp.int32)
    lowest, (best_step, best_point) = keep_better(
        value, (step, point), best.value, (best.step, best.point)
    )
    marked = value < best.mark_value - min_delta
    return Best(
        lowest,
        best_step,
        jnp.where(marked, value, best.mark_value),
        jnp.where(marked, step, best.mark_step),
        best_point,
    )


keep_best_jitted = jax.jit(keep_best, donate_argnums=0)
