"""What a run reports while it goes on: records for the log, the display and the callbacks."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from bilevel.run.arguments import wants_to_stop
from bilevel.run.packed import Packed, unpack
from bilevel.run.record import Record, record_of
from bilevel.run.step import PARTS


class Report:
    """Reads the numbers of steps that are under way, and passes them on in order.

    Args:
      sinks: where records are written: each has ``write``, ``sync`` and ``close``.
      history: records of earlier calls; those of this one are appended.
      callbacks: asked after every record.
      patience: steps without a better value that end the run, or None.
      mark: the last step with a better value, as far as the host knows.
      hold: whether a step that is not finite ends the run.

    ``stopped`` says why the run is to end: ``"patience"``, ``"callback"``, ``"nonfinite"``.
    """

    def __init__(
        self,
        sinks: Sequence[Any],
        history: list[Record],
        callbacks: Sequence[Callable[[int, Record], Any]],
        patience: int | None,
        mark: int,
        hold: bool,
    ):
        self.history = history
        self.stopped: str | None = None
        self._sinks = sinks
        self._callbacks = callbacks
        self._patience = patience
        self._mark = mark
        self._hold = hold
        self._pending: list[tuple[int, Packed, float | None, int | None]] = []
        self._began = time.perf_counter()

    def push(self, i: int, numbers: Packed, evaluated: float | None, mark: int | None) -> None:
        """Take the numbers of step ``i``, which need not be there yet; ``mark`` as evaluated."""
        self._pending.append((i, numbers, evaluated, mark))

    def must_wait(self, i: int) -> bool:
        """Whether what is known about step ``i`` may end the run."""
        return bool(self._callbacks) or (
            self._patience is not None and i - self._mark >= self._patience
        )

    def settle(self, leave: int = 0, ask: bool = True) -> None:
        """Write the records of all but the last ``leave`` steps; ``ask`` the callbacks."""
        while len(self._pending) > leave and self.stopped is None:
            i, packed, evaluated, mark = self._pending[0]
            numbers = unpack(packed)
            known = int(numbers.pop("mark_step"))
            self._mark = known if mark is None else mark
            finite = numbers.pop("finite")
            bad = [name for name in PARTS if not finite.get(name, True)]
            record = record_of(i, numbers, evaluated, time.perf_counter() - self._began)
            if bad:
                record["nonfinite"] = bad
            self._pending.pop(0)
            self.history.append(record)
            for sink in self._sinks:
                sink.write(record)
            if self._patience is not None and i - self._mark >= self._patience:
                self.stopped = "patience"
            if ask and self._asked(i, record):
                self.stopped = self.stopped or "callback"
            if bad and self._hold:
                self.stopped = "nonfinite"

    def sync(self) -> None:
        """Make what was written durable."""
        for sink in self._sinks:
            sink.sync()

    def _asked(self, i: int, record: Record) -> bool:
        answers = []
        for place, callback in enumerate(self._callbacks):
            try:
                answer = callback(i, record)
            except Exception as error:
                error.add_note(
                    f"bilevel.fit: raised by `callbacks[{place}]` at step {i}. To end a run from "
                    "a callback, return True."
                )
                raise
            answers.append(wants_to_stop(answer, place, i))
        return any(answers)
