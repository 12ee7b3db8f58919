r"""A pytree as a vector: the few operations that ``optax.tree`` does not give in our precision.

``optax.tree`` adds, scales and subtracts in the dtype of the leaves. A linear solve on
bfloat16 parameters needs more: its vectors and inner products live in the *accumulator*
precision, float32 for the half precisions and the leaf's own dtype otherwise. Nothing here
flattens a tree into one array, so leaves keep their sharding.
"""

import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from bilevel.ground.aliases import Scalar, Vector


def accumulator_dtype(dtype: Any) -> jnp.dtype:
    """The dtype in which sums over an array of ``dtype`` are carried (at least float32)."""
    return jnp.promote_types(dtype, jnp.float32)


def accumulate(tree: Vector) -> Vector:
    """``tree`` with every leaf cast to its accumulator dtype (no copy where it already is)."""

    def leaf(x: Any) -> jax.Array:
        return jnp.asarray(x).astype(accumulator_dtype(jnp.result_type(x)))

    return jax.tree.map(leaf, tree)


def cast_like(tree: Vector, like: Vector) -> Vector:
    """``tree`` with every leaf cast to the dtype of the matching leaf of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def zeros_accumulated(tree: Vector) -> Vector:
    """Zeros with the shapes of ``tree`` (arrays or ``ShapeDtypeStruct``), accumulator dtypes."""

    def leaf(x: Any) -> jax.Array:
        return jnp.zeros_like(x, accumulator_dtype(jnp.result_type(x)))

    return jax.tree.map(leaf, tree)


def stacked_zeros(count: int, like: Vector) -> Vector:
    """Room for ``count`` vectors: zeros ``(count, ...)``, each leaf sharded as that of ``like``.

    Strongly typed, so that a state that holds them keeps its type in the first step.
    """

    def leaf(x: Any) -> jax.Array:
        zero = jnp.zeros_like(x, jnp.result_type(x))
        return jnp.broadcast_to(zero, (count, *zero.shape))

    return jax.tree.map(leaf, like)


def put(stack: Vector, v: Vector, i: Any) -> Vector:
    """``stack`` with ``v`` in place of its vector ``i``."""
    return jax.tree.map(
        lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x.astype(s.dtype), i, 0), stack, v
    )


def add(a: Vector, b: Vector) -> Vector:
    """Leafwise ``a + b``."""
    return jax.tree.map(operator.add, a, b)


def sub(a: Vector, b: Vector) -> Vector:
    """Leafwise ``a - b``."""
    return jax.tree.map(operator.sub, a, b)


def scale(s: Any, a: Vector) -> Vector:
    """Leafwise ``s a``; the scalar takes the dtype of each leaf."""
    return jax.tree.map(lambda x: jnp.asarray(s).astype(x.dtype) * x, a)


def axpy(s: Any, a: Vector, b: Vector) -> Vector:
    """Leafwise ``s a + b``; the scalar takes the dtype of each leaf."""
    return jax.tree.map(lambda x, y: jnp.asarray(s).astype(x.dtype) * x + y, a, b)


def where(condition: Any, a: Vector, b: Vector) -> Vector:
    """Leafwise selection by one scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _sum(parts: list[Any]) -> Scalar:
    dtype = jnp.result_type(*parts) if parts else jnp.float32
    return functools.reduce(operator.add, parts, jnp.zeros((), dtype))


def vdot(a: Vector, b: Vector) -> Scalar:
    r"""Inner product :math:`∑_i a_i b_i` over all leaves, summed in the accumulator dtype."""

    def leaf(x: Any, y: Any) -> Scalar:
        dtype = accumulator_dtype(jnp.promote_types(jnp.result_type(x), jnp.result_type(y)))
        return jnp.sum(jnp.asarray(x).astype(dtype) * jnp.asarray(y).astype(dtype))

    return _sum(jax.tree.leaves(jax.tree.map(leaf, a, b)))


def norm(a: Vector) -> Scalar:
    """Euclidean norm over all leaves, accumulated as :func:`vdot` does."""
    return jnp.sqrt(vdot(a, a))


def unit(a: Vector) -> Vector:
    """``a`` over its norm; zero stays zero."""
    length = norm(a)
    return scale(1 / jnp.where(length == 0, 1, length), a)


def size(a: Vector) -> int:
    """Number of scalars in the tree (static)."""
    return sum(int(np.prod(jnp.shape(x))) for x in jax.tree.leaves(a))


