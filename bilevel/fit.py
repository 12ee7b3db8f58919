r"""A driver on the host for any outer loop: shown, logged, saved, resumed, stopped in time."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, ModelState, Params
from bilevel.checkpoint import Checkpoints
from bilevel.outer.base import Algorithm, own, own_params
from bilevel.progress import Bar, JsonLog, Record, TensorBoard, numbers_of, record_of, wants_bar
from bilevel.settings import check_count, check_real


class Point(NamedTuple):
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
    point: Point


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
      state: the last state, to go on from.
      best_params: inner parameters with the lowest outer loss (or ``evaluate``) ...
      best_hparams: ... the hyperparameters they were measured with, before that step's update
      best_model_state: ... and the model state.
      best_value: that lowest value; infinite if no step was made or all were NaN.
      best_step: the step, from 0, that found it; -1 for none.
      history: one record a step, as in the log; with ``log`` also those of earlier calls.
      stopped: ``"steps"``, ``"patience"`` or ``"callback"``.
      resumed_from: steps made before this call, by the checkpoint it went on from, or None.
    """

    state: Any
    best_params: Params
    best_hparams: Hparams
    best_model_state: ModelState
    best_value: float
    best_step: int
    history: list[Record]
    stopped: str
    resumed_from: int | None


def fit(
    alg: Algorithm,
    state: Any,
    inner_data: Callable[[int], Batch] | Batch,
    outer_data: Callable[[int], Batch] | Batch,
    *,
    steps: int,
    key: Key | None = None,
    response_data: Callable[[int], Batch] | Batch | None = None,
    log: str | os.PathLike[str] | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    keep: int = 3,
    run_id: Any = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    evaluate: Callable[[Point], float] | None = None,
    evaluate_every: int = 1,
    callbacks: Sequence[Callable[[int, Record], Any]] = (),
) -> FitResult:
    r"""Runs an outer loop to its end, however often it is interrupted.

    Args:
      alg: an :class:`~bilevel.Algorithm` such as :func:`~bilevel.alternate` returns.
      state: ``alg.init(...)``, or ``result.state`` of an earlier call. Not consumed.
      inner_data: a function ``step -> inner_batches`` of the integer step, from 0, or one
        constant tree of arrays. For a resumed run to equal an uninterrupted one it must be
        pure: the same step gives the same batches (draw them with
        ``jax.random.fold_in(key, step)`` or ``np.random.default_rng((seed, step))``).
      outer_data: likewise ``step -> outer_batch``.
      steps: outer steps of the whole run, those of ``state`` and of earlier calls included.
      key: for responses that draw random numbers; step i receives ``fold_in(key, i)``.
      response_data: likewise ``step -> response_batch``.
      log: a file for one JSON line a step: ``step``, ``outer_loss``, ``inner_loss``,
        ``hypergrad_norm``, ``status``, the response's stats, ``aux`` where it is scalar,
        ``hparams`` (arrays of up to 16 entries, as the outer loss read them), ``evaluate``,
        and ``seconds`` since this call began. Lines at or after the first step of this call
        are removed first, so the file equals that of an uninterrupted run but for ``seconds``.
      tensorboard: a folder for the same numbers.
      progress: a live progress bar, where there is a terminal.
      checkpoint_dir: a folder for checkpoints. If it holds one that is at least as far as
        ``state``, the run goes on from there; a damaged one is set aside with a warning and
        the one before used.
      checkpoint_every: steps between checkpoints; the end of a call always writes one.
      keep: number of checkpoints kept. Keep at least 2, for a fallback.
      run_id: any JSON value that tells this run from others, such as its configuration.
      patience: stop after this many steps without a value lower by more than ``min_delta``.
      min_delta: see ``patience``; the best point itself is the lowest value, by any margin.
      evaluate: a function ``point -> float``, called on the host, that replaces the outer loss
        for ``best`` and ``patience``; ``point`` has ``params``, ``hparams``, ``model_state``.
      evaluate_every: steps between its calls; the last step of the run is always evaluated.
      callbacks: functions ``callback(step, record)``, called after each step with what the log
        gets; one that returns True ends this call (the next call continues the run).

    Returns:
      :class:`FitResult`, with the best parameters *and* the hyperparameters that belong to
      them: the pair the best value was measured on.

    The step is compiled once, with its state donated. Numbers are read one step late, so that
    the device need not wait for the host; only ``callbacks``, ``evaluate`` and a step at which
    ``patience`` may run out are waited for. A stop therefore takes effect at once.

    Raises:
      TypeError, ValueError: for settings out of range, an ``alg`` of another form, and a
        checkpoint of another run (other ``run_id``, ``key``, tree, shapes or dtypes).
      OSError: before the first step, if ``checkpoint_dir`` or ``log`` cannot be written; and
        if every checkpoint is damaged.

    Cost: the step's own, one copy of the best point, one pass over it per step.

    Example:
      >>> import jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + jnp.exp(lam) * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.alternate(valid, train, bilevel.Implicit(bilevel.CG()),
      ...                         optax.sgd(0.2), optax.adam(0.2), inner_steps=20)
      >>> result = bilevel.fit(alg, alg.init(jnp.zeros(1), -3.0), jnp.full((20, 1), 2.0),
      ...                      jnp.array([1.0]), steps=40)
      >>> result.best_value < 0.01
      True
    """
    _check_settings(alg, state, steps, checkpoint_every, patience, evaluate, evaluate_every)
    check_real("min_delta", min_delta, 0)
    checkpoints = None
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(checkpoint_dir, keep, {"run_id": run_id, "key": _key_id(key)})
    inner_at, outer_at = _by_step(inner_data), _by_step(outer_data)
    extra_at = None if response_data is None else _by_step(response_data)

    state = own(state)
    start = int(state.step)
    best = _first_best(alg, state, inner_at, outer_at, extra_at, key, start, steps, evaluate)
    resumed_from, stopped = None, None
    if checkpoints is not None:
        found = checkpoints.restore({"state": state, "best": best})
        if found is not None and found.step >= start:
            state, best = found.tree["state"], found.tree["best"]
            start = resumed_from = found.step
            if found.notes["patience"] == [patience, min_delta]:
                stopped = found.notes["stopped"]

    advance = _advance(alg, float(min_delta), evaluate is None)
    with contextlib.ExitStack() as stack:
        sinks: list[Any] = []
        history: list[Record] = []
        if log is not None:
            sinks.append(JsonLog(log, start))
            history.extend(sinks[0].kept)
        if tensorboard is not None:
            sinks.append(TensorBoard(tensorboard, start))
        if wants_bar(progress):
            sinks.append(Bar(start, steps))
        for sink in sinks:
            stack.callback(sink.close)
        began = time.perf_counter()
        mark = int(best.mark_step)  # as far as the host knows
        pending: list[tuple[int, Any, float | None]] = []

        def settle() -> str | None:
            """Read the numbers of the steps that are under way; why to stop, if at all."""
            nonlocal mark
            reason = None
            while pending:
                i, numbers, evaluated = pending.pop(0)
                numbers = jax.device_get(numbers)
                mark = int(numbers.pop("mark_step"))
                record = record_of(i, numbers, evaluated, time.perf_counter() - began)
                history.append(record)
                for sink in sinks:
                    sink.write(record)
                asked = [callback(i, record) is True for callback in callbacks]
                reason = reason or ("callback" if any(asked) else None)
                if patience is not None and i - mark >= patience:
                    reason = "patience"
            return reason

        def save(done: int, reason: str | None) -> None:
            if checkpoints is not None:
                for sink in sinks:
                    sink.sync()
                # A callback ends a call; only patience ends the run.
                lasting = reason if reason == "patience" else None
                notes = {"stopped": lasting, "patience": [patience, min_delta]}
                checkpoints.save(done, {"state": state, "best": best}, notes)

        saved = resumed_from
        done = start
        while done < steps and stopped is None:
            i = done
            batches = {"inner_batches": inner_at(i), "outer_batch": outer_at(i)}
            if extra_at is not None:
                batches["response_batch"] = extra_at(i)
            state, best, numbers, before = advance(state, best, batches, key, i)
            done = i + 1
            evaluated = None
            if evaluate is not None and (done % evaluate_every == 0 or done == steps):
                point = _point(alg, state, before)
                evaluated = float(evaluate(point))
                best = _keep_best_jitted(best, point, evaluated, i, min_delta)
            if evaluate is not None:
                numbers["mark_step"] = jnp.copy(best.mark_step)  # `best` itself is donated
            for leaf in jax.tree.leaves(numbers):
                leaf.copy_to_host_async()
            pending.append((i, numbers, evaluated))
            save_now = done % checkpoint_every == 0
            running_out = patience is not None and i - mark >= patience
            if callbacks or running_out or save_now or done == steps:
                stopped = settle()
            elif len(pending) > 1:
                newest = pending.pop()
                settle()
                pending.append(newest)
            if save_now:
                save(done, stopped)
                saved = done
        if done != saved:
            save(done, stopped)

    return FitResult(
        state,
        best.point.params,
        best.point.hparams,
        best.point.model_state,
        float(best.value),
        int(best.step),
        history,
        stopped or "steps",
        resumed_from,
    )


