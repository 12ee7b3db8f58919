"""Summary statistics of a run, and the inequalities of `expected.json` on them.

`expected.json` is a list of objects: `name` (the claim in words), `expression`, `relation` (one of
<=, <, >=, >; by default <=), `bound`, `source` (where the bound comes from), and optionally
`published` (the paper's own figure), `presets` (the presets that the bound is meant for; all
if absent) and `headline` (one per experiment, its row of the report: see `HEADLINE`). An
expression is arithmetic on statistics such as
`cg.validation_loss.mean / random_search.validation_loss.mean`: method, metric, then one of mean,
std, median, min, max, over seeds, of the last record of each. It is parsed, never evaluated as
Python.

A claim on means is judged by its interval over seeds (`uncertainty.py`): met, not met, or within
noise, where the interval holds the bound.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common import record, uncertainty
from experiments.common.expressions import evaluate as evaluate
from experiments.common.uncertainty import interval as interval
from experiments.common.uncertainty import statistics as statistics

RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
FIELDS = {
    "name", "expression", "relation", "bound", "source", "published", "presets", "headline",
}  # fmt: skip
REQUIRED = ("name", "expression", "bound", "source")
# claim: one sentence; ours, opponent: statistics such as `cg.test_loss`, whose means are told;
# published: the paper's figure with model and data; scale: how far ours is from the paper's;
# better: "less" or "more" of those statistics, where the claim is about another one.
HEADLINE = {"claim", "ours", "opponent", "published", "scale", "better"}
WORDS = ("met", "not met", "within noise", "not judged")


class Verdict(NamedTuple):
    """One inequality, evaluated.

    `met` is that of the value alone, None where the preset is not the one it is meant for. `word`
    is the verdict, one of `WORDS`, by the interval from `low` to `high` where there is one; `how`
    says what that interval is.
    """

    name: str
    value: float | None
    relation: str
    bound: float
    met: bool | None
    source: str
    published: float | str | None
    reason: str
    word: str = "not judged"
    low: float | None = None
    high: float | None = None
    how: str = ""


def paired(
    records: Iterable[record.Record], metric: str, a: str, b: str, *, ratio: bool = False
) -> dict[str, Any]:
    """a less b, or a over b, in the last records of every seed that has both; with its interval."""
    last = record.final(records)
    seeds = sorted(seed for method, seed in last if method == a and (b, seed) in last)
    pairs = {s: (last[a, s].metrics[metric], last[b, s].metrics[metric]) for s in seeds}
    return interval({s: x / y if ratio else x - y for s, (x, y) in pairs.items()})


def summarise(records: Iterable[record.Record]) -> dict[str, Any]:
    """`{method: {metric: statistics}}` of the last record of each method and seed."""
    columns: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (method, seed), last in record.final(records).items():
        for metric, value in {"cost": last.cost, **last.metrics}.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                columns[method][metric][seed] = float(value)
    return {
        method: {metric: statistics(values) for metric, values in metrics.items()}
        for method, metrics in columns.items()
    }


def load(path: Path) -> list[dict[str, Any]]:
    """Reads and checks `expected.json`."""
    entries = record.read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path.name} must hold a list of inequalities")
    for entry in entries:
        missing = [field for field in REQUIRED if field not in entry]
        unknown = sorted((set(entry) - FIELDS) | (set(entry.get("headline", {})) - HEADLINE))
        if missing or unknown or entry.get("relation", "<=") not in RELATIONS:
            raise ValueError(
                f"{path.name}: {entry.get('name', entry)!r} must have {', '.join(REQUIRED)}, a "
                f"relation of {', '.join(RELATIONS)}, and nothing unknown; missing: {missing}, "
                f"unknown: {unknown}"
            )
    if sum("headline" in entry for entry in entries) > 1:
        raise ValueError(f"{path.name}: one entry at most may have a headline")
    return entries


def judge(
    entries: Iterable[dict[str, Any]],
    summary: dict[str, Any],
    preset: str,
    *,
    partial: bool = False,
) -> list[Verdict]:
    """Evaluates every inequality; one that cannot be evaluated, or is NaN, is not met.

    `partial` is for a run of some methods only, or from before a claim was made: what cannot be
    evaluated then is not judged.
    """
    verdicts = []
    for entry in entries:
        relation, bound = entry.get("relation", "<="), float(entry["bound"])
        told: dict[str, Any] = {"reason": f"not meant for preset {preset}", "met": None}
        value = None
        if preset in entry.get("presets", (preset,)):
            try:
                value = uncertainty.value(entry["expression"], summary)
                told = _verdict(entry["expression"], summary, value, relation, bound)
            except ValueError as error:
                told = {"met": None if partial else False, "reason": str(error)}
                told["word"] = "not judged" if partial else "not met"
        verdicts.append(
            Verdict(
                name=entry["name"],
                value=value,
                relation=relation,
                bound=bound,
                source=entry["source"],
                published=entry.get("published"),
                **told,
            )
        )
    return verdicts


def _verdict(
    expression: str, summary: dict[str, Any], value: float, relation: str, bound: float
) -> dict[str, Any]:
    """Whether the value meets the bound, and whether all of its interval does."""
    holds = RELATIONS[relation]
    met = bool(holds(value, bound))
    told: dict[str, Any] = {"met": met, "reason": "", "word": "met" if met else "not met"}
    spread = uncertainty.spread(expression, summary)
    if spread is None:
        return told
    ends = {bool(holds(end, bound)) for end in (spread.low, spread.high)}
    # The claim may be on an end of an interval ("upper end at most 1"): then it is met by that.
    if len(ends) == 2 and not (met and spread.how == uncertainty.ENDS):
        told["word"] = "within noise"
    return told | spread._asdict()
