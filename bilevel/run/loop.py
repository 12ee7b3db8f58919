"""The loop of a run on the host: where it begins, its steps, and what is kept when it ends."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevel.ground.aliases import Hparams, Key
from bilevel.ground.settings import check_number, check_real
from bilevel.outer.base import Algorithm
from bilevel.run import arguments
from bilevel.run.best import Measured, keep_best_jitted, no_best, point_of_jitted
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.data import Data
from bilevel.run.packed import Packed, unpack
from bilevel.run.processes import placed, several
from bilevel.run.record import Record
from bilevel.run.report import Report
from bilevel.run.step import Carry, check_step, compiled_step, stays_finite


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of a run, checked."""

    alg: Algorithm
    key: Key | None
    steps: int
    checkpoint_every: int
    keep: int
    patience: int | None
    min_delta: float
    evaluate: Callable[[Measured], float] | None
    evaluate_every: int
    callbacks: Sequence[Callable[[int, Record], Any]]
    on_nonfinite: str

    def __post_init__(self) -> None:
        counts = {"steps": (0, "outer steps of the whole run")}
        counts["checkpoint_every"] = (1, "steps between two checkpoints")
        counts["keep"] = (1, "checkpoints to keep")
        counts["evaluate_every"] = (1, "steps between two calls of `evaluate`")
        if self.patience is not None:
            counts["patience"] = (1, "steps to wait for a better value")
        for name, (low, what) in counts.items():
            arguments.check_count(name, getattr(self, name), low, what)
        if self.min_delta is None or getattr(self.min_delta, "ndim", 0):
            raise TypeError(f"`min_delta` must be one real number, got {self.min_delta!r}.")
        check_number("min_delta", self.min_delta)
        check_real("min_delta", self.min_delta, 0)
        arguments.check_callbacks(self.callbacks)

    def told(self) -> dict[str, Any]:
        """The settings in which the processes of a run must agree, as JSON."""
        names = ("steps", "checkpoint_every", "keep", "evaluate_every")
        return {name: int(getattr(self, name)) for name in names} | {
            "patience": self.patience_note()
        }

    def patience_note(self) -> list[Any]:
        """The rule for stopping, as JSON gives it back."""
        return [None if self.patience is None else int(self.patience), float(self.min_delta)]


class Begin(NamedTuple):
    """Where a call begins: with its own state, or with that of a checkpoint."""

    carry: Carry
    done: int
    resumed_from: int | None
    stopped: str | None


def begin(options: Options, state: Any, data: Data, checkpoints: Checkpoints | None) -> Begin:
    done = int(state.step)
    probe = max(min(done, options.steps - 1), 0)
    dtype = check_step(options.alg, state, data(probe), options.key, probe)
    if options.evaluate is not None:
        dtype = jnp.result_type(float)
    best, halted = placed((no_best(options.alg, state, dtype), jnp.asarray(False)), state)
    found = None
    if checkpoints is not None:
        found = checkpoints.restore(
            {"state": state, "best": best},
            lambda tree: bool(
                stays_finite(tree["state"].params, state.params)
                & stays_finite(tree["state"].hparams, state.hparams)
            ),
        )
    if found is None or found.step < done:
        return Begin(Carry(state, best, halted), done, None, None)
    carry = Carry(found.tree["state"], found.tree["best"], halted)
    same = found.notes["patience"] == options.patience_note()
    return Begin(carry, found.step, found.step, found.notes["stopped"] if same else None)


@dataclasses.dataclass
class Run:
    """A run under way, on the host: what it carries, and how far it is saved."""

    options: Options
    data: Data
    checkpoints: Checkpoints | None
    report: Report
    carry: Carry
    start: int
    saved: int | None

    def go(self, check_interrupt: Callable[[], None]) -> None:
        """All steps; whatever ends them, those that were finished are logged and saved."""
        try:
            self._steps(check_interrupt)
            nothing = self.report.stopped == "nonfinite" and self.done() == self.start
            if self.done() != self.saved and not nothing:
                self._save()
        except BaseException as error:
            self._rescue(error)
            raise

    def _steps(self, check_interrupt: Callable[[], None]) -> None:
        options, report = self.options, self.report
        advance = compiled_step(options.alg, float(options.min_delta), options.evaluate is None)
        hold = options.on_nonfinite != "skip"
        for i in range(self.start, options.steps):
            if report.stopped is not None:
                return
            batches = self.data(i)
            self.carry, numbers, before = advance(self.carry, batches, options.key, i, hold)
            done = i + 1
            last = done == options.steps
            evaluated, mark = None, None
            if options.evaluate is not None and (last or done % options.evaluate_every == 0):
                evaluated = self._evaluate(i, numbers, before)
                mark = int(self.carry.best.mark_step)
            report.push(i, numbers, evaluated, mark)
            save_now = self.checkpoints is not None and done % options.checkpoint_every == 0
            report.settle(0 if last or save_now or report.must_wait(i) else 1)
            if save_now and report.stopped != "nonfinite":
                self._save()
            check_interrupt()

    def _evaluate(self, i: int, packed: Packed, hparams: Hparams) -> float | None:
        """``evaluate`` at the point of step ``i``, unless that step was dropped."""
        options = self.options
        state, best, halted = self.carry
        finite = unpack(packed)["finite"]
        if bool(halted) or not all(finite.values()):
            return None
        point = point_of_jitted(options.alg, state, hparams)
        try:
            evaluated = options.evaluate(point)  # type: ignore[misc]
        except Exception as error:
            error.add_note(f"bilevel.fit: raised by `evaluate` at step {i}.")
            raise
        evaluated = arguments.as_number(evaluated, i)
        best = keep_best_jitted(best, point, evaluated, i, options.min_delta)
        self.carry = Carry(state, best, halted)
        return evaluated

    def done(self) -> int:
        return int(self.carry.state.step)

    def _save(self) -> None:
        done = self.done()
        if self.checkpoints is not None:
            self.report.sync()
            # A callback ends a call; only patience ends the run.
            lasting = "patience" if self.report.stopped == "patience" else None
            notes = {"stopped": lasting, "patience": self.options.patience_note()}
            tree = {"state": self.carry.state, "best": self.carry.best}
            self.checkpoints.save(done, tree, notes)
        self.saved = done

    def _rescue(self, error: BaseException) -> None:
        """Log and save the finished steps; ``error`` stays the one that is raised.

        Saving takes all processes, and the others may not have come to this error.
        """
        try:
            if not several():
                self.report.settle(ask=False)
            if not several() and self.done() not in (self.start, self.saved):
                self._save()
        except Exception as second:
            error.add_note(
                f"bilevel.fit: the steps since the last checkpoint could not be saved ({second})."
            )
        newest = None if self.checkpoints is None else self.checkpoints.newest()
        if newest is not None:
            error.add_note(f"bilevel.fit: the same call goes on from {newest}.")
