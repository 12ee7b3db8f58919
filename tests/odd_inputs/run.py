"""All cases, a sample of them, and the table of their outcomes."""

import collections
import importlib
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from odd_inputs.case import BAD, GOOD, Case, Verdict, judge
from odd_inputs.known import KNOWN

AREAS = ("settings", "calls", "losses", "points", "dtypes", "batches", "regularizers", "bounds",
         "loops", "single_loops", "penalties", "runs", "tools", "objectives")  # fmt: skip


class Row(NamedTuple):
    case: Case
    verdict: Verdict
    seconds: float

    @property
    def known(self) -> bool:
        """Whether it failed, and the list of known failures says so."""
        return self.verdict.what in BAD and self.case.label in KNOWN


def all_cases(areas: Iterable[str] = AREAS) -> list[Case]:
    """Every case, in a fixed order."""
    modules = [importlib.import_module(f"odd_inputs.{area}") for area in areas]
    return [case for module in modules for case in module.cases()]


def sample(cases: list[Case], size: int) -> list[Case]:
    """The same few of every area and kind each time: rare kinds come first, then others."""
    groups = collections.defaultdict(list)
    for case in cases:
        groups[case.area, case.kind].append(case)
    draw = random.Random(0)
    for group in groups.values():
        draw.shuffle(group)
    order = []
    while len(order) < size and any(groups.values()):
        keys = [key for key, group in groups.items() if group]
        draw.shuffle(keys)
        order += [groups[key].pop() for key in keys]
    chosen = {case.label for case in order[:size]}
    return [case for case in cases if case.label in chosen]


def run(cases: list[Case], tell: Callable[[Row], Any] = lambda row: None) -> list[Row]:
    """Judge them one after the other."""
    rows = []
    for case in cases:
        began = time.perf_counter()
        verdict = judge(case)
        rows.append(Row(case, verdict, time.perf_counter() - began))
        tell(rows[-1])
    return rows


def share_of_clear_errors(rows: list[Row]) -> float:
    """Of the errors, those that are ours, name the argument and say what to do."""
    counts = collections.Counter(row.verdict.what for row in rows)
    errors = counts["refused"] + counts["unclear"] + counts["raw"]
    return counts["refused"] / max(errors, 1)


def table(rows: list[Row]) -> str:
    """Outcomes by area."""
    what = (*GOOD, *BAD)
    counts: dict = collections.defaultdict(collections.Counter)
    seconds: dict = collections.Counter()
    for row in rows:
        for area in (row.case.area, "all"):
            counts[area][row.verdict.what] += 1
            seconds[area] += row.seconds
    lines = ["area          cases " + "".join(f"{w:>9}" for w in what) + "   seconds"]
    for area, found in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        total = sum(found.values())
        cells = "".join(f"{found[w]:>9}" for w in what)
        lines.append(f"{area:<13} {total:>5} {cells} {seconds[area]:>9.1f}")
    lines.append(f"errors that name the argument and the remedy: {share_of_clear_errors(rows):.1%}")
    return "\n".join(lines)