def _by_step(data: Any) -> Callable[[int], Batch]:
    if callable(data):
        return data
    constant = jax.device_put(data)
    return lambda step: constant


def _key_id(key: Key | None) -> Any:
    if key is None:
        return None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return [str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()]
    return np.asarray(key).tolist()


def _step(alg: Algorithm, state: Any, batches: dict[str, Batch], key: Key | None, i: Any) -> Any:
    key = None if key is None else jax.random.fold_in(key, i)
    return alg.step(state, **batches, key=key)


@functools.lru_cache(maxsize=8)
def _advance(alg: Algorithm, min_delta: float, by_loss: bool) -> Callable[..., Any]:
    """One step, the best point and the numbers to tell, as one compiled program.

    Kept for a few algorithms, so that another seed or a resumed run does not compile again.
    """

    def advance(state: Any, best: Best, batches: dict[str, Batch], key: Key | None, i: Any) -> Any:
        before = state.hparams
        state, info = _step(alg, state, batches, key, i)
        if by_loss:
            point = _point(alg, state, before)
            best = _keep_best(best, point, info.value, i, min_delta)
        numbers = {**numbers_of(info, before), "mark_step": best.mark_step}
        return state, best, numbers, (None if by_loss else before)

    return jax.jit(advance, donate_argnums=(0, 1))


