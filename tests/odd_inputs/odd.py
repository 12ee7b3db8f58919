"""Odd values, by the kind of argument they stand in for."""

import decimal
import fractions
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Odd = tuple[str, Callable[[], Any], bool]
"""Kind of oddness, the value (made late), and whether it is legal all the same."""


class Thing:
    """An object of somebody's own, that knows no number."""

    def __repr__(self) -> str:
        return "Thing()"


def things() -> Iterator[Odd]:
    """What is legal nowhere that a number or a setting is expected."""
    yield "string", lambda: "0.5", False
    yield "empty string", lambda: "", False
    yield "bytes", lambda: b"1", False
    yield "complex", lambda: 0.5 + 1j, False
    yield "object", Thing, False
    yield "class", lambda: Thing, False
    yield "function", lambda: lambda *_: None, False
    yield "generator", lambda: (i for i in range(3)), False
    yield "set", lambda: {1}, False
    yield "list", lambda: [1], False
    yield "tuple", lambda: (1,), False
    yield "dict", lambda: {"a": 1}, False
    yield "empty list", list, False
    yield "slice", lambda: slice(3), False
    yield "ellipsis", lambda: ..., False
    yield "date", lambda: np.datetime64("2020-01-01"), False
    yield "object array", lambda: np.array([Thing()], object), False
    yield "string array", lambda: np.array("0.5"), False
    yield "key", lambda: jax.random.key(0), False


def counts(base: int, *, low: int = 1, optional: bool = False) -> Iterator[Odd]:
    """In place of a whole number such as ``base``."""
    yield from things()
    yield "none", lambda: None, optional
    yield "float", lambda: float(base), False
    yield "fraction", lambda: base + 0.5, False
    yield "bool", lambda: True, False
    yield "numpy bool", lambda: np.True_, False
    yield "nan", lambda: float("nan"), False
    yield "inf", lambda: float("inf"), False
    yield "negative", lambda: -1, False
    yield "very negative", lambda: -(10**30), False
    if low > 0:
        yield "zero", lambda: 0, False
    yield "numpy float", lambda: np.float64(base), False
    yield "jax float", lambda: jnp.asarray(float(base)), False
    yield "array", lambda: np.full(3, base), False
    yield "numpy int", lambda: np.int64(base), True
    yield "numpy int32", lambda: np.int32(base), True
    yield "numpy unsigned", lambda: np.uint8(base), True


def reals(
    base: float, *, low: float | None = 0.0, strict: bool = False, optional: bool = False
) -> Iterator[Odd]:
    """In place of a real number such as ``base`` (exact in every dtype)."""
    yield from things()
    yield "none", lambda: None, optional
    yield "bool", lambda: True, False
    yield "numpy bool", lambda: np.True_, False
    yield "nan", lambda: float("nan"), False
    yield "inf", lambda: float("inf"), False
    yield "minus inf", lambda: -float("inf"), False
    yield "decimal", lambda: decimal.Decimal(base), False
    yield "fraction", lambda: fractions.Fraction(base), True
    yield "numpy nan", lambda: np.float32("nan"), False
    yield "jax nan", lambda: jnp.asarray(jnp.nan), False
    yield "jax inf", lambda: jnp.asarray(jnp.inf), False
    yield "complex array", lambda: jnp.asarray(base + 0j), False
    yield "empty array", lambda: np.zeros(0), False
    if low is not None:
        yield "negative", lambda: low - 1.0, False
        yield "just below", lambda: low - 1e-6, False
        yield "numpy negative", lambda: np.float64(low - 1.0), False
        yield "jax negative", lambda: jnp.asarray(low - 1.0), False
        yield "negative int", lambda: int(low) - 1, False
        if strict:
            yield "zero", lambda: low, False
            yield "zero int", lambda: int(low), False
            yield "jax zero", lambda: jnp.asarray(low), False
    yield "numpy float32", lambda: np.float32(base), True
    yield "numpy float64", lambda: np.float64(base), True
    yield "numpy float16", lambda: np.float16(base), True
    yield "numpy 0-d", lambda: np.asarray(base), True
    yield "jax float32", lambda: jnp.asarray(base, jnp.float32), True
    yield "jax float64", lambda: jnp.asarray(base, jnp.float64), True
    yield "jax bfloat16", lambda: jnp.asarray(base, jnp.bfloat16), True


def flags() -> Iterator[Odd]:
    """In place of True or False: what is neither is refused, or changes nothing."""
    for kind, make, _ in things():
        yield kind, make, True
    yield "none", lambda: None, True
    yield "one", lambda: 1, True
    yield "numpy bool", lambda: np.True_, True
    yield "nan", lambda: float("nan"), True


def objects(*also: tuple[str, Callable[[], Any]]) -> Iterator[Odd]:
    """In place of a solver, an operator, a transformation, a function."""
    yield from things()
    yield "none", lambda: None, False
    yield "number", lambda: 0.5, False
    yield "int", lambda: 3, False
    yield "bool", lambda: True, False
    for kind, make in also:
        yield kind, make, False


def choices(*also: str) -> Iterator[Odd]:
    """In place of a word of a list."""
    yield from things()
    yield "none", lambda: None, False
    yield "number", lambda: 1, False
    yield "bool", lambda: True, False
    for word in also:
        yield f"word {word!r}", lambda word=word: word, False
