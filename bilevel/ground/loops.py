"""Loops over steps, with carries that keep their types."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.traced import contains_primitive
from bilevel.ground.tree import paths


def loop(steps: int, body: Callable[[Any, Any], Any], carry: Any, unroll: bool) -> Any:
    """``steps`` applications of ``body(i, carry)``, written out one by one if ``unroll``.

    XLA on CPU runs convolution gradients inside a loop body tens of times slower than the
    same code outside one, so an unrolled program is worth its compile time there.
    """
    if unroll:
        for i in range(steps):
            carry = body(i, carry)
        return carry
    # Counted in the carry: indices that are scanned over would be read from an array each time.
    return jax.lax.fori_loop(0, steps, body, carry)


def must_unroll(function: Callable[..., Any], *args: Any) -> bool:
    """Whether loops around ``function(*args)`` are to be unrolled: convolutions, on the CPU."""
    return jax.default_backend() == "cpu" and contains_primitive(
        function, *args, prefix="conv_general_dilated"
    )


def unrolls(setting: bool | None, function: Callable[..., Any], *args: Any) -> bool:
    """The setting ``unroll`` of a loop around ``function(*args)``, or what is best there."""
    return must_unroll(function, *args) if setting is None else setting


def strong_types(tree: Any) -> Any:
    """Every leaf strongly typed: a weak type would change in the first step of a loop."""

    def leaf(x: Any) -> Any:
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return x
        return jax.lax.convert_element_type(x, dtype)

    return jax.tree.map(leaf, tree)


def keep_types(new: Any, old: Any, name: str, remedy: str) -> Any:
    """``new`` with every leaf in the dtype of ``old``, strongly typed.

    What a loop carries may not change: a state of another type compiles again in the next step,
    or fails in ``scan``. Real numbers are cast to the precision they came in (a learning rate
    in float64 promotes the state of an optimizer of float32 parameters).

    Raises:
      TypeError: another tree, another shape, or another kind of number; names the leaf and says
        ``remedy``.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            f"{name} changes its tree structure in a step, from {jax.tree.structure(old)} to "
            f"{jax.tree.structure(new)}. {remedy}"
        )
    for (path, a), (_, b) in zip(paths(new, name), paths(old, name), strict=True):
        if jnp.shape(a) != jnp.shape(b) or not _same_kind(a, b):
            raise TypeError(
                f"{path} changes in a step from {jnp.result_type(b)}{jnp.shape(b)} to "
                f"{jnp.result_type(a)}{jnp.shape(a)}. {remedy}"
            )

    def leaf(a: Any, b: Any) -> Any:
        dtype = jnp.result_type(b)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return a
        return jax.lax.convert_element_type(a, dtype)

    return jax.tree.map(leaf, new, old)


def _same_kind(a: Any, b: Any) -> bool:
    a, b = jnp.result_type(a), jnp.result_type(b)
    return a == b or (jnp.issubdtype(a, jnp.floating) and jnp.issubdtype(b, jnp.floating))
