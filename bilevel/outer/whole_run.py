r"""A whole run as one compiled scan: for many seeds and starting points at once by ``vmap``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.aliases import Batch, Key, Scalar
from bilevel.outer.base import Algorithm
from bilevel.settings import check_count


class WholeRun(NamedTuple):
    """What :func:`scan_run` returns.

    Attributes:
      state: after the last step.
      infos: every step's ``info``, stacked on a leading axis of ``steps``.
      best: the state with the lowest score: weights, hyperparameters, scales and optimizer
        states that belong together (the last state, without ``score``).
      best_score: its score.
      scores: ``(steps,)``; NaN at steps without a score.
    """

    state: Any
    infos: Any
    best: Any
    best_score: Scalar
    scores: jax.Array


def scan_run(
    algorithm: Algorithm,
    state: Any,
    sample: Callable[[Key], tuple[Batch, Batch]],
    steps: int,
    *,
    key: Key,
    score: Callable[[Any], Scalar] | None = None,
    score_every: int = 1,
) -> WholeRun:
    r"""``steps`` steps of an algorithm in one ``lax.scan``, with data on the device.

    Args:
      algorithm: an :class:`~bilevel.Algorithm` such as :func:`~bilevel.self_tuning`.
      state: of ``algorithm.init``.
      sample: ``key -> (inner_batches, outer_batch)``, traced; gather from arrays on the device.
      steps: length of the scan.
      key: every step gets its own, from the count in ``state.step``, so that a run cut in
        two by a checkpoint draws the same numbers.
      score: ``state -> scalar``, lower is better; usually a validation loss of the whole set.
      score_every: steps between scores.

    Cost: the steps', one copy of the state for the best, and the stacked records. ``vmap`` over
    ``state`` and ``key`` runs seeds and starting points side by side. On CPU, XLA runs
    convolutions inside a scan much slower than outside: step convolutional networks from
    Python there.
    """
    check_count("steps", steps)
    check_count("score_every", score_every)

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        state, best, best_score = carry
        sample_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        inner_batches, outer_batch = sample(sample_key)
        state, info = algorithm.step(
            state, inner_batches=inner_batches, outer_batch=outer_batch, key=step_key
        )
        if score is None:
            return (state, state, best_score), (info, jnp.full((), jnp.nan, best_score.dtype))
        of_state = score
        value = jax.lax.cond(
            state.step % score_every == 0,
            lambda s: jnp.asarray(of_state(s), best_score.dtype),
            lambda s: jnp.full((), jnp.nan, best_score.dtype),
            state,
        )
        better = value < best_score  # false for NaN: a diverged run keeps its last good state
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state, best)
        return (state, best, jnp.where(better, value, best_score)), (info, value)

    dtype = jnp.float32 if score is None else jax.eval_shape(score, state).dtype
    dtype = tree.accumulator_dtype(dtype)
    carry = (state, state, jnp.asarray(jnp.inf, dtype))
    (state, best, best_score), (infos, scores) = jax.lax.scan(body, carry, None, length=steps)
    return WholeRun(state, infos, best, best_score, scores)
