"""What seeds leave open: statistics that keep the value of every seed, and intervals of claims.

All intervals are at 95 %, by Student's t over seeds. That of an expression on means is the
jackknife's: the expression is computed anew without each seed. For a difference of two methods
that is the usual paired interval, and the same seed's luck, which both methods share, cancels. A
ratio is treated on a logarithmic scale, as ratios are: its interval is never negative.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.common.expressions import evaluate, is_ratio, leaves

LEVEL = 0.95
PAIRED = "paired over seeds"
INDEPENDENT = "from deviations: no seed was kept"
ENDS = "both ends"


class Spread(NamedTuple):
    """An interval, and how it was made."""

    low: float
    high: float
    how: str


def statistics(values: Iterable[float] | Mapping[int, float]) -> dict[str, Any]:
    """Mean, standard deviation, median, minimum, maximum and count of one number per seed.

    A mapping from seeds keeps its values.
    """
    keyed = isinstance(values, Mapping)
    array = np.asarray(list(values.values() if keyed else values), np.float64)
    told: dict[str, Any] = {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if array.size > 1 else 0.0,
        "median": float(np.median(array)),
        "min": float(array.min()),
        "max": float(array.max()),
        "seeds": int(array.size),
    }
    return (
        {**told, "values": {str(seed): float(x) for seed, x in values.items()}} if keyed else told
    )


def quantile(freedom: int) -> float:
    """The factor of a standard error at which a 95 % interval ends."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def interval(values: list[float] | Mapping[int, float]) -> dict[str, Any]:
    """The usual statistics, and the ends of the 95 % interval of the mean (Student's t)."""
    told = statistics(values)
    count = told["seeds"]
    half = quantile(count - 1) * told["std"] / math.sqrt(count) if count > 1 else 0
    return {**told, "low": told["mean"] - half, "high": told["mean"] + half}


def spread(expression: str, summary: dict[str, Any]) -> Spread | None:
    """The interval of a claim, or None: for one seed, or for a claim about the worst of seeds."""
    paths = leaves(expression)
    fields = {path[-1] for path in paths}
    tables = {path[:-1]: _table(summary, path[:-1]) for path in paths}
    if fields & {"low", "high"}:
        other = evaluate(_swapped(expression), summary)
        value = evaluate(expression, summary)
        return _finite(min(value, other), max(value, other), ENDS)
    if fields != {"mean"}:
        return None
    if all(len(table.get("values", ())) > 1 for table in tables.values()):
        return _jackknife(expression, summary, tables)
    if len(paths) == 1 and expression.strip() == ".".join(paths[0]):
        (table,) = tables.values()
        if "low" in table and table["seeds"] > 1:
            return _finite(table["low"], table["high"], PAIRED)
    if all(table.get("seeds", 1) > 1 for table in tables.values()):
        return _independent(expression, summary, tables)
    return None


def value(expression: str, summary: dict[str, Any]) -> float:
    """The value of a claim; one on means, of the seeds that all its statistics have."""
    paths = leaves(expression)
    if {path[-1] for path in paths} == {"mean"}:
        evaluate(expression, summary)  # a name that is not there is told with those that are
        tables = {path[:-1]: _table(summary, path[:-1]) for path in paths}
        seeds = [set(table.get("values", ())) for table in tables.values()]
        shared = set.intersection(*seeds)
        if shared and any(own != shared for own in seeds):
            return _of_seeds(expression, summary, tables, sorted(shared))
    return evaluate(expression, summary)


def _of_seeds(
    expression: str, summary: dict[str, Any], tables: dict[tuple[str, ...], Any], seeds: list[str]
) -> float:
    """An expression on means, with the means of these seeds alone."""
    means = {
        path: float(np.mean([table["values"][seed] for seed in seeds]))
        for path, table in tables.items()
    }
    return evaluate(expression, _with(summary, means))


def _finite(low: float, high: float, how: str) -> Spread | None:
    return Spread(low, high, how) if math.isfinite(low) and math.isfinite(high) else None


def _around(middle: float, half: float, how: str, logarithmic: bool) -> Spread | None:
    if not (math.isfinite(middle) and math.isfinite(half)):
        return None
    low, high = middle - half, middle + half
    if logarithmic:  # a half width of hundreds says nothing, and overflows
        low, high = math.exp(max(low, -700.0)), math.exp(min(high, 700.0))
    return _finite(low, high, how)


def _table(summary: Any, path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        summary = summary[key]
    return summary


def _swapped(expression: str) -> str:
    """Lower ends for upper ones and the reverse."""
    return expression.replace(".low", ".\0").replace(".high", ".low").replace(".\0", ".high")


def _with(summary: dict[str, Any], means: dict[tuple[str, ...], float]) -> dict[str, Any]:
    """The summary with other means, of the tables named by their paths."""
    changed: dict[str, Any] = {}
    for path, mean in means.items():
        table = changed
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = {"mean": mean}
    return changed


def _jackknife(
    expression: str, summary: dict[str, Any], tables: dict[tuple[str, ...], dict[str, Any]]
) -> Spread | None:
    shared = sorted(set.intersection(*(set(table["values"]) for table in tables.values())))
    count = len(shared)
    if count < 2:
        return None

    whole = _of_seeds(expression, summary, tables, shared)
    without = [
        _of_seeds(expression, summary, tables, [other for other in shared if other != seed])
        for seed in shared
    ]
    logarithmic = is_ratio(expression) and min(whole, *without) > 0
    points = np.log([whole, *without]) if logarithmic else np.asarray([whole, *without])
    pseudo = count * points[0] - (count - 1) * points[1:]
    half = quantile(count - 1) * float(pseudo.std(ddof=1)) / math.sqrt(count)
    return _around(float(points[0]), half, PAIRED, logarithmic)


def _independent(
    expression: str, summary: dict[str, Any], tables: dict[tuple[str, ...], dict[str, Any]]
) -> Spread | None:
    """The error propagated from every mean, as if no two of them shared a seed."""
    means = {path: table["mean"] for path, table in tables.items()}
    variance = 0.0
    for path, table in tables.items():
        error = table["std"] / math.sqrt(table["seeds"])
        ends = (
            evaluate(expression, _with(summary, {**means, path: means[path] + sign * error}))
            for sign in (1, -1)
        )
        variance += ((next(ends) - next(ends)) / 2) ** 2
    whole = evaluate(expression, _with(summary, means))
    half = quantile(min(table["seeds"] for table in tables.values()) - 1) * math.sqrt(variance)
    if is_ratio(expression) and whole > 0:
        return _around(math.log(whole), half / whole, INDEPENDENT, True)
    return _around(whole, half, INDEPENDENT, False)
