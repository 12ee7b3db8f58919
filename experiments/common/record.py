"""Records: one JSON line for each measurement, appended as the run goes.

A line is `{"seed", "method", "step", "cost", "metrics"}`, with the cost counted in inner-gradient
evaluations (see `budget.py`). Lines are only ever appended and flushed, so a killed run loses at
most the line it was writing; that torn line is dropped when the file is opened again. A record
holds numbers, strings and lists of them, never a path.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = "records.jsonl"
# Method and metric names are used in the expressions of expected.json.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SEEDS = re.compile(r'"values": \{[^{}]*\}')
# JSON has no word for these; a diverged run must still be a valid file.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Record(NamedTuple):
    """One measurement of one method."""

    seed: int
    method: str
    step: int
    cost: float
    metrics: dict[str, Any]


def plain(value: Any) -> Any:
    """`value` as JSON knows it: arrays become lists, non-finite floats become their names."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    raise TypeError(f"a record holds numbers, strings, lists and dicts of them, not {type(value)}")


def restored(value: Any) -> Any:
    """The inverse of `plain` as far as JSON remembers: non-finite floats are floats again."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def write_json(path: Path, content: Any) -> None:
    """Writes a whole JSON file or nothing: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(plain(content), indent=2, allow_nan=False)
    # The values of all seeds stand in one line.
    text = SEEDS.sub(lambda found: re.sub(r"\s+", " ", found[0]), text)
    partial.write_text(text + "\n", "utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote."""
    return restored(json.loads(path.read_text("utf-8")))


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; a last line without its newline was torn by a kill."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def read(out: Path, *, seed: int | None = None, method: str | None = None) -> list[Record]:
    """The records of an output folder, in the order written, of one seed or method if asked."""
    records = (Record(**restored(json.loads(line))) for line in _lines(out / FILE))
    return [
        record
        for record in records
        if (seed is None or record.seed == seed) and (method is None or record.method == method)
    ]


def keep(out: Path, wanted: Callable[[Record], bool]) -> None:
    """Rewrites the records of an output folder with only those that are wanted, atomically."""
    path = out / FILE
    lines = _lines(path)
    kept = [line for line in lines if wanted(Record(**restored(json.loads(line))))]
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    os.replace(partial, path)


class Records:
    """Appends the records of one seed to `out/records.jsonl`.

    Example:
        >>> import pathlib, tempfile
        >>> out = pathlib.Path(tempfile.mkdtemp())
        >>> Records(out, seed=0).append("cg", step=1, cost=12.5, loss=0.5)
        >>> read(out)
        [Record(seed=0, method='cg', step=1, cost=12.5, metrics={'loss': 0.5})]
    """

    def __init__(self, out: Path, seed: int):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.seed = out, seed
        path = out / FILE
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            keep(out, lambda record: True)

    def append(self, method: str, step: int, cost: float, **metrics: Any) -> None:
        """Appends one line. Names must be identifiers, because `expected.json` speaks of them."""
        for name in (method, *metrics):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot name a method or metric of a record: use letters, digits and "
                    "underscores, starting with a letter"
                )
        record = Record(self.seed, method, int(step), float(cost), metrics)
        line = json.dumps(plain(record._asdict()), allow_nan=False) + "\n"
        with (self.out / FILE).open("a", encoding="utf-8") as file:
            file.write(line)

    def finished(self, method: str, count: int) -> bool:
        """Whether this seed has all `count` records of a method; if not, it forgets them."""
        if len(read(self.out, seed=self.seed, method=method)) == count:
            return True
        self.rewind(method)
        return False

    def rewind(self, method: str | None = None, step: int = -1) -> None:
        """Forgets this seed's records (of one method, if named) after `step`.

        A resumed method calls this with the step of its checkpoint, so that the steps which were
        recorded but not checkpointed are not recorded twice.
        """
        keep(
            self.out,
            lambda record: (
                record.seed != self.seed
                or (method is not None and record.method != method)
                or record.step <= step
            ),
        )


def save_arrays(out: Path, name: str, **arrays: Any) -> None:
    """Saves arrays too large for a line as `out/arrays/NAME.npz`, whole or not at all."""
    folder = out / "arrays"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial.npz"
    contents: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
    np.savez_compressed(partial, **contents)
    os.replace(partial, folder / f"{name}.npz")


def load_arrays(out: Path, name: str) -> dict[str, np.ndarray]:
    """Loads what `save_arrays` saved."""
    with np.load(out / "arrays" / f"{name}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def final(records: Iterable[Record]) -> dict[tuple[str, int], Record]:
    """The last record of each method and seed (greatest step; the later line if equal)."""
    last: dict[tuple[str, int], Record] = {}
    for record in records:
        key = (record.method, record.seed)
        if key not in last or record.step >= last[key].step:
            last[key] = record
    return last
