r"""Bounds on hyperparameters, by a change of variables.

The outer optimizer moves a *raw* variable :math:`ρ` that may take any real value; the losses
read :math:`λ = c(ρ)`, which cannot leave its bounds. By the chain rule

.. math::
    dF/dρ = (∂c/∂ρ)ᵀ dF/dλ

so a hypergradient through bounds costs nothing but one transposed product with :math:`c`.

These bounds are for hyperparameters. For bounds on the trained parameters, differentiate steps that
keep them: ``Unroll(optax.chain(optax.sgd(step_size), optax.keep_params_nonnegative()), steps)``.
"""

import dataclasses
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.ground.aliases import Hparams
from bilevel.ground.tree import accumulator_dtype
from bilevel.space.bounds import Bound, keep_inside


def _floating_dtype(leaf: Any, name: str) -> np.dtype:
    """The dtype of a hyperparameter, which must be real and floating-point."""
    if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
        raise TypeError(
            f"{name} is {leaf!r} of type {type(leaf).__name__}, expected an array of real "
            "floating-point numbers, or one number."
        )
    dtype = getattr(leaf, "dtype", None) or np.result_type(type(leaf))
    if not jnp.issubdtype(dtype, jnp.floating):
        whole = jnp.issubdtype(dtype, jnp.integer)
        hint = "write 3.0 for 3 (`Integer` rounds only at the end)" if whole else "convert it"
        raise TypeError(f"{name} has dtype {dtype}, expected a real floating-point dtype: {hint}.")
    return jnp.result_type(leaf)


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
    compute half precisions in float32. ``constrain`` stays strictly inside the bounds for every
    finite raw value, in the dtype of the hyperparameter. Cost: one elementwise pass.

    Raises:
      TypeError: for something that is not a bound; when used, for a hyperparameter that is not an
        array of real floating-point numbers.
      ValueError: for bounds that hold nothing (``lo >= hi``); when used, for a hyperparameter
        without a bound, a bound without a hyperparameter, concrete values outside their bounds
        or not finite, and bounds that the dtype of a hyperparameter cannot resolve.

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
        r""":math:`λ = c(ρ)`: what the losses read. Any finite ``raw`` is legal."""
        return self._map(lambda bound, x, _: bound.constrain(x), raw, inside=True)

    def unconstrain(self, hparams: Hparams) -> Hparams:
        r""":math:`ρ = c^{-1}(λ)`. Concrete values are checked, traced ones cannot be."""

        def leaf(bound: Bound, x: jax.Array, name: str) -> jax.Array:
            if not isinstance(x, Tracer):
                value = np.asarray(x)
                if not np.all(np.isfinite(value)):
                    raise ValueError(
                        f"{name} is not finite: {value}. Start from a finite value inside its "
                        "bounds."
                    )
                bound.check(value, name)
            return bound.unconstrain(x)

        return self._map(leaf, hparams)

    def round(self, hparams: Hparams) -> Hparams:
        """``hparams`` with every relaxed integer at the nearest whole number of its range."""
        return self._map(lambda bound, x, _: bound.round(x), hparams)

    def _map(
        self,
        function: Callable[[Bound, jax.Array, str], jax.Array],
        tree: Any,
        *,
        inside: bool = False,
    ) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        used = set()
        out = []
        for path, leaf in flat:
            name = "hparams" + jax.tree_util.keystr(path)
            bound, place = self._find(path, name)
            used.add(place)
            dtype = _floating_dtype(leaf, name)
            limits = getattr(bound, "limits", None)
            limits = None if limits is None else limits(dtype, name)
            wide = jnp.asarray(leaf, accumulator_dtype(dtype))
            value = function(bound, wide, name)
            if inside and limits is not None and wide.dtype != dtype:
                value = keep_inside(value, *limits)  # what is inside in float32 can round to an end
            out.append(jnp.asarray(value, dtype))
        unused = [place for place in _bounds_below(self.bounds, "") if place not in used]
        if unused:
            raise ValueError(
                f"`Space` names {', '.join('hparams' + p for p in unused)}, which `hparams` does "
                f"not have (it has {', '.join(self._names(flat)) or 'no leaves'}). Remove the "
                "bound or add the hyperparameter (`None` is not one)."
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
                f"{name} is an array, but `Space` has a container with names of its own there: "
                "give the bounds the structure of `hparams`."
            )
        return node, place
