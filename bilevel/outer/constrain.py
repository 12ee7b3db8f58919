r"""Bounds on hyperparameters, by a change of variables.

The outer optimizer moves a *raw* variable :math:`\rho` that may take any real value; the losses
read :math:`\lambda = c(\rho)`, which cannot leave its bounds. By the chain rule

.. math::
    \frac{dF}{d\rho} = \Bigl(\frac{\partial c}{\partial\rho}\Bigr)^\top \frac{dF}{d\lambda}

so a hypergradient through bounds costs nothing but one transposed product with :math:`c`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.aliases import Hparams
from bilevel.settings import check_count, concrete
from bilevel.tree import accumulator_dtype


@runtime_checkable
class Bound(Protocol):
    """Anything with these methods bounds an array.

    ``constrain`` and ``unconstrain`` are inverse to each other, shape-preserving and traced;
    ``check`` raises on the host for an array outside the bounds; ``round`` maps to the nearest
    value that is meaningful to use (the identity except for integers).
    """

    def constrain(self, raw: jax.Array) -> jax.Array: ...

    def unconstrain(self, value: jax.Array) -> jax.Array: ...

    def round(self, value: jax.Array) -> jax.Array: ...

    def check(self, value: np.ndarray, name: str) -> None: ...


def _refuse(bad: Any, name: str, value: np.ndarray, expected: str) -> None:
    if np.any(bad):
        first = value[bad].ravel()[0]
        raise ValueError(
            f"{name} contains {first!s}, outside its bounds: expected {expected}. Start from a "
            "value inside them, or widen them."
        )


@dataclasses.dataclass(frozen=True)
class Free:
    r"""No bounds: :math:`\lambda = \rho`."""

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
    r""":math:`\lambda = e^\rho > 0`, elementwise.

    The exponential rather than a softplus: :math:`dF/d\rho = \lambda\, dF/d\lambda` is the change
    of F per *relative* change of :math:`\lambda`, so one step size suits decays of 1e-6 and of 1.
    Raw values above 88 overflow in float32, and the loss then says so by being infinite.
    """

    def constrain(self, raw: jax.Array) -> jax.Array:
        r""":math:`e^\rho`."""
        return jnp.exp(raw)

    def unconstrain(self, value: jax.Array) -> jax.Array:
        r""":math:`\log\lambda`."""
        return jnp.log(value)

    def round(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse zero and less."""
        _refuse(~(value > 0), name, value, "greater than 0")


def _squash(raw: jax.Array, lo: float, hi: float) -> jax.Array:
    return lo + (hi - lo) * jax.nn.sigmoid(raw)


def _stretch(value: jax.Array, lo: float, hi: float) -> jax.Array:
    return jnp.log(value - lo) - jnp.log(hi - value)


@dataclasses.dataclass(frozen=True)
class Interval:
    r""":math:`\lambda = lo + (hi - lo)\,\sigma(\rho)`, elementwise, inside the open interval.

    Args:
      lo: lower end.
      hi: upper end, above ``lo``.

    The gradient with respect to :math:`\rho` shrinks as :math:`(\lambda-lo)(hi-\lambda)/(hi-lo)`
    toward the ends: a value that starts at an end hardly moves, so start well inside.
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        _check_ends(self)

    def constrain(self, raw: jax.Array) -> jax.Array:
        """The scaled logistic function."""
        return _squash(raw, self.lo, self.hi)

    def unconstrain(self, value: jax.Array) -> jax.Array:
        """The scaled logit."""
        return _stretch(value, self.lo, self.hi)

    def round(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse the ends and what lies beyond."""
        inside = (value > self.lo) & (value < self.hi)
        _refuse(~inside, name, value, f"strictly between {self.lo} and {self.hi}")


