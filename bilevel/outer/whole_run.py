r"""A whole run as one compiled scan: for many seeds and starting points at once by ``vmap``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Key, Params, Scalar
from bilevel.ground.keys import require_key
from bilevel.ground.settings import check_count, check_takes, is_function
from bilevel.outer.base import Algorithm, check_arrays, keep_better


class WholeRun(NamedTuple):
    """What :func:`scan_run` returns.

    Attributes:
      state: after the last step.
      infos: every step's ``info``, stacked on a leading axis of ``steps``.
      best: the state with the lowest score: weights, hyperparameters, scales and optimizer
        states that belong together (the last state, without ``score``).
      best_params: ``algorithm.deploy(best)``, the parameters to use with ``best.hparams``.
      best_score: its score.
      scores: ``(steps,)``; NaN at steps without a score.
    """

    state: Any
    infos: Any
    best: Any
    best_params: Params
    best_score: Scalar
    scores: jax.Array


def _check_arguments(algorithm: Any, state: Any, sample: Any, key: Any, score: Any) -> None:
    if not callable(getattr(algorithm, "step", None)):
        raise TypeError(
            f"`algorithm` must be an outer loop such as `alternate(...)`, got {algorithm!r}."
        )
    if not hasattr(state, "step"):
        raise TypeError(
            "`state` must be what `algorithm.init` returns, with its count of steps, got "
            f"{type(state).__name__}."
        )
    require_key(key, "`scan_run`")
    check_arrays(state)
    if not is_function(sample):
        raise TypeError(
            "`sample` must be a function key -> (inner_batches, outer_batch), got "
            f"{type(sample).__name__}: gather from arrays that it closes over."
        )
    check_takes("sample", sample, "sample(key)")
    if score is None:
        return
    if not is_function(score):
        raise TypeError(f"`score` must be a function state -> scalar, got {score!r}.")
    check_takes("score", score, "score(state)")
    shape = jax.eval_shape(score, state)
    if getattr(shape, "shape", None) != () or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise TypeError(
            f"`score` must return one real floating-point number, got {shape}: take the mean."
        )


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
    _check_arguments(algorithm, state, sample, key, score)

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        state, best, best_score = carry
        sample_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        batches = sample(sample_key)
        if not isinstance(batches, (tuple, list)) or len(batches) != 2:
            raise TypeError(
                "`sample` must return a pair (inner_batches, outer_batch), got "
                f"{jax.tree.structure(batches)}."
            )
        inner_batches, outer_batch = batches
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
        best_score, best = keep_better(value, state, best_score, best)
        return (state, best, best_score), (info, value)

    dtype = jnp.float32 if score is None else jax.eval_shape(score, state).dtype
    dtype = tree.accumulator_dtype(dtype)
    carry = (state, state, jnp.asarray(jnp.inf, dtype))
    (state, best, best_score), (infos, scores) = jax.lax.scan(body, carry, None, length=steps)
    return WholeRun(state, infos, best, algorithm.deploy(best), best_score, scores)
