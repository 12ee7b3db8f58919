r"""How two directions agree: their inner product, or the cosine of their angle."""

from typing import Any

import jax.numpy as jnp
from jax.core import Tracer

from bilevel.ground import tree
from bilevel.ground.aliases import Scalar, Vector
from bilevel.ground.settings import check_one_real


def alignment(a: Vector, b: Vector, normalized: bool) -> Scalar:
    """The cosine between two trees, 0 where one is zero; or their inner product."""
    product = tree.vdot(a, b)
    if not normalized:
        return product
    # Each norm apart: their product underflows for short vectors.
    lengths = [tree.norm(x) for x in (a, b)]
    low, high = (jnp.where(n == 0, 1, n) for n in lengths)
    cosine = tree.vdot(tree.scale(1 / low, a), tree.scale(1 / high, b))
    return jnp.clip(cosine, -1, 1)


def dtype_of(params: Any) -> Any:
    """The dtype in which inner products of ``params`` are carried."""
    return tree.norm(params).dtype


def zeros_like(params: Any) -> Vector:
    """No direction yet, in the accumulator dtypes."""
    return tree.zeros_accumulated(params)


def check_interval(low: Any, high: Any, low_name: str, high_name: str, least: float) -> None:
    """Refuse ends that are not numbers, below ``least``, or in the wrong order."""
    check_one_real(low_name, low, least)
    check_one_real(high_name, high, least)
    if not isinstance(low, Tracer) and not isinstance(high, Tracer):
        if not low < high:
            raise ValueError(f"`{low_name}` must be below `{high_name}`, got {low} and {high}.")
