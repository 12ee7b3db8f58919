"""What every regulariser does with a strength: check it when it is known, lay it along examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_strength(
    name: str, value: Any, low: float = 0.0, high: float | None = None, *, open_high: bool = False
) -> None:
    """Refuse a known ``value`` outside ``[low, high]`` (``[low, high)`` if ``open_high``).

    Traced values pass: their range is the business of the map that makes them
    (``Space``), and a value out of range shows as NaN or as a clipped effect.
    """
    if isinstance(value, Tracer):
        return
    array = np.asarray(value, dtype=np.float64)
    above = False
    if high is not None:
        above = np.any(array >= high) if open_high else np.any(array > high)
    if np.any(np.isnan(array)) or np.any(array < low) or above:
        right = "inf)" if high is None else f"{high:g}{')' if open_high else ']'}"
        raise ValueError(f"`{name}` must lie in [{low:g}, {right}, got {value}.")


def check_rate(name: str, value: Any) -> None:
    """Refuse a known probability outside ``[0, 1)``: at 1 nothing is left to rescale."""
    check_strength(name, value, 0.0, 1.0, open_high=True)


def along_examples(name: str, value: Any, x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """``value`` with axes of length one appended, so that it scales the leading axes of ``x``.

    A scalar applies to every example, an array of shape ``(B,)`` one value an example. The
    result is at least float32, whatever the dtype of ``x``: a rate in bfloat16 has two digits.
    """
    value = jnp.asarray(value)
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    if value.ndim > x.ndim or any(
        v not in (1, s) for v, s in zip(value.shape, x.shape[: value.ndim], strict=True)
    ):
        raise ValueError(
            f"`{name}` has shape {value.shape}, which does not match the leading axes of an array "
            f"of shape {x.shape}: pass a scalar, or one value an example."
        )
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))
