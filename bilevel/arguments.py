"""Checks of plain settings (numbers and counts), shared by every dataclass of the library."""

import importlib
import numbers
from types import ModuleType
from typing import Any

import numpy as np


def concrete(value: Any) -> bool:
    """Whether ``value`` is a number that can be compared now (not a tracer or placeholder)."""
    return isinstance(value, numbers.Number) or isinstance(value, (np.ndarray, np.generic))


def check_at_least(name: str, value: Any, low: float, *, strict: bool = False) -> None:
    """Refuse a concrete ``value`` below ``low`` (or not above it, if ``strict``)."""
    if not concrete(value):
        return
    if np.any(np.isnan(value)) or np.any(value < low) or (strict and np.any(value <= low)):
        bound = "greater than" if strict else "at least"
        raise ValueError(f"`{name}` must be {bound} {low}, got {value}.")


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Refuse anything but a Python integer of at least ``low`` (counts are static)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        if type(value) is object or value is None:  # pytree placeholders
            return
        raise TypeError(
            f"`{name}` must be a Python int (it fixes the size of the compiled program), "
            f"got {value!r} of type {type(value).__name__}."
        )
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def require_extra(module: str, extra: str, who: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{who} needs the package `{module}`: pip install "bilevel[{extra}]".'
        ) from error
