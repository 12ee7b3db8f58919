"""The numbers of a step as one array, so that the host fetches them in one transfer."""

import dataclasses
import math
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.tree import replicated
from bilevel.run.processes import on_host

_FORMATS = {"bool": "?", "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q",
            "float32": "f", "float64": "d"}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree of small arrays as bytes: each array read on its own costs the host 30 us.

    Attributes:
      data: the bytes of all leaves, one behind the other.
      layout: the tree, the shapes of its leaves, and the bytes as :mod:`struct` names them.
    """

    data: jax.Array
    layout: Any = dataclasses.field(metadata={"static": True})


def pack(numbers: Any) -> Packed:
    """``numbers`` in one array of the device."""
    leaves, structure = jax.tree.flatten(jax.tree.map(_wide, numbers))
    shapes = tuple(x.shape for x in leaves)
    code = "=" + "".join(_FORMATS[x.dtype.name] * x.size for x in leaves)
    return Packed(jnp.concatenate([_bytes(x) for x in leaves]), (structure, shapes, code))


def unpack(packed: Packed) -> Any:
    """The tree again, on the host, of Python numbers and nested lists of them; waits for it."""
    structure, shapes, code = packed.layout
    found = struct.unpack(code, on_host(packed.data).tobytes())
    leaves, at = [], 0
    for shape in shapes:
        if shape == ():
            leaves.append(found[at])
            at += 1
        else:
            size = math.prod(shape)
            leaves.append(np.reshape(np.asarray(found[at : at + size], object), shape).tolist())
            at += size
    return jax.tree.unflatten(structure, leaves)


def _wide(x: Any) -> jax.Array:
    """``x`` whole on every device, in a dtype that both JAX and :mod:`struct` know."""
    x = replicated(jnp.asarray(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([jnp.real(x), jnp.imag(x)], -1)  # told as a pair
    if x.dtype.name in _FORMATS:
        return x
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _bytes(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    return jax.lax.bitcast_convert_type(x.ravel(), jnp.uint8).ravel()
