"""Failures that are known, one per line of ``known.txt``: a list to be emptied.

``python tests/odd_inputs --write-known`` writes it anew (for the cases it ran), with what came back
in place of an answer. A line whose case no longer fails makes the slow tier fail.
"""

from collections.abc import Iterable
from pathlib import Path

FILE = Path(__file__).parent / "known.txt"
SEPARATOR = " | "


def read() -> dict[str, tuple[str, str]]:
    """Area and what came back, by the label of the case."""
    if not FILE.exists():
        return {}
    lines = [line.split(SEPARATOR, 2) for line in FILE.read_text().splitlines() if line]
    return {label: (area, what) for area, label, what in lines}


def write(ran: Iterable[str], failed: Iterable[tuple[str, str, str]]) -> None:
    """Replace the lines of the cases that ran by ``(area, label, what)`` of those that failed."""
    ran = set(ran)
    kept = [(a, label, what) for label, (a, what) in read().items() if label not in ran]
    lines = sorted(SEPARATOR.join(entry) for entry in [*kept, *failed])
    FILE.write_text("".join(f"{line}\n" for line in lines))


KNOWN = read()
