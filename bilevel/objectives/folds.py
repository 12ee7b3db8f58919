"""Folds: which examples a split trains on and which it tests, checked once."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch
from bilevel.ground.batches import check_batch, is_single_key
from bilevel.ground.settings import check_count
from bilevel.ground.tree import paths

Split = tuple[np.ndarray, np.ndarray]

_FORM = (
    "pairs (train, test) of index arrays, such as `KFold(5).split(x)` of scikit-learn or "
    "`bilevel.objectives.k_folds(len(x), 5)`"
)


class SizeGroup(NamedTuple):
    """Folds with equally many examples to train on and to test, which one ``vmap`` can hold."""

    places: np.ndarray  # which folds these are
    train: np.ndarray  # (folds, examples)
    test: np.ndarray


def k_folds(num_examples: int, folds: int, *, seed: int | None = None) -> list[Split]:
    """``folds`` pairs (train, test) of indices: each example is tested in exactly one.

    Args:
      num_examples: how many examples there are.
      folds: how many parts, at least 2; ``num_examples`` of them leave one out each.
      seed: shuffles; ``None`` cuts in the order of the examples.

    Raises:
      TypeError, ValueError: for counts that are no counts, and more folds than examples.
    """
    check_count("num_examples", num_examples, 2)
    check_count("folds", folds, 2)
    if folds > num_examples:
        raise ValueError(f"`folds`={folds} is more than the {num_examples} examples there are.")
    order = np.arange(num_examples)
    if seed is not None:
        check_count("seed", seed, 0)
        order = np.random.default_rng(seed).permutation(num_examples)
    parts = np.array_split(order, folds)
    return [(np.sort(np.concatenate(parts[:k] + parts[k + 1 :])), np.sort(parts[k]))
            for k in range(folds)]  # fmt: skip


def checked_folds(folds: Any, partition: bool) -> list[Split]:
    """``folds`` as pairs of index arrays, refused where they are none or leak."""
    if not isinstance(folds, Iterable) or isinstance(folds, (str, bytes)):
        raise TypeError(f"`folds` must be {_FORM}, got {folds!r}.")
    splits = [checked_split(split, f"folds[{k}]") for k, split in enumerate(folds)]
    if len(splits) < 2:
        raise ValueError(
            f"`folds` has {len(splits)} split, expected at least 2: use `HeldOut` for one split. A "
            "generator (`KFold(5).split(x)`) can be read once only: make a list of it first."
        )
    if partition:
        _check_partition(splits)
    return splits


def checked_split(split: Any, name: str) -> Split:
    """One pair (train, test) of index arrays without a common example."""
    if isinstance(split, np.ndarray) or not hasattr(split, "__len__") or len(split) != 2:
        raise TypeError(
            f"`{name}` must be a pair (train, test) of index arrays: `folds` are {_FORM}."
        )
    train, test = (
        _indices(part, f"{name}[{i}]", kind)
        for i, (part, kind) in enumerate(zip(split, ("train", "test"), strict=True))
    )
    both = np.intersect1d(train, test)
    if both.size:
        raise ValueError(
            f"`{name}` trains on example {both[0]} and tests it too ({both.size} such): the test "
            "would tell how well the examples are remembered. Leave them out of one of the two."
        )
    return train, test


def _indices(part: Any, name: str, kind: str) -> np.ndarray:
    array = np.asarray(part)
    if array.dtype == bool and array.ndim == 1:
        array = np.flatnonzero(array)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TypeError(
            f"`{name}` must be one array of whole numbers (the {kind} examples), got shape "
            f"{array.shape} and dtype {array.dtype}."
        )
    if not array.size:
        raise ValueError(f"`{name}` is empty: there is no example to {kind}.")
    if array.min() < 0:
        raise ValueError(f"`{name}` has the index {array.min()}, expected 0 or more.")
    return array.astype(np.int32)


def _check_partition(splits: list[Split]) -> None:
    tested = np.concatenate([test for _, test in splits])
    remedy = "pass `partition=False` where folds are meant to repeat or leave out examples."
    count = np.bincount(tested)
    if count.max() > 1:
        twice = int(np.argmax(count))
        where = [k for k, (_, test) in enumerate(splits) if twice in test]
        raise ValueError(
            f"`folds` do not partition the examples: example {twice} is tested {count.max()} times "
            f"(in folds {where}), so that it counts more than others: {remedy}"
        )
    if count.min() == 0:
        raise ValueError(
            f"`folds` do not partition the examples: example {int(np.argmin(count))} is never "
            f"tested ({int(np.sum(count == 0))} such): {remedy}"
        )
    last = max(int(train.max()) for train, _ in splits)
    if last >= count.size:
        raise ValueError(
            f"`folds` do not partition the examples: example {last} is trained on and never "
            f"tested: {remedy}"
        )


def size_groups(splits: list[Split]) -> tuple[SizeGroup, ...]:
    """The folds by their numbers of examples: one group, or two for folds that differ by one."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for k, (train, test) in enumerate(splits):
        sizes.setdefault((train.size, test.size), []).append(k)
    return tuple(
        SizeGroup(
            np.array(places),
            np.stack([splits[k][0] for k in places]),
            np.stack([splits[k][1] for k in places]),
        )
        for places in sizes.values()
    )


def check_data(data: Batch, least: int, exact: bool) -> None:
    """Refuse data without an example for each index of the folds."""
    check_batch(data, "data")
    lengths: dict[int, str] = {}
    for path, leaf in paths(data, "data"):
        if is_single_key(leaf):
            continue
        length = jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0
        if length < least or (exact and length != least):
            raise ValueError(
                f"{path} has shape {jnp.shape(leaf)}, but the folds are of {least} examples: "
                "examples lie along the leading axis of every array, and what is no data belongs "
                "in a closure of the losses."
            )
        lengths[length] = path
    if not lengths:
        raise ValueError("`data` has no arrays: pass the examples that the folds are of.")
    if len(lengths) > 1:
        (a, b), *_ = zip(list(lengths.items())[:-1], list(lengths.items())[1:], strict=True)
        raise ValueError(
            f"{a[1]} has {a[0]} examples, {b[1]} has {b[0]}: expected the same number in every "
            "array of `data`."
        )


def taken(data: Batch, index: np.ndarray, places: np.ndarray | None = None) -> Batch:
    """The examples ``index`` of each array; a single key becomes one of its own per fold."""

    def leaf(x: Any) -> Any:
        if is_single_key(x):
            if places is None:
                return x
            return jax.vmap(lambda k: jax.random.fold_in(x, k))(jnp.asarray(places))
        return jnp.asarray(x)[index]

    return jax.tree.map(leaf, data)
