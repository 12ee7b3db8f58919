"""What ``fit`` returns, and the error for a step that was not finite."""

from pathlib import Path
from typing import Any, NamedTuple

from bilevel.ground.aliases import Hparams, ModelState, Params
from bilevel.run.record import Record
from bilevel.run.trust import Trust, jumps


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
      stopped: ``"steps"``, ``"patience"``, ``"callback"`` or ``"nonfinite"``.
      resumed_from: steps made before this call, by the checkpoint it went on from, or None.
      trust: how far the numbers in ``history`` can be trusted; ``str(trust)`` is one line.
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
    trust: Trust


class NonfiniteError(FloatingPointError):
    """Raised by ``fit`` for a step that was not finite; its update was dropped.

    Attributes:
      step: the step, which is also the number its batches were asked for with.
      what: the parts that were not finite, such as ``["outer_loss", "params"]``.
      checkpoint: path of the last finite checkpoint, or None.
      result: the ``FitResult`` of the steps before, with the last finite state.
    """

    def __init__(self, message: str, step: int, what: list[str], checkpoint: Any, result: Any):
        super().__init__(message)
        self.step = step
        self.what = what
        self.checkpoint = checkpoint
        self.result = result


def nonfinite_error(result: FitResult, done: int, checkpoint: Path | None) -> NonfiniteError:
    """The error for the last record of ``result``, with the state after ``done`` steps."""
    record = result.history[-1]
    i, status, what = record["step"], record.get("status"), record["nonfinite"]
    saved = "in `error.result`; with `checkpoint_dir` it would be on disk too"
    if checkpoint is not None:
        saved = f"in `error.result`, and the last finite checkpoint is {checkpoint}"
    message = (
        f"step {i} was not finite: {', '.join(what)}"
        f"{'' if status is None else f' (status {status})'}. Its update was dropped; the state "
        f"after {done} steps is kept {saved}. Look at the batches `inner_data({i})` and "
        f"`outer_data({i})`, at the learning rates and at the bounds. The same call goes on from "
        "there: with `on_nonfinite='skip'` to leave such steps out, with 'stop' to end at the "
        "first one without an error."
    )
    # A smaller jump than a run that goes on would be told of: here it has done its harm.
    for notice in jumps(result.history[-2:], 1):
        message += f" Before it, {notice}"
    return NonfiniteError(message, i, what, checkpoint, result)
