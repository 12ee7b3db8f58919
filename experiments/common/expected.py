"""Summary statistics of a run, and the inequalities of `expected.json` on them.

`expected.json` is a list of objects: `name` (the claim in words), `expression`, `relation` (one of
<=, <, >=, >; by default <=), `bound`, `source` (where the bound comes from), and optionally
`published` (the paper's own figure), and `presets` (the presets that the bound is meant for; all
if absent). An expression is arithmetic on statistics such as
`cg.validation_loss.mean / random_search.validation_loss.mean`: method, metric, then one of mean,
std, median, min, max, over seeds, of the last record of each. It is parsed, never evaluated as
Python.
"""

import ast
import math
import operator
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import record

RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
CALLS = {"abs": abs, "min": min, "max": max, "sqrt": math.sqrt, "log": math.log, "exp": math.exp}
FIELDS = {"name", "expression", "relation", "bound", "source", "published", "presets"}
REQUIRED = ("name", "expression", "bound", "source")


class Verdict(NamedTuple):
    """One inequality, evaluated. `met` is None where the preset is not the one it is meant for."""

    name: str
    value: float | None
    relation: str
    bound: float
    met: bool | None
    source: str
    published: float | str | None
    reason: str


def statistics(values: Iterable[float]) -> dict[str, Any]:
    """Mean, standard deviation, median, minimum, maximum and count of one number per seed."""
    array = np.asarray(list(values), np.float64)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if array.size > 1 else 0.0,
        "median": float(np.median(array)),
        "min": float(array.min()),
        "max": float(array.max()),
        "seeds": int(array.size),
    }


def summarise(records: Iterable[record.Record]) -> dict[str, Any]:
    """`{method: {metric: statistics}}` of the last record of each method and seed."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (method, _), last in record.final(records).items():
        for metric, value in {"cost": last.cost, **last.metrics}.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                columns[method][metric].append(float(value))
    return {
        method: {metric: statistics(values) for metric, values in metrics.items()}
        for method, metrics in columns.items()
    }


def _value(node: ast.AST, summary: dict[str, Any], text: str) -> Any:
    match node:
        case ast.Expression(body=body):
            return _value(body, summary, text)
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, summary, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return BINARY[type(op)](_value(left, summary, text), _value(right, summary, text))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in CALLS:
            return CALLS[name](*(_value(argument, summary, text) for argument in args))
        case ast.Name(id=key):
            return _lookup(summary, key, text)
        case ast.Attribute(value=inner, attr=key):
            return _lookup(_value(inner, summary, text), key, text)
    raise ValueError(
        f"the expression {text!r} may hold numbers, names, + - * / ** and {sorted(CALLS)}"
    )


def _lookup(table: Any, key: str, text: str) -> Any:
    if not isinstance(table, dict) or key not in table:
        known = ", ".join(sorted(table)) if isinstance(table, dict) else "nothing below it"
        raise ValueError(f"the expression {text!r} asks for {key!r}, but there is only: {known}")
    return table[key]


def evaluate(expression: str, summary: dict[str, Any]) -> float:
    """The value of an arithmetic expression on summary statistics."""
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"the expression {expression!r} is not arithmetic: {error.msg}") from None
    try:
        value = _value(tree, summary, expression)
    except ZeroDivisionError:
        return math.nan
    if isinstance(value, dict):
        raise ValueError(f"the expression {expression!r} stops short of a number: {sorted(value)}")
    return float(value)


def load(path: Path) -> list[dict[str, Any]]:
    """Reads and checks `expected.json`."""
    entries = record.read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path.name} must hold a list of inequalities")
    for entry in entries:
        missing = [field for field in REQUIRED if field not in entry]
        unknown = sorted(set(entry) - FIELDS)
        if missing or unknown or entry.get("relation", "<=") not in RELATIONS:
            raise ValueError(
                f"{path.name}: {entry.get('name', entry)!r} must have {', '.join(REQUIRED)}, a "
                f"relation of {', '.join(RELATIONS)}, and nothing unknown; missing: {missing}, "
                f"unknown: {unknown}"
            )
    return entries


def judge(entries: Iterable[dict[str, Any]], summary: dict[str, Any], preset: str) -> list[Verdict]:
    """Evaluates every inequality; one that cannot be evaluated, or is NaN, is not met."""
    verdicts = []
    for entry in entries:
        relation, bound = entry.get("relation", "<="), float(entry["bound"])
        value, met, reason = None, None, f"not meant for preset {preset}"
        if preset in entry.get("presets", (preset,)):
            try:
                value = evaluate(entry["expression"], summary)
                met, reason = bool(RELATIONS[relation](value, bound)), ""
            except ValueError as error:
                met, reason = False, str(error)
        verdicts.append(
            Verdict(
                name=entry["name"],
                value=value,
                relation=relation,
                bound=bound,
                met=met,
                source=entry["source"],
                published=entry.get("published"),
                reason=reason,
            )
        )
    return verdicts