def _point(alg: Algorithm, state: Any, hparams: Hparams) -> Point:
    """What the outer loss of the step that returned ``state`` was measured with."""
    deploy = getattr(alg, "deploy", own_params)
    return Point(deploy(state, hparams), hparams, getattr(state, "model_state", None))


def _keep_best(best: Best, point: Point, value: Any, i: Any, min_delta: Any) -> Best:
    """The better of two points; a NaN is never better."""
    value = jnp.asarray(value, best.value.dtype)
    step = jnp.asarray(i, jnp.int32)
    better = value < best.value
    marked = value < best.mark_value - min_delta
    return Best(
        jnp.where(better, value, best.value),
        jnp.where(better, step, best.step),
        jnp.where(marked, value, best.mark_value),
        jnp.where(marked, step, best.mark_step),
        tree.where(better, point, best.point),
    )


_keep_best_jitted = jax.jit(_keep_best, donate_argnums=0)


def _first_best(
    alg: Algorithm,
    state: Any,
    inner_at: Callable[[int], Batch],
    outer_at: Callable[[int], Batch],
    extra_at: Callable[[int], Batch] | None,
    key: Key | None,
    start: int,
    steps: int,
    evaluate: Any,
) -> Best:
    """No point yet: infinitely bad. Steps without improvement count from ``start``."""
    i = max(min(start, steps - 1), 0)
    batches = {"inner_batches": inner_at(i), "outer_batch": outer_at(i)}
    if extra_at is not None:
        batches["response_batch"] = extra_at(i)
    info = jax.eval_shape(lambda *args: _step(alg, *args)[1], state, batches, key, i)
    if not hasattr(info, "value") or info.value.shape != ():
        raise TypeError(
            "`alg.step` must return an info with a scalar `value`, got "
            f"{getattr(info, 'value', info)}: `fit` drives one run, map over several with "
            "`jax.vmap(alg.step)` in a loop of your own."
        )
    dtype = info.value.dtype if evaluate is None else jnp.result_type(float)
    point = _point(alg, state, state.hparams)
    worst = jnp.asarray(jnp.inf, dtype)
    none = jnp.asarray(-1, jnp.int32)
    first = jnp.asarray(start - 1, jnp.int32)
    return own(Best(worst, none, worst, first, point))


def _check_settings(
    alg: Any,
    state: Any,
    steps: Any,
    checkpoint_every: Any,
    patience: Any,
    evaluate: Any,
    evaluate_every: Any,
) -> None:
    if not (hasattr(alg, "init") and hasattr(alg, "step")):
        raise TypeError(f"`alg` must be a pair (init, step) such as `alternate(...)`, got {alg!r}.")
    missing = [name for name in ("params", "hparams", "step") if not hasattr(state, name)]
    if missing:
        raise TypeError(
            f"`state` must be what `alg.init` returns; it has no {', '.join(missing)}: "
            f"{type(state).__name__}."
        )
    if jax.process_count() > 1:
        raise ValueError(
            "`fit` drives one process. In several, call `jax.jit(alg.step)` in a loop of your own "
            "and write logs and checkpoints where `jax.process_index() == 0`."
        )
    check_count("steps", steps, low=0)
    check_count("checkpoint_every", checkpoint_every)
    check_count("evaluate_every", evaluate_every)
    if patience is not None:
        check_count("patience", patience)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"`evaluate` must be a function point -> float, got {evaluate!r}.")
