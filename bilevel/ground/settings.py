"""Settings of the library's dataclasses: their ranges are declared once and checked everywhere.

A field made by :func:`real` or :func:`count` carries its range. :func:`check_settings` refuses
what is known to be outside it when the value is built, :func:`check_settings_used` what can only
be known where the value is used (a shape, a placeholder left in), and :func:`out_of_range` tells
at run time of a traced number that is outside, for a status.
"""

import dataclasses
import importlib
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterator
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
    """Refuse fields of a dataclass that are known to be outside their range or of another kind.

    For ``__post_init__``: JAX rebuilds pytrees with placeholders, which pass (static fields are
    never placeholders).
    """
    for field in dataclasses.fields(value):
        if field.metadata.get("static") and _RANGE not in field.metadata:
            _check_kind(field.name, getattr(value, field.name), field.type)
    for field, limits in _ranged(value):
        given = getattr(value, field)
        if given is None and limits.optional:
            continue
        # A predicate mapped over a tree leaves booleans; they are refused where they are used.
        if not limits.whole and getattr(given, "dtype", type(given)) in (bool, np.bool_):
            continue
        if limits.whole:
            check_count(field, given, int(limits.low or 0))
        else:
            check_real(field, given, limits.low, strict=limits.strict)


def check_settings_used(value: Any, name: str) -> None:
    """Refuse, where ``value`` is about to be used, settings that are not what they are declared.

    A field with a range must be one real number; any other what its annotation says: a flag, a
    function, a solver. Not when the value is built, where JAX leaves placeholders. Walks
    dataclasses inside dataclasses; ``name`` begins the path in the message.
    """
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return
    limits_of = dict(_ranged(value))
    for field in dataclasses.fields(value):
        given: Any = getattr(value, field.name)
        path = f"{name}.{field.name}"
        limits = limits_of.get(field.name)
        if limits is None:
            _check_kind(path, given, field.type)
            check_settings_used(given, path)
        elif not (given is None and limits.optional or limits.whole):
            check_number(path, given)
            shape = getattr(given, "shape", ())  # a Python number has none
            if shape != ():
                raise ValueError(
                    f"`{path}` has shape {shape}, expected one number for all: map over "
                    "several with `jax.vmap`, or write a term of its own for each parameter into "
                    "the inner loss."
                )


def check_number(name: str, given: Any) -> None:
    """Refuse what is neither a real number nor an array of them, traced or not."""
    real = isinstance(given, (int, float)) and not isinstance(given, bool)
    dtype = getattr(given, "dtype", None)
    real |= dtype is not None and any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)
    )
    if not real:
        raise TypeError(f"`{name}` must be a real number, got {given!r}.")


def _check_kind(path: str, given: Any, declared: Any) -> None:
    """Refuse a value that is of none of the declared kinds; kinds that cannot be told pass."""
    union = typing.get_origin(declared) in (types.UnionType, typing.Union)
    kinds = typing.get_args(declared) if union else (declared,)
    fits = [_fits(given, kind) for kind in kinds]
    if not any(fit is None or fit for fit in fits):
        expected = " or ".join(_described(kind) for kind in kinds)
        raise TypeError(f"`{path}` must be {expected}, got {given!r}.")


def _fits(given: Any, kind: Any) -> bool | None:
    """Whether ``given`` is of this kind; None for annotations that say too little."""
    if kind is types.NoneType:
        return given is None
    if kind is bool:
        return isinstance(given, (bool, np.bool_))
    if kind is int:
        return isinstance(given, (int, np.integer)) and not isinstance(given, bool)
    if typing.get_origin(kind) is Callable:
        return is_function(given)
    if not isinstance(kind, type):
        return None
    if getattr(kind, "_is_protocol", False) or hasattr(kind, "_fields"):
        # By their methods: an optax transformation may be any tuple that has them.
        wanted = getattr(kind, "_fields", None) or _methods(kind)
        return not isinstance(given, type) and all(hasattr(given, name) for name in wanted)
    return isinstance(given, kind) if dataclasses.is_dataclass(kind) else None


def _methods(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]


def _described(kind: Any) -> str:
    if kind is types.NoneType:
        return "None"
    if kind in (bool, int):
        return "True or False" if kind is bool else "a Python int"
    if typing.get_origin(kind) is Callable:
        return "callable (a function, not a class)"
    return f"a `{kind.__name__}` (a value: call the class)"


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
        if isinstance(value, Tracer) or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return False
        return value.is_fully_addressable
    return isinstance(value, (numbers.Number, np.ndarray, np.generic))


def check_real(
    name: str, value: Any, low: float | None = None, *, strict: bool = False, hint: str = ""
) -> None:
    """Refuse what is known not to be finite real numbers of at least (``strict``: above) ``low``.

    Traced numbers and placeholders pass.
    """
    if isinstance(value, (str, bytes, list, tuple, dict)):
        raise TypeError(f"`{name}` must be a real number, got {value!r}.{hint}")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"`{name}` must be a real number, got a PRNG key.{hint}")
    if not concrete(value):
        return
    if np.ndim(value) and np.size(value) == 0:
        raise ValueError(f"`{name}` is empty (shape {np.shape(value)}): pass a real number.{hint}")
    array = np.asarray(value)
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


def check_one_real(
    name: str, value: Any, low: float | None = None, *, strict: bool = False
) -> None:
    """Refuse what is not one real number of at least (``strict``: above) ``low``."""
    check_number(name, value)
    check_real(name, value, low, strict=strict)
    if np.ndim(value):
        raise ValueError(f"`{name}` has shape {np.shape(value)}, expected one number.")


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is not True or False (or, if ``optional``, None)."""
    if not (isinstance(value, (bool, np.bool_)) or (optional and value is None)):
        or_none = ", or None" if optional else ""
        raise TypeError(f"`{name}` must be True or False{or_none}, got {value!r}.")


def is_function(value: Any) -> bool:
    """Whether ``value`` can be called for what it returns; calling a class makes an object."""
    return callable(value) and not isinstance(value, type)


def check_takes(
    name: str,
    function: Any,
    call: str,
    hint: str = "Write it with these arguments, and bind others with `functools.partial`.",
) -> None:
    """Refuse a function that cannot be called as ``call`` says: ``"sample(key, hparams)"``."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in: it cannot be asked
        return
    try:
        signature.bind(*call[call.index("(") + 1 : -1].split(", "))
    except TypeError as error:
        raise TypeError(
            f"`{name}` cannot be called as {call}: {error}. Its signature is {signature}. {hint}"
        ) from None


def require_extra(module: str, extra: str, who: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{who} needs the package `{module}`: pip install "bilevel[{extra}]".'
        ) from error
