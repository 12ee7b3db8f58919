"""The log of a run: one JSON object per line, one line per step."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bilevel.run.record import Record, as_json, from_json


class _Read(NamedTuple):
    """What a log holds: the records to keep with their bytes, and the numbers of bad lines."""

    kept: list[Record]
    lines: list[bytes]
    bad: list[int]


class JsonLog:
    """One JSON object per line, one line per step.

    Opened for a run that starts at ``start``: lines of steps from ``start`` on, and a line cut
    short by a kill, are removed first, so that the file of a resumed run is that of one never
    interrupted (but for ``seconds``). Lines that are damaged, or out of order, are left out with
    a warning, and the file as it was is kept beside the log. ``kept`` holds the records that
    remain.
    """

    def __init__(self, path: str | os.PathLike[str], start: int):
        self.path = Path(path)
        self._failed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")
            data = self.path.read_bytes()
            read = _read(data, start)
            self.kept = read.kept
            whole = b"".join(read.lines)
            if read.bad:
                aside = self._set_aside(data)
                self._rewrite(whole)
                self._warn(read, start, aside)
            elif data.startswith(whole):
                os.truncate(self.path, len(whole))
            else:
                self._rewrite(whole)
        except OSError as error:
            raise OSError(
                f"`log` {self.path} cannot be written ({error}): choose a file you may write to."
            ) from error

    def _rewrite(self, data: bytes) -> None:
        self._file.close()
        _replace(self.path, data)
        self._file = open(self.path, "ab")

    def _set_aside(self, data: bytes) -> Path:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        _replace(aside, data)
        return aside

    def _warn(self, read: _Read, start: int, aside: Path) -> None:
        missing = sorted(set(range(start)) - {record["step"] for record in read.kept})
        lost = f" Steps without a record: {_ranges(missing)}." if missing else ""
        warnings.warn(
            f"`log` {self.path} is damaged in line {_ranges(read.bad)}: those lines are left out, "
            f"the other records are kept.{lost} The file as it was is kept as {aside.name}.",
            stacklevel=5,
        )

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system, which outlives this process."""
        line = json.dumps(as_json(record), allow_nan=False).encode() + b"\n"
        with self._named(f"step {record['step']}"):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Make the lines durable, before a checkpoint that relies on them."""
        with self._named("the last steps"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError) if self._failed else self._named("the last steps"):
            self._file.close()

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Errors of the file system name the argument and the remedy, and stay."""
        try:
            if self._failed:
                raise OSError("it failed before")
            yield
        except OSError as error:
            self._failed = True  # half a line may have been written: no other must follow it
            raise OSError(
                f"`log` {self.path} could not take the record of {what} ({error}). Nothing before "
                "it is lost: free space on that disk, or choose another `log`, and call `fit` "
                "again to go on from the last checkpoint."
            ) from error


def _read(data: bytes, start: int) -> _Read:
    read = _Read([], [], [])
    last = -1
    lines = _lines(data)
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is None:
            if number < len(lines) or line.endswith(b"\n"):
                read.bad.append(number)  # else a line cut short by a kill
        elif record["step"] >= start:
            continue
        elif record["step"] <= last:
            read.bad.append(number)
        else:
            last = record["step"]
            read.kept.append(record)
            read.lines.append(line if line.endswith(b"\n") else line + b"\n")
    return read


def _lines(data: bytes) -> list[bytes]:
    *whole, last = data.split(b"\n")
    return [line + b"\n" for line in whole] + ([last] if last else [])


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    whole = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    return from_json(record) if whole else None


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    writing = path.with_name(f"{path.name}.writing")
    with open(writing, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(writing, path)


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 4-6`` for 1, 4, 5, 6."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
