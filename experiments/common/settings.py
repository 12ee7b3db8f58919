"""Words of the command line turned into settings: `--set key=value` and `--seeds 3-12`."""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from experiments.common.outputs import RunnerError


def seeds(text: str) -> list[int]:
    """`5` is seeds 0 to 4; `3-12` both ends and all between; `0,4,100-102` these."""
    words = text.split(",")
    try:
        if len(words) == 1 and words[0].isdecimal():
            chosen = range(int(words[0]))
        else:
            chosen = sorted({seed for word in words for seed in _stretch(word.strip())})
    except ValueError:
        chosen = []
    if not chosen:
        raise RunnerError(
            "`--seeds` must be a number of seeds, at least 1, or seeds such as 3-12 or 0,4,100-102 "
            f"(one seed alone: 7-7), got {text!r}"
        )
    return list(chosen)


def _stretch(word: str) -> range:
    first, dash, last = word.partition("-")
    return range(int(first), int(last if dash else first) + 1)


def changed(config: Any, assignments: Sequence[str]) -> Any:
    """The configuration with `key=value` in place, each checked against the field's type."""
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config)]
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise RunnerError(f"`--set` must be key=value, got {assignment!r}")
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RunnerError(
                f"`--set {assignment}`: there is no setting {key!r}; {hint}there are: "
                + ", ".join(names)
            )
        try:
            value = _typed(_read(text), hints[key])
        except TypeError:
            raise RunnerError(
                f"`--set {assignment}`: {key!r} must be {_name(hints[key])} such as "
                f"{getattr(config, key)!r}, got {text!r}"
            ) from None
        config = dataclasses.replace(config, **{key: value})
    return config


def _read(text: str) -> Any:
    """A Python literal; a word without quotes is a string, and words between commas are a tuple."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return tuple(text.split(",")) if "," in text else text


def _typed(value: Any, hint: Any) -> Any:
    """The value as the annotation has it; `TypeError` if it cannot be."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in inner:
            try:
                return _typed(value, choice)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        if value in inner:
            return value
        raise TypeError
    if origin is tuple:
        # One word stands for a tuple of one.
        items = list(value) if isinstance(value, tuple | list) else [value]
        if inner[-1] is Ellipsis:
            return tuple(_typed(item, inner[0]) for item in items)
        if len(items) != len(inner):
            raise TypeError
        return tuple(_typed(item, each) for item, each in zip(items, inner, strict=True))
    whole = isinstance(value, int) and not isinstance(value, bool)
    if hint is float and (whole or isinstance(value, float)):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is type(None) and value is None:
        return None
    if hint is int and whole or (hint in (bool, str) and isinstance(value, hint)):
        return value
    raise TypeError


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
