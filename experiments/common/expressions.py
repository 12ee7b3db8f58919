"""Arithmetic on summary statistics, as `expected.json` writes it; parsed, never run as Python."""

import ast
import math
import operator
from typing import Any

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
CALLS = {"abs": abs, "min": min, "max": max, "sqrt": math.sqrt, "log": math.log, "exp": math.exp}


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


def is_ratio(expression: str) -> bool:
    """Whether the last thing that an expression does is to divide."""
    body = ast.parse(expression, mode="eval").body
    return isinstance(body, ast.BinOp) and isinstance(body.op, ast.Div)


def leaves(expression: str) -> list[tuple[str, ...]]:
    """The statistics that an expression reads, as paths: `("cg", "loss", "mean")`."""
    found: dict[tuple[str, ...], None] = {}

    def walk(node: ast.AST, below: tuple[str, ...] = ()) -> None:
        match node:
            case ast.Attribute(value=inner, attr=key):
                walk(inner, (key, *below))
            case ast.Name(id=key):
                found[key, *below] = None
            case ast.Call(args=args):
                for argument in args:
                    walk(argument)
            case _:
                for child in ast.iter_child_nodes(node):
                    walk(child)

    walk(ast.parse(expression, mode="eval"))
    return list(found)