@dataclasses.dataclass(frozen=True)
class Integer:
    r"""A whole number, relaxed to the open interval :math:`(lo - \tfrac12, hi + \tfrac12)`.

    Args:
      lo: smallest whole number.
      hi: largest, above ``lo``.

    ``constrain`` gives a real number, so that a loss (or a response that samples around it) can
    be differentiated; every whole number gets an equal share of the interval. ``round`` gives
    the whole number to use in the end, still in the dtype of the hyperparameter.
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
        _check_ends(self)

    def constrain(self, raw: jax.Array) -> jax.Array:
        """The scaled logistic function."""
        return _squash(raw, self.lo - 0.5, self.hi + 0.5)

    def unconstrain(self, value: jax.Array) -> jax.Array:
        """The scaled logit."""
        return _stretch(value, self.lo - 0.5, self.hi + 0.5)

    def round(self, value: jax.Array) -> jax.Array:
        """The nearest whole number of the range."""
        return jnp.clip(jnp.round(value), self.lo, self.hi)

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse the ends of the relaxed interval and what lies beyond."""
        lo, hi = self.lo - 0.5, self.hi + 0.5
        _refuse(~((value > lo) & (value < hi)), name, value, f"strictly between {lo} and {hi}")


def _check_ends(bound: Any) -> None:
    lo, hi = bound.lo, bound.hi
    for name, end in (("lo", lo), ("hi", hi)):
        if not concrete(end) or np.ndim(end) or isinstance(end, complex):
            raise TypeError(f"`{name}` must be a real number known in advance, got {end!r}.")
        if not np.isfinite(end):
            raise ValueError(
                f"`{name}` must be finite, got {end}: use `Positive()` or `Free()` for a range "
                "without an end."
            )
    if lo >= hi:
        raise ValueError(
            f"`{type(bound).__name__}` needs lo < hi, got lo={lo} and hi={hi}: swap them."
        )


@dataclasses.dataclass(frozen=True)
class Simplex:
    r"""Positive weights that sum to one over the last axis: :math:`\lambda = softmax(\rho)`.

    One direction of :math:`\rho` (a constant added to all) moves nothing; ``unconstrain`` gives
    the representative of mean zero, and gradients have no component along it.
    """

    def constrain(self, raw: jax.Array) -> jax.Array:
        """Softmax over the last axis."""
        return jax.nn.softmax(raw, axis=-1)

    def unconstrain(self, value: jax.Array) -> jax.Array:
        """Centred logarithm."""
        logs = jnp.log(value)
        return logs - jnp.mean(logs, axis=-1, keepdims=True)

    def round(self, value: jax.Array) -> jax.Array:
        """The identity."""
        return value

    def check(self, value: np.ndarray, name: str) -> None:
        """Refuse scalars, weights that are not positive, and sums other than one."""
        if value.ndim == 0 or value.shape[-1] < 2:
            raise ValueError(
                f"{name} has shape {value.shape}, but `Simplex()` needs a last axis of at least 2."
            )
        _refuse(~(value > 0), name, value, "weights greater than 0")
        total = value.sum(-1)
        # Weights that were normalised in half precision still pass; forgetting to does not.
        off = np.abs(total - 1) > 1e-2
        if np.any(off):
            raise ValueError(
                f"{name} sums to {total[off].ravel()[0]:.6g} over its last axis, but `Simplex()` "
                "needs weights that sum to 1: divide by the sum."
            )


