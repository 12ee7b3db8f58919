"""Arguments of the regularizers: keys, arrays and strengths, checked and laid along examples.

Every regularizer follows the same rules. Arrays are real floating-point numbers: an integer image
cannot hold the product with 1.11 or the sum with a draw, so it is refused and not rounded.
A strength whose value is known is refused outside its range. One that is traced cannot be refused
and multiplies by NaN there, so that no plausible result comes from an impossible strength.
"""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.settings import concrete
from bilevel.ground.tree import accumulator_dtype


def check_strength(
    name: str, value: Any, low: float = 0.0, high: float | None = None, *, open_high: bool = False
) -> None:
    """Refuse a known ``value`` outside ``[low, high]`` (``[low, high)`` if ``open_high``).

    Infinities and NaN are outside every range. Traced values pass; :func:`strengths` marks them.
    """
    dtype = real_dtype(name, value)
    if not concrete(value) or np.size(value) == 0:
        return
    # As the program will compute with it: 0.999999999 is 1 in float32.
    try:
        array = np.asarray(value).astype(dtype).astype(np.float64)
    except OverflowError:  # a Python int beyond every float
        array = np.asarray(np.inf)
    if not np.all(_inside(array, low, high, open_high)):
        raise ValueError(f"`{name}` must lie in {_range(low, high, open_high)}, got {value}.")


def strengths(
    name: str,
    value: Any,
    x: jax.Array | jax.ShapeDtypeStruct,
    low: float = 0.0,
    high: float | None = None,
    *,
    open_high: bool = False,
) -> jax.Array:
    """``value``, checked, with axes of length one appended: it scales the leading axes of ``x``.

    A scalar applies to every example, an array of shape ``(B,)`` has one value per example. The
    result is at least float32, whatever the dtype of ``x``: a rate in bfloat16 has two digits.
    Traced values outside the range, and traced NaN, become NaN, and so does every derivative
    with respect to them.
    """
    check_strength(name, value, low, high, open_high=open_high)
    known = concrete(value)
    value = jnp.asarray(value, real_dtype(name, value))
    if value.ndim > len(x.shape) or any(
        v not in (1, s) for v, s in zip(value.shape, x.shape[: value.ndim], strict=True)
    ):
        raise ValueError(
            f"`{name}` has shape {value.shape}, which does not match the leading axes of an array "
            f"of shape {tuple(x.shape)}: pass a scalar, or one value per example."
        )
    if not known:
        # A product and not a selection: the derivative in an impossible strength is NaN as well.
        value = value * jnp.where(_inside(value, low, high, open_high), 1, jnp.nan)
    return value.reshape(value.shape + (1,) * (len(x.shape) - value.ndim))


def rates(name: str, value: Any, x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Probabilities in ``[0, 1)``: at 1 nothing is left to rescale."""
    return strengths(name, value, x, 0.0, 1.0, open_high=True)


def floating(name: str, x: Any, least_ndim: int = 0, shape: str = "(B, ...)") -> jax.Array:
    """``x`` as a JAX array of real floating-point numbers with at least ``least_ndim`` axes."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"`{name}` must be an array of floating-point numbers, got {describe(x)}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be an array of real floating-point numbers, got dtype {x.dtype}: "
            "convert it, for example 8-bit images with x.astype(jnp.float32) / 255."
        )
    x = jnp.asarray(x)
    if x.ndim < least_ndim:
        raise ValueError(f"`{name}` must have shape {shape}, got {x.shape}.")
    return x


def check_integers(name: str, x: Any) -> None:
    """Refuse what is not an array of integers."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be an array of integers, got {describe(x)}.")


def axes(name: str, given: Sequence[int], ndim: int) -> tuple[int, ...]:
    """``given`` as different axes of an array of ``ndim`` axes; negative ones count from the end.

    Raises:
      TypeError: something other than whole numbers known in advance.
      ValueError: an axis that the array does not have, or one that is named twice.
    """
    try:
        found = tuple(operator.index(axis) for axis in given)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must name axes by whole numbers known in advance, got {given!r}."
        ) from error
    for axis in found:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"`{name}` names axis {axis} of an array with {ndim} axes: count from 0, or with "
                "negative numbers from the end."
            )
    found = tuple(axis % ndim for axis in found)
    if len(set(found)) < len(found):
        raise ValueError(
            f"`{name}` names an axis twice: {tuple(given)} of an array with {ndim} axes. "
            "Use each once."
        )
    return found


def widened(x: jax.Array) -> jax.Array:
    """``x`` in at least float32, to compute in; the result is cast back."""
    return x.astype(accumulator_dtype(x.dtype))


def real_dtype(name: str, value: Any) -> np.dtype:
    """The dtype to compute with a strength in, at least float32; refuses what is not real."""
    number = hasattr(value, "dtype") or isinstance(value, numbers.Real)
    if number and not isinstance(value, bool):
        try:
            dtype = jnp.result_type(value)
        except TypeError:  # a fraction, a date, an array of strings
            dtype = np.dtype(object)
        if jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer):
            return accumulator_dtype(dtype)
    raise TypeError(
        f"`{name}` must be a real number or an array of real numbers, got {describe(value)}."
    )


def describe(value: Any) -> str:
    """What a message says of an argument of the wrong kind."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of dtype {value.dtype} and shape {value.shape}"
    return f"{value!r} of type {type(value).__name__}"


def _inside(value: Any, low: float, high: float | None, open_high: bool) -> Any:
    """Where ``value`` lies in the range: not where it is NaN or infinite."""
    below = value < (np.inf if high is None else high)
    if high is not None and not open_high:
        below = value <= high
    return (value >= low) & below


def _range(low: float, high: float | None, open_high: bool) -> str:
    if high is None:
        return f"[{low:g}, inf)"
    return f"[{low:g}, {high:g}{')' if open_high else ']'}"
