"""Where a run is told: a progress bar, one JSON line a step, TensorBoard."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.aliases import Hparams
from bilevel.status import Status

Record = dict[str, Any]

SMALL = 16
"""A hyperparameter array of up to this many entries is written out."""


def _named(tree: Any, default: str) -> dict[str, Any]:
    """Leaves by their path, written ``net/decay``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or default: leaf
        for path, leaf in flat
    }


def numbers_of(info: Any, hparams: Hparams) -> dict[str, Any]:
    """Every scalar of an outer step by its name in the log, and the small hyperparameters."""
    numbers = {"outer_loss": info.value}
    names = {"inner_value": "inner_loss", "hypergrad_norm": "hypergrad_norm", "result": "status"}
    for field, name in names.items():
        if hasattr(info, field):
            numbers[name] = getattr(info, field)
    numbers.update(getattr(info, "stats", None) or {})
    for path, leaf in _named(getattr(info, "aux", None), "").items():
        if jnp.shape(leaf) == ():
            numbers[f"aux/{path}".rstrip("/")] = leaf
    numbers["hparams"] = {
        path: leaf for path, leaf in _named(hparams, "hparams").items() if jnp.size(leaf) <= SMALL
    }
    return jax.tree.map(jnp.asarray, numbers)


def record_of(
    step: int, numbers: dict[str, Any], evaluated: float | None, seconds: float
) -> Record:
    """The same as plain Python numbers and lists, in the order of the log."""

    def plain(x: Any) -> Any:
        # JSON knows one kind of float; widening bfloat16 and float32 is exact.
        x = np.asarray(x)
        return (x if x.dtype.kind in "iub" else x.astype(np.float64)).tolist()

    record: Record = {"step": step}
    first = ("outer_loss", "inner_loss", "hypergrad_norm", "status")
    for name in (*(n for n in first if n in numbers), *(n for n in numbers if n not in first)):
        record[name] = jax.tree.map(plain, numbers[name])
    if "status" in record:
        record["status"] = Status(record["status"]).name
    if evaluated is not None:
        record["evaluate"] = evaluated
    record["seconds"] = seconds
    return record


def _plain(value: Any) -> Any:
    """``value`` as strict JSON; what JSON cannot say (nan, inf) as text, so nothing is lost."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numeric(value: Any) -> Any:
    """The inverse of :func:`_plain`."""
    if isinstance(value, dict):
        return {k: _numeric(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numeric(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


class JsonLog:
    """One JSON object a line, one line a step.

    Opened for a run that starts at ``start``: lines of steps from ``start`` on, and a line cut
    short by a kill, are removed first, so that the file of a resumed run is that of one never
    interrupted (but for ``seconds``). ``kept`` holds the records that remain.
    """

    def __init__(self, path: str | os.PathLike[str], start: int):
        self.path = Path(path)
        self.kept: list[Record] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise OSError(
                f"`log` {self.path} cannot be written ({error}): choose a file you may write to."
            ) from error
        self._file.seek(0)
        end = 0
        for line in self._file:
            record = self._parse(line)
            if record is None or record["step"] >= start:
                break
            self.kept.append(record)
            end += len(line)
        self._file.truncate(end)

    @staticmethod
    def _parse(line: bytes) -> Record | None:
        try:
            record = json.loads(line)
        except ValueError:
            return None
        whole = line.endswith(b"\n") and isinstance(record, dict)
        return _numeric(record) if whole and isinstance(record.get("step"), int) else None

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system, which outlives this process."""
        self._file.write(json.dumps(_plain(record), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the lines durable, before a checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars of every step for TensorBoard."""

    def __init__(self, folder: str | os.PathLike[str], start: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                '`tensorboard` needs tensorboardX: pip install "bilevel[fit]".'
            ) from None
        # Events of an interrupted run that lie ahead of `start` are hidden by `purge_step`.
        self._writer = SummaryWriter(str(folder), purge_step=start)

    def write(self, record: Record) -> None:
        """Every scalar of the record under its name."""
        for name, value in record.items():
            if name == "hparams":
                for leaf, entry in value.items():
                    if not isinstance(entry, list):
                        self._writer.add_scalar(f"hparams/{leaf}", entry, record["step"])
            elif name not in ("step", "seconds") and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Flush."""
        self._writer.flush()

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


class Bar:
    """A live line on the terminal: losses, hypergradient norm, residual, steps a second."""

    def __init__(self, start: int, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._start = start
        # Narrow, so that a line with a status still fits 80 columns.
        told = TextColumn("{task.fields[told]}")
        self._progress = Progress(MofNCompleteColumn(), BarColumn(bar_width=8), told)
        self._progress.start()
        self._task = self._progress.add_task("outer steps", total=steps, completed=start, told="")

    def write(self, record: Record) -> None:
        """Show one step."""
        status = record.get("status", "ok")
        names = {"inner": "inner_loss", "outer": "outer_loss", "|grad|": "hypergrad_norm"}
        if status == "ok":  # else the status says what the residual would hint at
            names["residual"] = "residual_norm"
        parts = [f"{label} {record[name]:.3g}" for label, name in names.items() if name in record]
        if status != "ok":
            parts.append(f"[yellow]{status}[/yellow]")
        if record["seconds"] > 0:
            parts.append(f"{(record['step'] + 1 - self._start) / record['seconds']:.3g}/s")
        self._progress.update(self._task, completed=record["step"] + 1, told=" ".join(parts))

    def sync(self) -> None:
        """Nothing to make durable."""

    def close(self) -> None:
        """Leave the last line on the screen."""
        self._progress.stop()


def wants_bar(progress: bool) -> bool:
    """Whether to draw a bar: asked for, and there is a terminal to draw it on."""
    if not progress:
        return False
    try:
        from rich.console import Console
    except ImportError:
        return False
    return Console().is_terminal