def _entry(entry: Any) -> Any:
    """The plain key, index or attribute name of one step of a tree path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _is_bound(node: Any) -> bool:
    """Whether ``node`` is a bound, and not the class of one."""
    return isinstance(node, Bound) and not isinstance(node, type)


def _bounds_below(node: Any, path: str) -> Iterator[str]:
    if _is_bound(node):
        yield path
    elif isinstance(node, Mapping):
        for name, child in node.items():
            yield from _bounds_below(child, f"{path}[{name!r}]")
    elif isinstance(node, (tuple, list)):
        for i, child in enumerate(node):
            yield from _bounds_below(child, f"{path}[{i}]")
    else:
        raise TypeError(
            f"`bounds`{path} is {node!r}, expected `Free()`, `Positive()`, `Interval(lo, hi)`, "
            "`Integer(lo, hi)`, `Simplex()`, or a dict, tuple or list of them."
        )


def _child(node: Any, key: Any) -> Any:
    """What ``node`` holds under ``key``, or None."""
    if isinstance(node, Mapping):
        return node.get(key)
    if isinstance(key, str):
        return getattr(node, key, None) if hasattr(node, "_fields") else None
    return node[key] if isinstance(key, int) and key < len(node) else None


@dataclasses.dataclass(frozen=True)
class Space:
    r"""Named bounds for a tree of hyperparameters.

    Args:
      bounds: a bound, or a dict, tuple or list of bounds, nested as ``hparams`` is. A bound
        holds for everything below its place, so ``Space(Positive())`` makes every
        hyperparameter positive, and a dict may name a whole subtree once.

    Both directions are pure functions of arrays (jit, vmap, grad), keep shape and dtype, and
    compute half precisions in float32. Cost: one elementwise pass.

    Raises:
      TypeError: for something that is not a bound.
      ValueError: for bounds that hold nothing (``lo >= hi``); when used, for a hyperparameter
        without a bound, a bound without a hyperparameter, and concrete values outside their
        bounds or not finite.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> space = bilevel.Space({"decay": bilevel.Positive(), "rate": bilevel.Interval(0, 1)})
      >>> raw = space.unconstrain({"decay": jnp.array(1e-3), "rate": jnp.array(0.5)})
      >>> print(raw["rate"])
      0.0
    """

    bounds: Any

    def __post_init__(self) -> None:
        if not list(_bounds_below(self.bounds, "")):
            raise ValueError("`bounds` is empty: name at least one hyperparameter.")

    def constrain(self, raw: Hparams) -> Hparams:
        r""":math:`\lambda = c(\rho)`: what the losses read. Any finite ``raw`` is legal."""
        return self._map(lambda bound, x, _: bound.constrain(x), raw)

    def unconstrain(self, hparams: Hparams) -> Hparams:
        r""":math:`\rho = c^{-1}(\lambda)`. Concrete values are checked, traced ones cannot be."""

        def leaf(bound: Bound, x: jax.Array, name: str) -> jax.Array:
            if not isinstance(x, Tracer):
                value = np.asarray(x)
                if not np.all(np.isfinite(value)):
                    raise ValueError(f"{name} is not finite: {value}.")
                bound.check(value, name)
            return bound.unconstrain(x)

        return self._map(leaf, hparams)

    def round(self, hparams: Hparams) -> Hparams:
        """``hparams`` with every relaxed integer at the nearest whole number of its range."""
        return self._map(lambda bound, x, _: bound.round(x), hparams)

    def _map(self, function: Callable[[Bound, jax.Array, str], jax.Array], tree: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        used = set()
        out = []
        for path, leaf in flat:
            name = "hparams" + jax.tree_util.keystr(path)
            bound, place = self._find(path, name)
            used.add(place)
            dtype = jnp.result_type(leaf)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"{name} has dtype {dtype}, expected a real floating-point dtype: write 3.0 "
                    "for 3 (`Integer` rounds only at the end)."
                )
            wide = jnp.asarray(leaf, accumulator_dtype(dtype))
            out.append(jnp.asarray(function(bound, wide, name), dtype))
        unused = [place for place in _bounds_below(self.bounds, "") if place not in used]
        if unused:
            raise ValueError(
                f"`Space` names {', '.join('hparams' + p for p in unused)}, which `hparams` does "
                f"not have (it has {', '.join(self._names(flat)) or 'no leaves'}). Remove the "
                "bound or add the hyperparameter."
            )
        return jax.tree.unflatten(treedef, out)

    @staticmethod
    def _names(flat: list[Any]) -> list[str]:
        return ["hparams" + jax.tree_util.keystr(path) for path, _ in flat]

    def _find(self, path: tuple[Any, ...], name: str) -> tuple[Bound, str]:
        """The bound above a leaf, and the place where the space names it."""
        node, place = self.bounds, ""
        for entry in path:
            if _is_bound(node):
                break
            key = _entry(entry)
            child = _child(node, key)
            if child is None:
                raise ValueError(
                    f"`Space` has no bound for {name}: add one there or above it (`Free()` if it "
                    "may take any value)."
                )
            if isinstance(key, str) and not isinstance(node, Mapping):
                key = node._fields.index(key)
            node, place = child, f"{place}[{key!r}]"
        if not _is_bound(node):
            raise ValueError(
                f"{name} is an array, but `Space` has a container with names of its own there."
            )
        return node, place