def all_finite(a: Vector) -> Scalar:
    """True when no leaf contains a NaN or an infinity; non-float leaves are finite."""
    leaves = [x for x in jax.tree.leaves(a) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    result = jnp.asarray(True)
    for leaf in leaves:
        result = result & jnp.all(jnp.isfinite(leaf))
    return result


def paths(tree: Any, name: str) -> list[tuple[str, Any]]:
    """``(path, leaf)`` pairs with readable paths that start with ``name``, for messages."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def named_leaves(tree: Any, default: str) -> dict[str, Any]:
    """The leaves by names such as ``net/decay``; a tree of one leaf has the name ``default``.

    A key that is itself a path of JAX, such as ``"['dense']['kernel']"`` of a penalty, is one too.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(_name_of, path)) or default: leaf for path, leaf in flat}


_STEP = r"(?:\['(.*?)'\]|\[(\d+)\]|\.(\w+))"
"""A step of a path as JAX writes it: into a dictionary, a list or an attribute."""


def _name_of(key: Any) -> str:
    name = jax.tree_util.keystr((key,), simple=True)
    if not re.fullmatch(f"({_STEP})+", name):
        return name
    return "/".join("".join(step) for step in re.findall(_STEP, name))


def random_like(key: jax.Array, tree: Vector, draw: Callable[..., jax.Array]) -> Vector:
    """One independent ``draw(key, shape, dtype)`` per leaf, in the accumulator dtype."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [
        placed_like(draw(k, jnp.shape(x), accumulator_dtype(jnp.result_type(x))), x)
        for k, x in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, drawn)


def explicit_spec(x: Any) -> Any:
    """How an explicit mesh divides ``x``, a ``PartitionSpec``; None where nothing does."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", None) or ()
    return spec if any(name is not None for name in spec) else None


def refuse_explicit(x: Vector, name: str, package: str, remedy: str) -> None:
    """Refuse arrays of an explicit mesh, whose types another package does not carry through."""
    meshes = [
        getattr(getattr(jax.typeof(v), "sharding", None), "mesh", None) for v in jax.tree.leaves(x)
    ]
    if any(AxisType.Explicit in mesh.axis_types for mesh in meshes if mesh is not None):
        raise ValueError(
            f"`{name}` is of {package}, which fails on a mesh with explicit axes: {remedy}, or "
            "make the mesh with `axis_types=(jax.sharding.AxisType.Auto,)`."
        )


def devices_of_examples(x: Any) -> int:
    """Over how many devices an explicit mesh divides the leading axis of ``x`` (1: none known)."""
    spec = explicit_spec(x)
    names = spec[0] if spec else None
    if names is None:
        return 1
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[name] for name in (names if isinstance(names, tuple) else (names,)))


def replicated(x: jax.Array) -> jax.Array:
    """``x`` whole on every device, where an explicit mesh divides it: as factorizations need it."""
    return x if explicit_spec(x) is None else jax.reshard(x, PartitionSpec(*[None] * x.ndim))


def rows_of(x: jax.Array, index: jax.Array, **beyond: Any) -> jax.Array:
    """``x[index]``, divided as ``index`` is where an explicit mesh divides either of them.

    ``beyond`` says what is read beyond the last row, as for ``x.at[index].get(...)``.
    """
    spec, along = explicit_spec(x), explicit_spec(index)
    if spec is None and along is None:
        return x.at[index].get(**beyond)
    spec, along = spec or [None] * x.ndim, along or [None] * index.ndim
    return x.at[index].get(out_sharding=PartitionSpec(*along, *spec[1:]), **beyond)


def summed_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x.T @ y`` on every device, wherever an explicit mesh holds the rows that are summed."""
    divided = explicit_spec(x) is not None or explicit_spec(y) is not None
    return jax.lax.dot_general(
        x, y, (((0,), (0,)), ((), ())), out_sharding=PartitionSpec(None, None) if divided else None
    )


def sum_of_squares(x: Any) -> Scalar:
    """Σ x² of one array in float32, by the fastest kernel there is: a product with itself."""
    x = jnp.abs(x) if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating) else jnp.asarray(x)
    axes = tuple(range(x.ndim))
    out = None if explicit_spec(x) is None else PartitionSpec()
    contract = ((axes, axes), ((), ()))
    square = jax.lax.dot_general(
        x, x, contract, preferred_element_type=accumulator_dtype(x.dtype), out_sharding=out
    )
    return square.astype(jnp.float32)


def placed_along(x: jax.Array, like: Any) -> jax.Array:
    """``x`` divided as the leading axes of ``like`` are, which an explicit mesh may divide."""
    spec = explicit_spec(like)
    return x if spec is None else jax.reshard(x, PartitionSpec(*tuple(spec)[: x.ndim]))


def placed_like(x: jax.Array, like: Any) -> jax.Array:
    """``x`` divided as ``like`` where an explicit mesh divides that: types must agree there."""
    spec = explicit_spec(like)
    return x if spec is None else jax.reshard(x, spec)
