"""Batches and stacks of batches: one way to take one out, one rule for keys, one for lengths."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch
from bilevel.ground.tree import paths


def array_dtype(leaf: Any) -> Any:
    """The dtype of an array or number; ``TypeError`` for all else, names of dtypes included."""
    if isinstance(leaf, (str, bytes, type, np.dtype)):
        raise TypeError(f"{leaf!r} is not an array")
    return jnp.result_type(leaf)


def is_single_key(leaf: Any) -> bool:
    """One typed key (``jax.random.key``): a batch leaf that needs no leading axis."""
    return jnp.ndim(leaf) == 0 and jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a stack, for :func:`select_batch` alone: a slice of the stack would be a copy.

    Attributes:
      batches: the whole stack.
      first: where the part begins.
    """

    batches: Batch
    first: int = dataclasses.field(metadata={"static": True})


def select_batch(batches: Batch, index: Any) -> Batch:
    """Batch ``index`` of a stack, not negative; a single key is folded with the index."""
    if isinstance(batches, Window):
        return select_batch(batches.batches, batches.first + index)

    def leaf(x: Any) -> Any:
        if is_single_key(x):
            return jax.random.fold_in(x, index)
        return jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False)

    return jax.tree.map(leaf, batches)


def select_batches(batches: Batch, first: int, count: int) -> Batch:
    """Batches ``first`` to ``first + count - 1``; a single key becomes the keys of those steps."""

    def part(leaf: Any) -> Any:
        if is_single_key(leaf):
            return jax.vmap(lambda i: jax.random.fold_in(leaf, i))(first + jnp.arange(count))
        return leaf[first : first + count]

    return jax.tree.map(part, batches)


def one_batch(batches: Batch) -> Batch:
    """Shapes and dtypes of a single batch of a stack, without touching the data."""
    return jax.eval_shape(lambda b: select_batch(b, 0), batches)


def check_stack(
    batches: Batch, count: int, name: str = "inner_batch", reads: str = "one batch per step"
) -> None:
    """Refuse a leaf that is not a stack of exactly ``count`` batches, which ``reads`` explains.

    The one rule for every stack: equality tells it from a single batch of as many examples. A
    :class:`Window` is part of one that was checked.
    """
    if isinstance(batches, Window):
        return
    if not jax.tree.leaves(batches) and count:
        raise ValueError(f"`{name}` has no arrays: pass batches stacked on a leading axis.")
    check_entries(batches, name)
    for path, leaf in paths(batches, name):
        if is_single_key(leaf):
            continue
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != count:
            raise ValueError(
                f"{path} has shape {jnp.shape(leaf)}, expected a leading axis of {count}: {reads}. "
                "Stack a list of batches with `jax.tree.map(lambda *x: jnp.stack(x), *batches)` "
                f"(to use one batch in every step: `jnp.broadcast_to(x, ({count}, *x.shape))`), "
                "and cut a longer stack, "
                f"`x[:{count}]`. Only a key made by `jax.random.key` may come alone; it is then "
                "split by step."
            )


def check_batch(batch: Batch, name: str) -> None:
    """Refuse what is not an array, and arrays of size zero: its mean loss would be NaN."""
    check_entries(batch, name)
    for path, leaf in paths(batch, name):
        if 0 in jnp.shape(leaf):
            raise ValueError(
                f"{path} is empty (shape {jnp.shape(leaf)}): expected at least one example."
            )


def check_entries(batch: Batch, name: str) -> None:
    """Refuse what is neither an array of numbers nor a key."""
    for path, leaf in paths(batch, name):
        try:
            array_dtype(leaf)
        except TypeError:
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            remedy = (
                "encode it as numbers (tokens, labels) before it enters a batch, or let the loss "
                "close over it"
            )
            if hasattr(leaf, "__next__") or callable(leaf):
                remedy = "take a batch out of it first (`next(loader)`, `data(step)`)"
            raise TypeError(
                f"{path} is a {type(leaf).__name__} ({kind}), expected an array of numbers or a "
                f"key: {remedy}."
            ) from None
