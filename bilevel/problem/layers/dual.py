r"""The matrix :math:`J D Jᵀ` of a network, from the inputs and output gradients of its layers.

For a dense layer :math:`s = Wᵀ a` the row of output (n, c) is
:math:`a_n ⊗ δ_{nc}`, so that two rows have the inner product
:math:`(a_nᵀ a_m)(δ_{nc}ᵀ δ_{md})`, and no row is ever written down.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Params, Vector
from bilevel.problem.layers.find import Layer, find_layers
from bilevel.problem.layers.program import Program, evaluate, trace


def dual_kernel(
    model: Callable[[Params, Batch], Any], params: Params, batch: Batch, uniform: bool
) -> tuple[Callable[[Vector, jax.Array], jax.Array], float] | None:
    r"""``d, R -> R' J diag(d) J' R`` and the share of the parameters that is in layers.

    Examples are the leading axis of ``batch`` and of the outputs and do not depend on each other;
    outputs are ordered by example, and R, (N, C, C), has a block for each. With ``uniform`` each
    leaf of ``d`` is one number repeated. Above the diagonal nothing is meant. ``None`` where no
    parameter is in a layer.
    """
    first = jax.tree.map(lambda x: x[:1], batch)
    program = trace(model, params, first)
    leaves = jax.tree.leaves(params)
    layers, reasons = find_layers(program, leaves)
    if not layers:
        return None
    others = sorted(reasons)

    def kernel(d: Vector, root: jax.Array) -> jax.Array:
        scales = [tree.replicated(x) for x in jax.tree.leaves(d)]

        def one(example: Batch, block: jax.Array) -> Any:
            return _one_example(program, layers, others, params, example, block)

        parts, rows = jax.vmap(one)(jax.tree.map(lambda x: x[:, None], batch), root)
        pairs, wholes = [], []
        for layer, part in zip(layers, parts, strict=True):
            bias = None
            if layer.vector is not None and layer.bias is not None:
                bias = layer.vector(scales[layer.bias])
            scale = layer.matrix(scales[layer.kernel])
            if uniform and part[0].ndim == 3 and part[0].shape[1] == 1:
                pairs.append(_pair(part, scale, bias))
            else:
                wholes.append(_of_layer(part, scale, bias))
        for index, row in zip(others, rows, strict=True):
            flat = row.reshape(*row.shape[:2], -1)
            wholes.append(_of_rows(flat, scales[index].reshape(-1)))
        return functools.reduce(jnp.add, [*([_lower(pairs)] if pairs else []), *wholes])

    size = sum(np.size(leaf) for leaf in leaves)
    covered = 1 - sum(np.size(leaves[i]) for i in others) / max(size, 1)
    return kernel, covered


def _one_example(
    program: Program,
    layers: tuple[Layer, ...],
    others: list[int],
    params: Params,
    example: Batch,
    block: jax.Array,
) -> tuple[list[Any], list[jax.Array]]:
    """For each layer what its part of the kernel is made of, and rows of the other leaves."""
    leaves, batch = jax.tree.leaves(params), jax.tree.leaves(example)

    def outputs(added: list[jax.Array], free: list[jax.Array]) -> Any:
        here = list(leaves)
        for index, leaf in zip(others, free, strict=True):
            here[index] = leaf
        extra = {layer.outputs: x for layer, x in zip(layers, added, strict=True)}
        kept = [layer.inputs for layer in layers]
        z, inputs = evaluate(program, [*here, *batch], extra, kept)
        return jnp.concatenate([o.reshape(-1) for o in jax.tree.leaves(z)]), inputs

    zeros = [jnp.zeros(layer.output_shape, layer.output_dtype) for layer in layers]
    free = [leaves[i] for i in others]
    z, pull, inputs = jax.vjp(outputs, zeros, free, has_aux=True)
    deltas, rows = jax.vmap(pull)(block.T.astype(z.dtype))
    parts = []
    for layer, x, delta in zip(layers, inputs, deltas, strict=True):
        a, d = layer.rows(x), layer.columns(delta)
        a = tree.accumulate(a.reshape(-1, a.shape[-1]))  # (P, in)
        d = tree.accumulate(d.reshape(z.size, -1, d.shape[-1]))  # (C, P, out)
        (p, n_in), n_out = a.shape, d.shape[-1]
        if p > 1 and z.size * n_in * n_out <= p * (n_in + z.size * n_out):
            parts.append((jnp.einsum("pi,cpo->cio", a, d), d.sum(1)))
        else:
            parts.append((a, d))
    return parts, tree.accumulate(rows)


def _pair(part: Any, scale: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """A dense layer with one number for all weights: products of inputs, and the gradients."""
    a = part[0][:, 0]
    inputs = scale[0, 0].astype(a.dtype) * (a @ a.T)
    if bias is not None:
        inputs = inputs + bias[0].astype(a.dtype)
    return inputs, part[1][:, :, 0]


def _lower(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The sum of the dense layers' parts on and below the diagonal, by blocks of examples.

    Four blocks do five eighths of the work of the whole, and hold a quarter of it at a time.
    """
    n, c, _ = pairs[0][1].shape
    edges = sorted({n * i // 4 for i in range(5)})
    blocks = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        made = []
        for inputs, d in pairs:
            left = d[start:stop].reshape((stop - start) * c, -1)
            products = (left @ d[:stop].reshape(stop * c, -1).T).reshape(-1, c, stop, c)
            made.append(inputs[start:stop, None, :stop, None] * products)
        block = functools.reduce(jnp.add, made).reshape(-1, stop * c)
        blocks.append(jnp.pad(block, ((0, 0), (0, (n - stop) * c))))
    return jnp.concatenate(blocks)


def _of_layer(part: Any, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """(m, m), the layer's part of the kernel; ``scale`` is (in, out) and ``bias`` (out,)."""
    a, d = part
    if a.ndim == 4:  # rows (N, C, in, out), and those of the bias (N, C, out)
        total = _of_rows(a.reshape(*a.shape[:2], -1), scale.reshape(-1))
        return total if bias is None else total + _of_rows(d, bias)
    if a.shape[1] > 1:
        total = _positions(a, d, scale)
        return total if bias is None else total + _of_rows(d.sum(2), bias)
    a, d = a[:, 0], d[:, :, 0]
    total = _by_units(a, d, scale)
    return total if bias is None else total + _of_rows(d, bias)


def _of_rows(rows: jax.Array, scale: jax.Array) -> jax.Array:
    """Rows ``(N, C, k)`` themselves."""
    half = rows.reshape(-1, rows.shape[-1])
    return (half * scale.astype(half.dtype)[None]) @ half.T


def _by_units(a: jax.Array, d: jax.Array, scale: jax.Array) -> jax.Array:
    """One number per weight: unit by unit, each with its own inner products of the inputs."""
    n, c, _ = d.shape

    def body(total: jax.Array, unit: Any) -> tuple[jax.Array, None]:
        column, weights = unit  # (N, C) and (in,)
        inputs = (a * weights.astype(a.dtype)[None]) @ a.T
        product = inputs[:, None, :, None] * column[:, :, None, None] * column[None, None]
        return total + product, None

    start = jnp.zeros((n, c, n, c), a.dtype)
    return jax.lax.scan(body, start, (jnp.moveaxis(d, -1, 0), scale.T))[0].reshape(n * c, n * c)


def _positions(a: jax.Array, d: jax.Array, scale: jax.Array) -> jax.Array:
    """A kernel that is used at P positions, (N, P, in) and (N, C, P, out): unit by unit."""

    def body(total: jax.Array, unit: Any) -> tuple[jax.Array, None]:
        column, weights = unit  # (N, C, P) and (in,)
        return total + _of_rows(jnp.einsum("npi,ncp->nci", a, column), weights), None

    m = d.shape[0] * d.shape[1]
    units = (jnp.moveaxis(d, -1, 0), scale.T)
    return jax.lax.scan(body, jnp.zeros((m, m), a.dtype), units)[0]


def ordered_outputs(outputs: Any) -> tuple[Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    """Outputs as one axis ordered by example, and back."""
    leaves, treedef = jax.tree.flatten(outputs)
    n = leaves[0].shape[0]
    sizes = [leaf.size // n for leaf in leaves]
    ends = np.cumsum(sizes)[:-1].tolist()

    def flat(z: Any) -> jax.Array:
        parts = [x.reshape(n, -1) for x in jax.tree.leaves(z)]
        return jnp.concatenate(parts, 1).reshape(-1)

    def back(u: jax.Array) -> Any:
        parts = jnp.split(u.reshape(n, -1), ends, 1)
        whole = [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(treedef, whole)

    return flat, back


def block_root(
    weigh: Callable[[jax.Array], jax.Array], shape: tuple[int, int], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """R, (N, C, C), with ``R R'`` the Hessian of a loss that is a sum over examples; is it one?

    Where it is not, or not convex, R is the identity.
    """
    n, c = shape

    def column(e: jax.Array) -> jax.Array:
        return weigh(jnp.broadcast_to(e, shape).reshape(-1)).reshape(shape)

    blocks = jnp.moveaxis(jax.vmap(column)(jnp.eye(c, dtype=dtype)), 0, -1)
    blocks = tree.accumulate(blocks)
    values, vectors = jnp.linalg.eigh((blocks + jnp.swapaxes(blocks, 1, 2)) / 2)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    # One random direction tells the two apart. Where probabilities are near one, Q is a difference
    # of far larger numbers, so that only half of its digits can be asked for.
    probe = jax.random.rademacher(jax.random.key(0), shape, root.dtype)
    along = jnp.einsum("nij,nkj,nk->ni", root, root, probe)
    truth = weigh(probe.reshape(-1).astype(dtype)).reshape(shape).astype(root.dtype)
    rounding = max(float(jnp.finfo(x).eps) for x in (dtype, root.dtype)) ** 0.5
    separate = jnp.max(jnp.abs(along - truth)) <= rounding * jnp.max(jnp.abs(truth))
    return jnp.where(separate, root, jnp.eye(c, dtype=root.dtype)[None]), separate
