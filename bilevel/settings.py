"""Settings of the library's dataclasses: their ranges are declared once and checked everywhere.

A field made by :func:`real` or :func:`count` carries its range. :func:`check_settings` refuses
what is known to be outside it when the value is built, :func:`check_settings_used` what can only
be known where the value is used (a shape, a placeholder left in), and :func:`out_of_range` tells
at run time of a traced number that is outside, for a status.
"""

import dataclasses
import importlib
import numbers
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_RANGE = "bilevel range"


@dataclasses.dataclass(frozen=True)
class _Range:
    low: float | None
    strict: bool
    optional: bool
    whole: bool


def real(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    strict: bool = False,
    optional: bool = False,
) -> Any:
    """A dataclass field for one traced real number, at least (``strict``: above) ``low``."""
    metadata = {_RANGE: _Range(low, strict, optional, whole=False)}
    return dataclasses.field(default=default, metadata=metadata)


def count(default: Any = dataclasses.MISSING, *, low: int = 1, optional: bool = False) -> Any:
    """A dataclass field for a static whole number of at least ``low``."""
    metadata = {"static": True, _RANGE: _Range(low, False, optional, whole=True)}
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(value: Any) -> None:
    """Refuse fields of a dataclass that are known to be outside their range.

    For ``__post_init__``: JAX rebuilds pytrees with placeholders, which pass.
    """
    for field, limits in _ranged(value):
        given = getattr(value, field)
        if given is None and limits.optional:
            continue
        if limits.whole:
            check_count(field, given, int(limits.low or 0))
        else:
            check_real(field, given, limits.low, strict=limits.strict)


def check_settings_used(value: Any, name: str) -> None:
    """Refuse, where ``value`` is about to be used, settings that are not one real number.

    Walks dataclasses inside dataclasses; ``name`` begins the path in the message.
    """
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return
    limits_of = dict(_ranged(value))
    for field in dataclasses.fields(value):
        given, path = getattr(value, field.name), f"{name}.{field.name}"
        limits = limits_of.get(field.name)
        if limits is None:
            check_settings_used(given, path)
        elif not (given is None and limits.optional or limits.whole):
            number = hasattr(given, "dtype") or isinstance(given, numbers.Real)
            if not number or jnp.issubdtype(jnp.result_type(given), jnp.bool_):
                raise TypeError(f"`{path}` must be a real number, got {given!r}.")
            if jnp.shape(given) != ():
                raise ValueError(
                    f"`{path}` has shape {jnp.shape(given)}, expected one number for all: map over "
                    "several with `jax.vmap`, or write a term of its own for each parameter into "
                    "the inner loss."
                )


def out_of_range(value: Any) -> jax.Array:
    """Whether any traced setting of ``value`` is outside its range: a boolean scalar."""
    bad = jnp.asarray(False)
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return bad
    limits_of = dict(_ranged(value))
    for field in dataclasses.fields(value):
        given, limits = getattr(value, field.name), limits_of.get(field.name)
        if limits is None:
            bad = bad | out_of_range(given)
        elif isinstance(given, Tracer) and jnp.shape(given) == ():
            bad = bad | ~jnp.isfinite(given)
            if limits.low is not None:
                bad = bad | ((given <= limits.low) if limits.strict else (given < limits.low))
    return bad


def _ranged(value: Any) -> Iterator[tuple[str, _Range]]:
    for field in dataclasses.fields(value):
        if _RANGE in field.metadata:
            yield field.name, field.metadata[_RANGE]


def concrete(value: Any) -> bool:
    """Whether ``value`` is a number, or an array of them, that can be compared now."""
    if isinstance(value, jax.Array):
        return not isinstance(value, Tracer) and value.is_fully_addressable
    return isinstance(value, (numbers.Number, np.ndarray, np.generic))


def check_real(
    name: str, value: Any, low: float | None = None, *, strict: bool = False, hint: str = ""
) -> None:
    """Refuse what is known not to be finite real numbers of at least (``strict``: above) ``low``.

    Traced numbers and placeholders pass.
    """
    if isinstance(value, (str, bytes, list, tuple, dict)):
        raise TypeError(f"`{name}` must be a real number, got {value!r}.{hint}")
    if not concrete(value):
        return
    if np.ndim(value) and np.size(value) == 0:
        raise ValueError(f"`{name}` is empty (shape {np.shape(value)}): pass a real number.{hint}")
    array = np.asarray(value)
    if array.dtype == bool:
        return  # what a predicate mapped over a tree leaves; refused where it is used
    if not (np.issubdtype(array.dtype, np.integer) or _is_floating(array)):
        raise TypeError(
            f"`{name}` must be a real number, got {value!r} of type {type(value).__name__}.{hint}"
        )
    array = array.astype(np.float64)
    if low is not None and not np.all(array > low if strict else array >= low):
        bound = "greater than" if strict else "at least"
        raise ValueError(f"`{name}` must be {bound} {low}, got {value}.{hint}")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{name}` must be finite, got {value}.{hint}")


def _is_floating(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))  # bfloat16 too, which NumPy denies


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Refuse anything but a Python integer of at least ``low`` (counts are static)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
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
