r"""Host-side driver of any outer loop: progress, logs, checkpoints, resume, early stopping."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bilevel.ground.aliases import Batch, Key
from bilevel.outer.base import Algorithm, own
from bilevel.run import arguments
from bilevel.run.best import Measured
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.data import Data
from bilevel.run.display import Bar, TensorBoard, wants_bar
from bilevel.run.interrupt import deferred_interrupts
from bilevel.run.lock import locked
from bilevel.run.log import JsonLog
from bilevel.run.loop import Options, Run, begin
from bilevel.run.processes import by_writer, check_same, placed
from bilevel.run.record import Record
from bilevel.run.report import Report
from bilevel.run.result import FitResult, nonfinite_error
from bilevel.run.trust import trust_of


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
    evaluate: Callable[[Measured], float] | None = None,
    evaluate_every: int = 1,
    callbacks: Sequence[Callable[[int, Record], Any]] = (),
    on_nonfinite: str = "raise",
) -> FitResult:
    r"""Runs an outer loop to its end, however often it is interrupted.

    Args:
      alg: a pair ``(init, step)`` such as :func:`~bilevel.alternate` returns.
      state: ``alg.init(...)``, or ``result.state`` of an earlier call. Not consumed.
      inner_data: a function ``step -> inner_batches`` of the integer step, from 0, or one
        constant tree of arrays (lists and iterators are refused: they could mean several
        batches). For a resumed run to equal an uninterrupted one it must be pure: the same
        step gives the same batches (draw them with ``jax.random.fold_in(key, step)`` or
        ``np.random.default_rng((seed, step))``). Every step returns the same tree, dtypes and
        numbers of axes.
      outer_data: likewise ``step -> outer_batch``.
      steps: outer steps of the whole run, those of ``state`` and of earlier calls included.
      key: for responses that draw random numbers; step i receives ``fold_in(key, i)``.
      response_data: likewise ``step -> response_batch``.
      log: a file for one JSON line per step: ``step``, ``outer_loss``, ``inner_loss``,
        ``hypergrad_norm``, ``status``, the response's stats, ``aux`` where it is scalar,
        ``hparams`` as the outer loss read them (of arrays with more than 16 entries ``norm``,
        ``min``, ``median``, ``mean`` and ``max``), ``evaluate``, ``seconds`` since this call
        began, and ``nonfinite`` where a step was not finite. Lines at or after the first step of
        this call are removed first, so the file equals that of an uninterrupted run but for
        ``seconds``; damaged lines are left out with a warning.
      tensorboard: a folder for the same numbers.
      progress: a live progress bar, where there is a terminal.
      checkpoint_dir: a folder for checkpoints. If it holds one that is at least as far as
        ``state``, the run goes on from there; a damaged one, or one that is not finite, is
        set aside with a warning and the one before used. A second run in the same folder, or
        with the same ``log``, is refused.
      checkpoint_every: steps between checkpoints; the end of a call always writes one.
      keep: number of checkpoints kept. Keep at least 2, for a fallback.
      run_id: any JSON value that tells this run from others, such as its configuration.
      patience: stop after this many steps without a value lower by more than ``min_delta``.
      min_delta: see ``patience``; the best point itself is the lowest value, by any margin.
      evaluate: a function ``point -> float``, called on the host, that replaces the outer loss
        for ``best`` and ``patience``; ``point`` has ``params``, ``hparams``, ``model_state``.
      evaluate_every: steps between its calls; the last step of the run is always evaluated.
      callbacks: functions ``callback(step, record)``, called after each step with what the log
        gets; one that returns True (a Python, NumPy or JAX boolean) ends this call, and the
        next call continues the run. None and False go on; anything else is refused.
      on_nonfinite: what to do at a step whose losses, hypergradient or new state are NaN or
        infinite. Its update is dropped in every case: the state, the checkpoints and the best
        point are those of finite steps only. ``"raise"`` raises :class:`NonfiniteError`, which
        names the step and the last finite checkpoint; ``"skip"`` goes on with the next step
        from the state before; ``"stop"`` returns with ``stopped="nonfinite"``.

    Returns:
      :class:`FitResult`, with the best parameters *and* the hyperparameters that belong to
      them: the pair the best value was measured on.

    The step is compiled once, with its state donated. Numbers are read one step late, so that
    the device need not wait for the host; only ``callbacks``, ``evaluate`` and a step at which
    ``patience`` may run out are waited for. A stop therefore takes effect at once. Ctrl-C takes
    effect at the end of a step, a second one at once. Whatever ends the run early, the finished
    steps are logged and saved if that is possible, and the error is raised on.

    Several processes (``jax.distributed``) call it alike, each with what its own devices hold of
    the batches. Arrays of ``state`` that one process holds alone are put on all devices. Process 0
    writes logs and shows progress; each writes its part of a checkpoint. See ``docs/devices.md``.

    Raises:
      TypeError, ValueError: for settings out of range, an ``alg`` of another form, a checkpoint
        of another run (other ``run_id``, ``key``, tree, shapes or dtypes), and processes that
        disagree on settings or on the numbers in ``state``.
      OSError: before the first step, if ``checkpoint_dir`` or ``log`` cannot be written, or
        another run holds them; if every checkpoint is damaged; and for a full disk.
      RuntimeError: for a data function that raises, with the step.
      NonfiniteError: a ``FloatingPointError``, see ``on_nonfinite``.

    Cost: the step's own, one copy of the best point and one of the state while a step runs, and
    one pass over both per step.

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
    arguments.check_run(alg, state, key)
    options = Options(
        alg, key, steps, checkpoint_every, keep, patience, min_delta, evaluate, evaluate_every,
        callbacks, on_nonfinite,
    )  # fmt: skip
    arguments.check_choices(on_nonfinite, evaluate, progress)
    log = arguments.check_path("log", log, folder=False)
    tensorboard = arguments.check_path("tensorboard", tensorboard, folder=True)
    folder = arguments.check_path("checkpoint_dir", checkpoint_dir, folder=True)
    identity = {"run_id": arguments.as_json(run_id), "key": arguments.key_id(key)}
    state = own(state)
    check_same(state, {**identity, **options.told(), "on_nonfinite": on_nonfinite})
    data = Data(inner_data, outer_data, response_data)
    with contextlib.ExitStack() as stack:
        check_interrupt = stack.enter_context(deferred_interrupts())
        by_writer(lambda: _lock(stack, folder, log))
        checkpoints = None if folder is None else Checkpoints(folder, keep, identity)
        first = begin(options, placed(state), data, checkpoints)
        opened = by_writer(
            lambda: _open(stack, log, tensorboard, wants_bar(progress), first.done, steps)
        )
        sinks, history, bar = opened or ([], [], None)
        mark = int(first.carry.best.mark_step)
        hold = on_nonfinite != "skip"
        report = Report(sinks, history, callbacks, patience, mark, hold)
        report.stopped = first.stopped
        run = Run(options, data, checkpoints, report, first.carry, first.done, first.resumed_from)
        run.go(check_interrupt)
        best = run.carry.best
        result = FitResult(
            run.carry.state,
            *best.point,
            float(best.value),
            int(best.step),
            history,
            report.stopped or "steps",
            first.resumed_from,
            trust_of(history, data.notices()),
        )
        if bar is not None:
            bar.tell(str(result.trust))
        if report.stopped == "nonfinite" and on_nonfinite == "raise":
            newest = None if checkpoints is None else checkpoints.newest()
            raise nonfinite_error(result, run.done(), newest)
    return result


def _lock(stack: contextlib.ExitStack, folder: Path | None, log: Path | None) -> None:
    if folder is not None:
        stack.enter_context(locked("checkpoint_dir", folder, folder / ".lock"))
    if log is not None:
        stack.enter_context(locked("log", log, log.with_name(f"{log.name}.lock")))


def _open(
    stack: contextlib.ExitStack,
    log: Path | None,
    tensorboard: Path | None,
    with_bar: bool,
    start: int,
    steps: int,
) -> tuple[list[Any], list[Record], Bar | None]:
    """What takes the records of a run, those that its log already holds, and the bar."""
    sinks, history, bar = [], [], None
    if log is not None:
        sinks.append(stack.enter_context(contextlib.closing(JsonLog(log, start))))
        history.extend(sinks[0].kept)
    if tensorboard is not None:
        board = TensorBoard(tensorboard, start)
        sinks.append(stack.enter_context(contextlib.closing(board)))
    if with_bar:
        bar = stack.enter_context(contextlib.closing(Bar(start, steps)))
        sinks.append(bar)
    return sinks, history, bar
