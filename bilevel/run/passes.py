r"""The two passes of a metagradient: forward over all steps, backward segment by segment."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Hparams
from bilevel.inner.descend import InnerState
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.display import wants_bar
from bilevel.run.segments import Batches, Segment, Steps, digest_of

ALL = 10**9


class Saved:
    """A run on disk: states of the forward pass, and how far the backward pass came.

    Args:
      folder: two folders of checkpoints are made there, ``forward`` and ``backward``.
      every: steps between states.
      run_id, steps, begun: what tells this run from others; of ``begun`` its digest.
    """

    def __init__(self, folder: Path, every: int, run_id: Any, steps: int, begun: Any):
        self.every = every
        identity = {
            "run_id": run_id,
            "steps": steps,
            "checkpoint_every": every,
            "params and hparams": digest_of(begun)[:16],
        }
        self.states = Checkpoints(folder / "forward", ALL, identity, "metagradient")
        self._folder, self._identity = folder, identity

    def progress(self, given: list[Any]) -> Checkpoints:
        """Of the backward pass that begins with these cotangents: another outer loss is refused."""
        identity = self._identity | {"outer": digest_of(given)[:16]}
        return Checkpoints(self._folder / "backward", 2, identity, "metagradient")

    def state_at(self, step: int, like: InnerState) -> tuple[int, InnerState] | None:
        """The newest whole state at or before ``step``."""
        for at in reversed([s for s in self.states.steps() if s <= step]):
            try:
                return at, self.states.read(at, like)
            except OSError as error:
                warnings.warn(f"{error}: its steps are made again.", stacklevel=2)
        return None


class Passes:
    """Both passes of one run.

    Args:
      run: the compiled functions.
      batches: the batches by step, compared where they are read again.
      first, steps: the run.
      places: states that may be kept, beside the first of a segment; or None: every step leaves
        what its derivative needs, and none is made again.
      saved: a run on disk, or None.
      check_interrupt: raises where an interrupt is due.
    """

    def __init__(
        self,
        run: Steps,
        batches: Batches,
        hparams: Hparams,
        first: int,
        steps: int,
        places: int | None,
        saved: Saved | None,
        progress: bool,
        check_interrupt: Callable[[], None],
    ):
        self._run, self._batches, self._hparams = run, batches, hparams
        self._first, self._end, self._links = first, first + steps, places is None
        self._saved, self._check_interrupt = saved, check_interrupt
        length = steps if saved is None else saved.every
        starts = range(first, self._end, length)
        self._segments = [Segment(s, min(length, self._end - s), places or 0) for s in starts]
        self._bar = _Bar(steps) if wants_bar(progress) else None

    def close(self) -> None:
        """Leave the last line of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()

    def forward(self, begun: InnerState) -> tuple[InnerState, np.ndarray]:
        """The state after the last step, and what each told, (steps, 3): see ``Steps``."""
        state, told, step = begun, [], self._first
        saved = self._saved
        if saved is not None:
            found = saved.states.restore(begun)
            if found is not None:
                state, step = found.tree, self._first + found.step
                told = list(found.notes["told"])
                self._batches.seen.update({int(k): v for k, v in found.notes["sums"].items()})
        resumed = step
        last = self._segments[-1]
        while step < self._end:
            self._check_interrupt()
            done = step - self._first
            if saved is not None and done % saved.every == 0 and (done == 0 or step > resumed):
                told = self._save(done, state, told)
            if step >= last.first and self._links:
                state, seen = self._link(last, state, step)
            else:
                if step >= last.first:
                    last.pass_by(step, state)
                state, seen = self._run.advance(state, self._hparams, self._batches(step))
            told.append(seen)
            step += 1
            self._told("forward", step - self._first)
        if saved is not None and resumed < self._end:
            told = self._save(self._end - self._first, state, told)
        return state, np.asarray(jax.device_get(told), np.float64)

    def _link(self, segment: Segment, state: InnerState, step: int) -> tuple[InnerState, jax.Array]:
        batch = _own(self._batches(step))
        new, seen, kept = self._run.link(state, self._hparams, batch)
        segment.links.append((kept, state, self._hparams, batch))
        return new, seen

    def _save(self, done: int, state: InnerState, told: list[Any]) -> list[Any]:
        told = [[float(x) for x in row] for row in jax.device_get(told)]
        if self._saved is not None and done not in self._saved.states.steps():
            seen = {str(step): found for step, found in self._batches.seen.items()}
            notes = {"told": told, "sums": seen}  # as JSON gives them back
            self._saved.states.save(done, state, notes)
        return told

    def backward(self, given: list[Any], begun: InnerState) -> tuple[list[Any], Hparams]:
        """Cotangents of the state before the first step, and the gradient through the run."""
        found = jax.tree.map(jnp.zeros_like, self._hparams)
        carried: Any = given, found
        pulled, progress = 0, None
        if self._saved is not None:
            progress = self._saved.progress(given)
            restored = progress.restore(carried)
            if restored is not None:
                carried, pulled = restored.tree, restored.step

        def advance(state: InnerState, step: int) -> InnerState:
            return self._run.advance(state, self._hparams, self._batches(step))[0]

        def moved(new: Any) -> None:
            nonlocal carried, pulled
            carried = new
            pulled += 1
            self._told("backward", pulled)
            self._check_interrupt()

        def pull(state: InnerState, step: int) -> None:
            batch = self._batches(step)
            moved(self._run.pull(state, self._hparams, batch, *carried))

        for segment in reversed(self._segments):
            if segment.first + segment.steps > self._end - pulled:
                continue  # an earlier process did it
            if self._links:
                self._fill_links(segment, begun)
                for step in reversed(range(segment.first, segment.first + segment.steps)):
                    self._batches.compare(step)
                    moved(self._run.follow(*segment.links.pop(), *carried))
            else:
                if not segment.is_filled():
                    self._fill(segment, begun, advance)
                segment.reverse(advance, pull)
                segment.kept.clear()
            if progress is not None:
                progress.save(pulled, carried, {})
        return carried

    def _start_of(self, segment: Segment, begun: InnerState) -> tuple[int, InnerState]:
        """The newest state at or before a segment, and its step."""
        if self._saved is not None:
            found = self._saved.state_at(segment.first - self._first, begun)
            if found is not None:
                return self._first + found[0], found[1]
        return self._first, begun

    def _fill_links(self, segment: Segment, begun: InnerState) -> None:
        if len(segment.links) == segment.steps:
            return
        segment.links.clear()
        at, state = self._start_of(segment, begun)
        for step in range(at, segment.first + segment.steps):
            if step >= segment.first:
                state, _ = self._link(segment, state, step)
            else:
                state, _ = self._run.advance(state, self._hparams, self._batches(step))

    def _fill(self, segment: Segment, begun: InnerState, advance: Callable[..., Any]) -> None:
        at, state = self._start_of(segment, begun)
        for step in range(at, segment.last_kept() + 1):
            if step >= segment.first:
                segment.pass_by(step, state)
            if step < segment.last_kept():
                state = advance(state, step)

    def _told(self, stage: str, done: int) -> None:
        if self._bar is not None:
            self._bar.tell(stage, done)


def _own(batch: Batch) -> Batch:
    """``batch`` with copies of NumPy arrays, which a loader may fill again."""
    return jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, batch)


class _Bar:
    """Two live lines on the terminal: steps made, steps pulled back."""

    def __init__(self, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(TextColumn("{task.description}"), BarColumn(),
                                  MofNCompleteColumn())  # fmt: skip
        self._progress.start()
        self._tasks = {
            name: self._progress.add_task(name, total=steps) for name in ("forward", "backward")
        }

    def tell(self, stage: str, done: int) -> None:
        self._progress.update(self._tasks[stage], completed=done)

    def close(self) -> None:
        self._progress.stop()
