r"""The largest directions of a Gauss–Newton matrix, from means over groups of examples.

With :math:`g_{nk}` the gradients of which :math:`M = ∑_{n,k} g_{nk}g_{nk}ᵀ` is made, and the
examples in groups :math:`S_j`, which the models of classifiers put far apart,

.. math:: M = ∑_{j,k} b_{jk}b_{jk}ᵀ + (\text{scatter within groups}),
    b_{jk} = |S_j|^{-1/2} ∑_{n ∈ S_j} g_{nk}

Reference: Papyan, "Traces of class/cross-class structure pervade deep learning spectra",
JMLR 2020.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree

GROUPS = 10
"""Groups of examples, of equal size. More of them hold more of M, and are merged to few vectors."""


class Groups(NamedTuple):
    """Examples in order of their groups; N stands for a place that is left empty.

    Attributes:
      order: (G, S) indices of examples.
      scale: (G,) one over the root of a group's size.
      size: N.
    """

    order: jax.Array
    scale: jax.Array
    size: int


def group(outputs: Any) -> Groups:
    """Groups of neighbours in an order of the outputs: by which one is largest, then by its size.

    Equal sizes need no shapes that depend on the data. A model with one output is cut at
    quantiles of it.
    """
    leaves = [tree.replicated(tree.accumulate(jnp.atleast_1d(x))) for x in jax.tree.leaves(outputs)]
    n = leaves[0].shape[0]
    if any(x.shape[0] != n for x in leaves):
        shapes = [x.shape for x in leaves]
        raise ValueError(
            "`EKFAC` with a `rank` groups the examples, which must be the first axis of the "
            f"outputs: this model's have shapes {shapes}. Put the batch first, or set `rank=0`."
        )
    z = jnp.concatenate([x.reshape(n, -1) for x in leaves], -1)
    order = jnp.lexsort((jnp.max(z, -1), jnp.argmax(z, -1)))
    count = min(GROUPS, n)
    size = -(-n // count)
    padded = jnp.concatenate([order, jnp.full(count * size - n, n, order.dtype)])
    order = padded.reshape(count, size)
    members = jnp.sum(order < n, -1)
    return Groups(order, jnp.where(members > 0, members, 1).astype(z.dtype) ** -0.5, n)


def sums(groups: Groups, x: jax.Array, d: jax.Array, signs: jax.Array) -> jax.Array:
    """:math:`b_j`, (G, in, out), from inputs (N, P, in) and gradients at the outputs (N, P, out).

    ``signs``, (N,), are those that the gradients carry; left there they would cancel the sums.
    """
    if x.shape[0] != groups.size:
        raise ValueError(
            "`EKFAC` with a `rank` groups the examples, which must be the first axis of every "
            f"layer's inputs: there are {groups.size} in the outputs, but a layer has "
            f"{x.shape[0]} rows. Put the batch first, or set `rank=0`."
        )

    def take(v: jax.Array) -> jax.Array:
        zero = jnp.zeros((1, *v.shape[1:]), v.dtype)
        taken = jnp.concatenate([v, zero])[groups.order]  # (G, S, P, ...)
        return taken.reshape(taken.shape[0], -1, taken.shape[-1])

    x, d, signs = tree.replicated(x), tree.replicated(d), tree.replicated(signs)
    made = jnp.einsum("gsi,gso->gio", take(x), take(d * signs[:, None, None].astype(d.dtype)))
    return made * groups.scale[:, None, None].astype(made.dtype)


def merge(kept: list[jax.Array], new: list[jax.Array]) -> list[jax.Array]:
    r"""As many vectors as are kept: the best :math:`BBᵀ` of this rank for old and new together.

    Vectors are stacks of matrices, one stack for each layer. What comes out is B times orthonormal
    columns, so it is below :math:`BBᵀ` as a matrix, and the scatter left over is positive.
    """
    both = [jnp.concatenate([a, b]) for a, b in zip(kept, new, strict=True)]
    flat = [x.reshape(x.shape[0], -1) for x in both]
    vectors = jnp.linalg.eigh(sum(x @ x.T for x in flat))[1]
    rank = kept[0].shape[0]
    top = vectors[:, -rank:]
    return [jnp.tensordot(top.T.astype(x.dtype), x, axes=1) for x in both]
