r"""Kronecker factors of a Gauss–Newton matrix, from the layers of the model.

For a layer with inputs :math:`a` and gradients :math:`δ` of the outputs at its own,

.. math:: ∑_n ∑_k (a_n a_nᵀ) ⊗ (δ_{nk}δ_{nk}ᵀ) ≈
    1/N ∑_n a_n a_nᵀ ⊗ ∑_{n,k} δ_{nk}δ_{nk}ᵀ

where :math:`δ_{nk}` comes from column k of a factor :math:`R_n R_nᵀ = Q_n` of the
output Hessian. A convolution counts each position of its output as an example of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Key, Params, Vector
from bilevel.ground.linear_map import Kronecker
from bilevel.ground.loops import loop
from bilevel.problem.layers import groups
from bilevel.problem.layers.find import Layer, find_layers
from bilevel.problem.layers.program import Program, evaluate, trace

MAX_UNITS = 256
"""Most outputs a row: their Hessian is factored, one (C, C) matrix for each row."""


Bases: TypeAlias = list[tuple[jax.Array, jax.Array]]


class Backward(NamedTuple):
    """What one backward pass gives.

    Attributes:
      columns: gradients at the layers' outputs, (N, P, out).
      gradients: of the other leaves.
      signs: of the examples in it, (N,), over the root of the rows each has in the outputs; one
        array for each leaf of the outputs, zero where the pass is of another, none if sampled.
    """

    columns: list[jax.Array]
    gradients: list[jax.Array]
    signs: list[jax.Array]


def kronecker(
    model: Callable[[Params], Any],
    weigh: Callable[[Any], Any],
    params: Params,
    known: Vector,
    unroll: bool,
    num_samples: int | None,
    key: Key | None,
) -> Kronecker:
    """Factors of ``J'QJ`` where ``weigh`` is Q, with one block for each row of the outputs.

    ``num_samples`` backward passes with random signs on the rows' factor, or for ``None`` one
    for each unit, which is exact where examples do not depend on each other.
    """
    program = trace(model, params)
    leaves, treedef = jax.tree.flatten(params)
    layers, reasons = find_layers(program, leaves)
    others = sorted(reasons)
    outputs, inputs, pull = _linearized(program, layers, others, leaves)
    count, seed = _seeds(outputs, weigh, num_samples, key)
    rows = [_rows(layer, x) for layer, x in zip(layers, inputs, strict=True)]

    def gather(part: Callable[[Any, Backward], Any], start: Any) -> Any:
        def body(k: Any, total: Any) -> Any:
            cotangent, signs = seed(k)
            deltas, gradients = pull(cotangent)
            made = [_columns(layer, d) for layer, d in zip(layers, deltas, strict=True)]
            return part(total, Backward(made, gradients, signs))

        return loop(count, body, start, unroll)

    def products(total: Any, made: Backward) -> Any:
        flat = [d.reshape(-1, d.shape[-1]) for d in made.columns]
        means = [jnp.mean(jnp.square(tree.accumulate(g))) for g in made.gradients]
        return tree.add(total, ([tree.summed_product(d, d) for d in flat], means))

    sizes = [jax.eval_shape(lambda v, la=la: _matrix(la, v), leaves).shape for la in layers]
    right = [jnp.zeros((n, n), x.dtype) for (_, n), x in zip(sizes, rows, strict=True)]
    means = [jnp.zeros((), tree.accumulate(leaves[i]).dtype) for i in others]
    right, means = gather(products, (right, means))
    flat = [x.reshape(-1, x.shape[-1]) for x in rows]
    left = [tree.summed_product(x, x) / x.shape[0] for x in flat]

    def moments(bases: Bases, rank: int) -> tuple[list[jax.Array], list[jax.Array]]:
        turned = [x @ u for x, (u, _) in zip(rows, bases, strict=True)]
        chosen = groups.group(outputs) if rank > 0 else None

        def squares(total: Any, made: Backward) -> Any:
            diagonals, largest = total
            columns = [d @ w for d, (_, w) in zip(made.columns, bases, strict=True)]
            pairs = list(zip(turned, columns, strict=True))
            diagonals = tree.add(diagonals, [_squares(x, d) for x, d in pairs])
            if chosen is not None:
                signs = functools.reduce(jnp.add, made.signs)
                sums = [groups.sums(chosen, x, d, signs) for x, d in pairs]
                largest = groups.merge(largest, sums)
            return diagonals, largest

        found = [jnp.zeros(n, u.dtype) for n, (u, _) in zip(sizes, bases, strict=True)]
        return gather(squares, (found, tree.stacked_zeros(rank, found)))

    found = dict(zip(others, means, strict=True))
    rest = [found.get(i, jnp.zeros((), tree.accumulate(x).dtype)) for i, x in enumerate(leaves)]
    size = sum(np.size(x) for x in leaves)
    return Kronecker(
        lambda v: [_matrix(layer, jax.tree.leaves(v)) for layer in layers],
        list(zip(left, right, strict=True)),
        moments,
        known,
        jax.tree.unflatten(treedef, rest),
        jax.tree.unflatten(treedef, [i not in found for i in range(len(leaves))]),
        count,
        1 - sum(np.size(leaves[i]) for i in others) / max(size, 1),
    )


def _linearized(
    program: Program, layers: tuple[Layer, ...], others: list[int], leaves: list[Any]
) -> tuple[Any, list[jax.Array], Callable[[Any], tuple[list[jax.Array], list[jax.Array]]]]:
    """Outputs, inputs of the layers, and the gradients at their outputs and in other leaves."""

    def run(added: list[jax.Array], free: list[jax.Array]) -> Any:
        here = list(leaves)
        for index, leaf in zip(others, free, strict=True):
            here[index] = leaf
        extra = {layer.outputs: x for layer, x in zip(layers, added, strict=True)}
        return evaluate(program, here, extra, [layer.inputs for layer in layers])

    zeros = [jnp.zeros(layer.output_shape, layer.output_dtype) for layer in layers]
    outputs, pull, inputs = jax.vjp(run, zeros, [leaves[i] for i in others], has_aux=True)
    return outputs, inputs, pull


def _seeds(
    outputs: Any, weigh: Callable[[Any], Any], num_samples: int | None, key: Key | None
) -> tuple[int, Callable[[Any], Any]]:
    """How many cotangents, and ``k -> (cotangent k, signs)``: columns of R, or signs times R."""
    leaves, treedef = jax.tree.flatten(outputs)
    symmetric = num_samples is None  # then a column means the same in all examples
    roots = [_root(i, leaves, treedef, weigh, symmetric) for i in range(len(leaves))]
    ends = np.cumsum([0, *(r.shape[-1] for r in roots)])
    count = int(ends[-1]) if num_samples is None else num_samples
    # Signs make what different examples contribute to a leaf outside the layers uncorrelated.
    keys = jax.random.split(jax.random.key(0) if key is None else key, count)

    def seed(k: Any) -> tuple[Any, list[jax.Array]]:
        parts, drawn = [], []
        for i, (z, root) in enumerate(zip(leaves, roots, strict=True)):
            key = jax.random.fold_in(keys[k], i)
            if num_samples is None:
                signs = jax.random.rademacher(key, (*root.shape[:-2], 1), root.dtype)
                one = jax.nn.one_hot(k - ends[i], root.shape[-1], dtype=root.dtype)
                each = signs.reshape(signs.shape[0], -1)
                drawn.append(each[:, 0] * jnp.sum(one) * each.shape[1] ** -0.5)
                signs = signs * jnp.broadcast_to(one, root.shape[:-1])
            else:
                signs = jax.random.rademacher(key, root.shape[:-1], root.dtype)
                signs = signs * float(count) ** -0.5
            signs = tree.placed_along(signs, root)
            parts.append(jnp.einsum("...ij,...j->...i", root, signs).reshape(z.shape))
        cotangents = [
            tree.placed_like(x.astype(z.dtype), z) for x, z in zip(parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, cotangents), drawn

    return count, seed


def _root(
    i: int, leaves: list[Any], treedef: Any, weigh: Callable[[Any], Any], symmetric: bool
) -> jax.Array:
    """R, (..., C, C), with ``R R'`` the blocks of leaf i's Hessian, without what is negative."""
    z = leaves[i]
    units = z.shape[-1] if z.ndim > 1 else 1
    if units > MAX_UNITS:
        raise ValueError(
            f"KFAC and EKFAC factor the Hessian of the output loss, one matrix for each row of the "
            f"outputs, and take at most {MAX_UNITS} outputs a row, got {units}. Use "
            "`CG(preconditioner=Diagonal())` or `CG()`."
        )

    def column(c: Any) -> jax.Array:
        direction = jax.nn.one_hot(c, units, dtype=z.dtype)
        whole = [jnp.zeros_like(x) for x in leaves]
        whole[i] = jnp.broadcast_to(direction, z.shape) + whole[i] if z.ndim > 1 else 1 + whole[i]
        image = jax.tree.leaves(weigh(jax.tree.unflatten(treedef, whole)))[i]
        return image if z.ndim > 1 else image.reshape(-1, 1)

    blocks = tree.accumulate(jnp.moveaxis(jax.vmap(column)(jnp.arange(units)), 0, -1))
    values, vectors = jnp.linalg.eigh((blocks + jnp.swapaxes(blocks, -1, -2)) / 2)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
    return root @ jnp.swapaxes(vectors, -1, -2) if symmetric else root


def _rows(layer: Layer, x: jax.Array) -> jax.Array:
    """Inputs (N, P, in), with a one at the end for the bias."""
    rows = tree.accumulate(layer.rows(x))
    rows = rows.reshape(rows.shape[0] if rows.ndim > 1 else 1, -1, rows.shape[-1])
    if layer.vector is None:
        return rows
    return jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1), rows.dtype)], -1)


def _columns(layer: Layer, d: jax.Array) -> jax.Array:
    """Gradients at the outputs, (N, P, out)."""
    columns = tree.accumulate(layer.columns(d))
    return columns.reshape(columns.shape[0] if columns.ndim > 1 else 1, -1, columns.shape[-1])


def _matrix(layer: Layer, leaves: list[Any]) -> jax.Array:
    """Kernel and bias of a vector, (in + 1, out)."""
    kernel = layer.matrix(leaves[layer.kernel])
    if layer.vector is None or layer.bias is None:
        return kernel
    return jnp.concatenate([kernel, layer.vector(leaves[layer.bias])[None]])


def _squares(x: jax.Array, d: jax.Array) -> jax.Array:
    """The sum over examples of the squares of their gradients, from (N, P, in) and (N, P, out)."""
    if x.shape[1] == 1:
        return tree.summed_product(jnp.square(x[:, 0]), jnp.square(d[:, 0]))

    def body(total: jax.Array, example: Any) -> tuple[jax.Array, None]:
        inputs, gradients = example
        return total + jnp.square(inputs.T @ gradients), None

    return jax.lax.scan(body, jnp.zeros((x.shape[-1], d.shape[-1]), x.dtype), (x, d))[0]
