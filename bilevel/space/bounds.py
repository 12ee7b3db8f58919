r"""Bounds: maps from all real numbers to the values that a hyperparameter may take.

A bound keeps strictly inside its range for every finite raw value and in every dtype. Where the
formula rounds to an end (the logistic function of 40 is 1 in float32), the value is the nearest
number inside; the derivative stays that of the formula, and fades to zero as it does.
A raw value that is not finite gives NaN.
"""

import dataclasses
import functools
import numbers
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.settings import check_count, concrete
from bilevel.ground.tree import accumulator_dtype


@runtime_checkable
class Bound(Protocol):
    """Anything with these methods bounds an array.

    ``constrain`` and ``unconstrain`` are inverse to each other, shape-preserving and traced;
    ``check`` raises on the host for an array outside the bounds; ``round`` maps to the nearest
    value that is meaningful to use (the identity except for integers). A bound may also have
    ``limits(dtype, name)``, the least and the greatest number of ``dtype`` that is inside:
    :class:`Space` then keeps half precisions inside after rounding to them.
    """

    def constrain(self, raw: jax.Array) -> jax.Array: ...

    def unconstrain(self, value: jax.Array) -> jax.Array: ...

    def round(self, value: jax.Array) -> jax.Array: ...

    def check(self, value: np.ndarray, name: str) -> None: ...


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def keep_inside(value: jax.Array, low: float, high: float) -> jax.Array:
    """``value`` within ``[low, high]``, with the derivative of the identity; NaN stays."""
    value = jnp.where(value < low, low, value)
    return jnp.where(value > high, high, value)


@keep_inside.defjvp
def _keep_inside_jvp(low: float, high: float, primals: Any, tangents: Any) -> Any:
    return keep_inside(primals[0], low, high), tangents[0]


