"""Several processes that drive one run: what they must agree on, and who writes."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevel.ground.tree import paths

Value = TypeVar("Value")


def is_writer() -> bool:
    """Whether this process writes logs, manifests and what the terminal shows."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether more than one process drives this run."""
    return jax.process_count() > 1


@functools.cache
def _all_devices() -> Mesh:
    return jax.make_mesh(
        (jax.device_count(),), ("device",), axis_types=(jax.sharding.AxisType.Auto,)
    )


@functools.cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def exchange(mine: np.ndarray) -> np.ndarray:
    """What every process passed, one row each, known to all; it waits for all of them.

    Args:
      mine: numbers, of one shape and dtype in all processes.
    """
    mine = np.asarray(mine)
    if not several():
        return mine[None]
    mesh = _all_devices()
    rows = jax.make_array_from_callback(
        (jax.device_count(), *mine.shape),
        NamedSharding(mesh, PartitionSpec("device")),
        lambda index: mine[None],
    )
    rows = np.asarray(_replicate(mesh)(rows))
    ranks = [device.process_index for device in mesh.devices.flat]
    return np.stack([rows[ranks.index(rank)] for rank in range(jax.process_count())])


def wait_for_all() -> None:
    """Go on when every process has come here."""
    exchange(np.zeros((), np.int32))


def all_well(well: bool) -> bool:
    """Whether all is well in every process; each must ask."""
    return bool(exchange(np.asarray(well, np.int32)).all())


def by_writer(do: Callable[[], Value]) -> Value | None:
    """``do()`` in the process that writes; where it raises there, every process raises."""
    found, error = None, None
    if is_writer():
        try:
            found = do()
        except Exception as raised:
            if not several():
                raise
            error = raised
    if not all_well(error is None):
        if error is not None:
            raise error
        raise RuntimeError(
            "process 0 of this run could not go on, and this process ends with it: what it raised "
            "is in its own output."
        )
    return found


def on_host(numbers: Any) -> Any:
    """Numbers of the device as NumPy arrays, those too of which other processes hold a part."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return _replicate(x.sharding.mesh)(x)  # type: ignore[attr-defined]
        return x

    # `jax.device_get` starts asynchronous copies first, which cost a CPU more than they hide.
    return jax.tree.map(lambda x: np.asarray(whole(x)), numbers)


def placed(tree: Any, beside: Any = None) -> Any:
    """Arrays that this process alone holds, on the devices of all; the others as they are.

    Args:
      tree: the arrays, the same numbers in every process.
      beside: arrays whose mesh is taken; by default those of ``tree`` itself.
    """
    if not several():
        return tree
    meshes = [
        x.sharding.mesh  # type: ignore[attr-defined]
        for x in jax.tree.leaves(tree if beside is None else beside)
        if isinstance(x.sharding, NamedSharding) and not x.is_fully_addressable
    ]
    replicate = _replicate(meshes[0] if meshes else _all_devices())

    def leaf(x: jax.Array) -> jax.Array:
        if not x.is_fully_addressable:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(x))
            return jax.random.wrap_key_data(replicate(data), impl=jax.random.key_impl(x))
        return replicate(np.asarray(x))

    return jax.tree.map(leaf, tree)


def check_same(state: Any, settings: dict[str, Any]) -> None:
    """Refuse a run whose processes disagree; every process raises.

    Args:
      state: compared by tree, shapes and dtypes, and by the numbers of what every process holds
        whole. What is divided over the processes is each one's own.
      settings: by name, as JSON.

    Raises:
      ValueError: names what differs.
    """
    if not several():
        return
    named = [(name, _digest(json.dumps(value, sort_keys=True, default=repr).encode()))
             for name, value in settings.items()]  # fmt: skip
    for path, leaf in paths(state, "state"):
        named.append((path, _digest_of_leaf(leaf)))
    whole = _digest(json.dumps([name for name, _ in named]).encode())
    trees = exchange(np.asarray([len(named), whole], np.uint32))
    if (trees != trees[0]).any():
        raise ValueError(
            "the processes of this run disagree on the tree of `state`: each must build it by the "
            "same program."
        )
    digests = exchange(np.asarray([digest for _, digest in named], np.uint32))
    different = (digests != digests[0]).any(0)
    if different.any():
        names = [name for (name, _), other in zip(named, different, strict=True) if other]
        ranks = np.flatnonzero((digests != digests[0]).any(1))
        raise ValueError(
            f"the processes of this run disagree on {_listed(names)}: process "
            f"{_listed(ranks, '')} differs from process 0. Every process must pass the same "
            "settings and the same numbers: draw them from one key, or send those of process 0 to "
            "all."
        )


def _listed(names: Iterable[Any], mark: str = "`") -> str:
    names = [f"{mark}{name}{mark}" for name in names]
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little")


def _digest_of_leaf(leaf: Any) -> int:
    form = f"{jnp.result_type(leaf)}{jnp.shape(leaf)}".encode()
    if not leaf.is_fully_replicated:
        return _digest(form)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return _digest(form + np.asarray(leaf).tobytes())