@dataclasses.dataclass(frozen=True)
class Free:
    r"""No bounds: :math:`λ = ρ`."""

    def constrain(self, raw: jax.Array) -> jax.Array:
        """The identity."""
        return raw

    def unconstrain(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def round(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def check(self, value: np.ndarray, name: str) -> None:
        """Anything finite passes."""


@dataclasses.dataclass(frozen=True)
class Positive:
    r""":math:`λ = e^ρ > 0`, elementwise.

    The exponential rather than a softplus: :math:`dF/dρ = λ dF/dλ` is the change
    of F per *relative* change of :math:`λ`, so one step size suits decays of 1e-6 and of 1.
    Raw values below -87 and above 88 stay at the smallest and largest positive number of float32.
    """

    def limits(self, dtype: Any, name: str = "the hyperparameter") -> tuple[float, float]:
        """The smallest positive number of ``dtype`` that is not flushed to zero; the largest."""
        return _smallest(dtype), float(jnp.finfo(dtype).max)

    def constrain(self, raw: jax.Array) -> jax.Array:
        r""":math:`e^ρ`."""
        raw = _real(raw)
        wide = raw.astype(accumulator_dtype(raw.dtype))
        # One step below log(max), or rounding makes the exponential (and its derivative) infinite.
        log_max = np.log(np.float64(jnp.finfo(wide.dtype).max)).astype(wide.dtype)
        top = float(np.nextafter(log_max, np.zeros_like(log_max)))
        value = jnp.exp(keep_inside(wide, -np.inf, top))
        return _finish(value, wide, raw.dtype, self.limits(raw.dtype))

    def unconstrain(self, value: jax.Array) -> jax.Array:
        r""":math:`log λ`."""
        value = _real(value)
        return jnp.log(value.astype(accumulator_dtype(value.dtype))).astype(value.dtype)

    def round(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse zero and less."""
        _check_inside(self, value, name, "greater than 0")


@dataclasses.dataclass(frozen=True)
class Interval:
    r""":math:`λ = lo + (hi - lo) σ(ρ)`, elementwise, inside the open interval.

    Args:
      lo: lower end.
      hi: upper end, above ``lo``.

    The gradient with respect to :math:`ρ` shrinks as :math:`(λ-lo)(hi-λ)/(hi-lo)`
    toward the ends: a value that starts at an end hardly moves, so start well inside.

    Raises:
      TypeError: an end that is not one real number known in advance.
      ValueError: ends that are not finite or not in order; when used, ends beyond the dtype of
        the hyperparameter, or too close to each other for it.
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        _set_ends(self)

    def limits(self, dtype: Any, name: str = "the hyperparameter") -> tuple[float, float]:
        """The least and the greatest number of ``dtype`` strictly between the ends."""
        return _limits(self, float(self.lo), float(self.hi), dtype, name)

    def constrain(self, raw: jax.Array) -> jax.Array:
        """The scaled logistic function."""
        raw = _real(raw)
        return _squash(raw, float(self.lo), float(self.hi), self.limits(raw.dtype))

    def unconstrain(self, value: jax.Array) -> jax.Array:
        """The scaled logit."""
        return _stretch(_real(value), float(self.lo), float(self.hi))

    def round(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse the ends and what lies beyond."""
        _check_inside(self, value, name, f"strictly between {self.lo} and {self.hi}")


@dataclasses.dataclass(frozen=True)
class Integer:
    r"""A whole number, relaxed to the open interval :math:`(lo - ½, hi + ½)`.

    Args:
      lo: smallest whole number.
      hi: largest, above ``lo``.

    ``constrain`` gives a real number, so that a loss (or a response that samples around it) can
    be differentiated; every whole number gets an equal share of the interval. ``round`` gives
    the whole number to use in the end, still in the dtype of the hyperparameter.

    Raises:
      TypeError: an end that is not a Python integer.
      ValueError: fewer than two whole numbers; when used, whole numbers that the dtype of the
        hyperparameter cannot tell apart (beyond 2**24 in float32, 2**11 in float16 and 2**8 in
        bfloat16).
    """

    lo: int
    hi: int

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            check_count(name, getattr(self, name), low=-(2**53))
        if self.lo == self.hi:
            raise ValueError(
                f"`Integer({self.lo}, {self.hi})` holds one value only: there is nothing to tune. "
                "Take it out of `hparams`."
            )
        _set_ends(self)

    def limits(self, dtype: Any, name: str = "the hyperparameter") -> tuple[float, float]:
        """The least and the greatest number of ``dtype`` inside the relaxed interval."""
        bits = int(jnp.finfo(dtype).nmant) + 1
        if max(abs(self.lo), abs(self.hi)) > 2**bits:
            raise ValueError(
                f"{name} has dtype {jnp.dtype(dtype)}, which cannot tell whole numbers beyond "
                f"2**{bits} apart, but its bound is `Integer(lo={self.lo}, hi={self.hi})`: use a "
                "wider dtype, or tune the number in larger units."
            )
        low, high = _limits(self, self.lo - 0.5, self.hi + 0.5, dtype, name)
        return min(low, self.lo), max(high, self.hi)

    def _ends(self, dtype: Any) -> tuple[float, float]:
        """The ends to compute with: strictly outside ``lo`` and ``hi``, where halves round too."""
        wide = accumulator_dtype(dtype)
        lo, hi = np.asarray([self.lo - 0.5, self.hi + 0.5]).astype(wide)
        if lo >= self.lo:
            lo = np.nextafter(lo, -np.inf, dtype=wide)
        if hi <= self.hi:
            hi = np.nextafter(hi, np.inf, dtype=wide)
        return float(lo), float(hi)

    def constrain(self, raw: jax.Array) -> jax.Array:
        """The scaled logistic function."""
        raw = _real(raw)
        return _squash(raw, *self._ends(raw.dtype), self.limits(raw.dtype))

    def unconstrain(self, value: jax.Array) -> jax.Array:
        """The scaled logit."""
        value = _real(value)
        return _stretch(value, *self._ends(value.dtype))

    def round(self, value: jax.Array) -> jax.Array:
        """The nearest whole number of the range."""
        return jnp.clip(jnp.round(value), float(self.lo), float(self.hi))

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse the ends of the relaxed interval and what lies beyond."""
        lo, hi = self.lo - 0.5, self.hi + 0.5
        _check_inside(self, value, name, f"strictly between {lo} and {hi}")


@dataclasses.dataclass(frozen=True)
class Simplex:
    r"""Positive weights that sum to one over the last axis: :math:`λ = softmax(ρ)`.

    One direction of :math:`ρ` (a constant added to all) moves nothing; ``unconstrain`` gives
    the representative of mean zero, and gradients have no component along it. A weight never
    rounds to zero.
    """

    def limits(self, dtype: Any, name: str = "the hyperparameter") -> tuple[float, float]:
        """The smallest positive number of ``dtype`` that is not flushed to zero, and one."""
        return _smallest(dtype), 1.0

    def constrain(self, raw: jax.Array) -> jax.Array:
        """Softmax over the last axis."""
        raw = _real(raw)
        self._check_shape(raw.shape, "`raw`")
        wide = raw.astype(accumulator_dtype(raw.dtype))
        value = jax.nn.softmax(wide, axis=-1)
        return _finish(value, wide, raw.dtype, self.limits(raw.dtype))

    def unconstrain(self, value: jax.Array) -> jax.Array:
        """Centred logarithm."""
        value = _real(value)
        self._check_shape(value.shape, "`value`")
        logs = jnp.log(value.astype(accumulator_dtype(value.dtype)))
        return (logs - jnp.mean(logs, axis=-1, keepdims=True)).astype(value.dtype)

    def round(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse scalars, weights that are not positive, and sums other than one."""
        self._check_shape(value.shape, name)
        # Weights that round up to one, or a little beyond in half precision, are judged by the sum.
        _refuse(~(value >= _smallest(_real(value).dtype)), name, value, "weights greater than 0")
        total = value.sum(-1)
        # Weights that were normalized in half precision still pass; forgetting to does not.
        off = np.abs(total - 1) > 1e-2
        if np.any(off):
            raise ValueError(
                f"{name} sums to {total[off].ravel()[0]:.6g} over its last axis, but `Simplex()` "
                "needs weights that sum to 1: divide by the sum."
            )

    @staticmethod
    def _check_shape(shape: tuple[int, ...], name: str) -> None:
        if not shape or shape[-1] < 2:
            raise ValueError(
                f"{name} has shape {shape}, but `Simplex()` needs a last axis of at least 2."
            )


def _real(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(accumulator_dtype(x.dtype))


def _finish(
    value: jax.Array, raw: jax.Array, dtype: np.dtype, limits: tuple[float, float]
) -> jax.Array:
    """``value`` inside the limits and in ``dtype``; NaN where ``raw`` is not finite."""
    return (keep_inside(value, *limits) + 0 * raw).astype(dtype)


def _squash(raw: jax.Array, lo: float, hi: float, limits: tuple[float, float]) -> jax.Array:
    wide = raw.astype(accumulator_dtype(raw.dtype))
    if _overflows(lo, hi, wide.dtype):
        value = lo * jax.nn.sigmoid(-wide) + hi * jax.nn.sigmoid(wide)
    else:
        value = lo + (hi - lo) * jax.nn.sigmoid(wide)
    return _finish(value, wide, raw.dtype, limits)


def _stretch(value: jax.Array, lo: float, hi: float) -> jax.Array:
    wide = value.astype(accumulator_dtype(value.dtype))
    if _overflows(lo, hi, wide.dtype):
        wide, lo, hi = wide / 2, lo / 2, hi / 2
    return (jnp.log(wide - lo) - jnp.log(hi - wide)).astype(value.dtype)


def _overflows(lo: float, hi: float, dtype: np.dtype) -> bool:
    """Whether the length of an interval is beyond ``dtype``, though its ends are not."""
    return hi - lo > float(jnp.finfo(dtype).max)


def _smallest(dtype: Any) -> float:
    """The smallest positive number of ``dtype`` that compiled programs do not flush to zero."""
    info = jnp.finfo(dtype)
    # float16 is computed in float32, where its subnormal numbers are normal.
    return float(info.smallest_subnormal if dtype == jnp.float16 else info.tiny)


def _above(x: float, dtype: Any) -> float:
    """The smallest number of ``dtype`` above ``x`` that is not subnormal."""
    with np.errstate(over="ignore"):
        y = np.asarray(x).astype(dtype)
    if not float(y) > x:
        y = np.nextafter(y, np.asarray(np.inf, dtype))
    y, smallest = float(y), _smallest(dtype)
    if 0 < abs(y) < smallest:
        return smallest if y > 0 else 0.0
    return y


def _limits(bound: Any, lo: float, hi: float, dtype: Any, name: str) -> tuple[float, float]:
    """The least and the greatest number of ``dtype`` strictly between two real numbers."""
    wide = accumulator_dtype(dtype)
    with np.errstate(over="ignore"):
        ends = np.asarray([lo, hi]).astype(wide)
    shown = f"`{type(bound).__name__}({bound.lo}, {bound.hi})`"
    if not np.all(np.isfinite(ends)):
        raise ValueError(
            f"{name} has dtype {jnp.dtype(dtype)}, whose numbers do not reach the ends of {shown}: "
            "use a wider dtype, or ends within its range."
        )
    # Programs subtract the rounded ends: what is left of either must not be flushed to zero.
    margin = _smallest(wide)
    low = _above(max(lo, float(ends[0])) + margin, dtype)
    high = -_above(-(min(hi, float(ends[1])) - margin), dtype)
    if not low < high:
        raise ValueError(
            f"{name} has dtype {jnp.dtype(dtype)}, which has fewer than two numbers strictly "
            f"inside {shown}: use a wider dtype, or move the ends apart."
        )
    return low, high


def _check_inside(bound: Any, value: np.ndarray, name: str, expected: str) -> None:
    dtype = _real(value).dtype
    low, high = bound.limits(dtype, name)
    inside = (value >= low) & (value <= high)
    _refuse(~inside, name, value, f"{expected} (in {dtype}: from {low:.9g} to {high:.9g})")


def _refuse(bad: Any, name: str, value: np.ndarray, expected: str) -> None:
    if np.any(bad):
        first = value[bad].ravel()[0]
        raise ValueError(
            f"{name} contains {first!s}, outside its bounds: expected {expected}. Start from a "
            "value inside them, or widen them."
        )


def _set_ends(bound: Any) -> None:
    """Check ``lo`` and ``hi``, and keep arrays without axes as Python numbers."""
    for name in ("lo", "hi"):
        end = getattr(bound, name)
        if hasattr(end, "dtype") and concrete(end) and np.shape(end) == ():
            end = np.asarray(end).item()
        if isinstance(end, bool) or not isinstance(end, numbers.Real):
            raise TypeError(
                f"`{name}` must be a real number known in advance, got {getattr(bound, name)!r}."
            )
        try:
            finite = bool(np.isfinite(float(end)))
        except OverflowError:
            finite = False
        if not finite:
            raise ValueError(
                f"`{name}` must be finite, got {end}: use `Positive()` or `Free()` for a range "
                "without an end."
            )
        object.__setattr__(bound, name, end)
    if bound.lo >= bound.hi:
        raise ValueError(
            f"`{type(bound).__name__}` needs lo < hi, got lo={bound.lo} and hi={bound.hi}: swap "
            "them."
        )
