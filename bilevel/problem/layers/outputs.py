r"""The product :math:`u ↦ J D Jᵀ u` of a network, with no gradient of a dense layer's weights.

For a dense layer :math:`s = aW` the weights' part of it takes the gradients :math:`δ`
at the outputs to :math:`a (D ∘ aᵀδ)`; where D varies along one axis of W alone
that is :math:`(a diag(d) aᵀ) δ`, a product with a matrix of the batch's size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Params, Vector
from bilevel.ground.traced import BACKWARD_RULE, contains_primitive
from bilevel.problem.layers.find import Layer, find_layers
from bilevel.problem.layers.program import Program, evaluate, trace


def output_kernel(
    model: Callable[[Params], Any], params: Params, uniform: bool
) -> tuple[Callable[[Vector], Callable[[Any], Any]], float]:
    r"""``d -> (u -> J diag(d) J' u)``, and the share of the parameters that makes no gradient.

    With ``uniform`` each leaf of ``d`` is one number repeated; otherwise the numbers tell, at run
    time. Layers on more rows than inputs, for which nothing is saved, convolutions and other leaves
    go through their gradients.
    """
    program = trace(model, params)
    leaves = jax.tree.leaves(params)
    layers = tuple(
        layer for layer in find_layers(program, leaves)[0] if _is_worth_it(layer, leaves)
    )
    inside = {i for layer in layers for i in (layer.kernel, layer.bias) if i is not None}
    others = [i for i in range(len(leaves)) if i not in inside]
    inputs, push, pull = _linearized(program, layers, others, leaves)

    def kernel(d: Vector) -> Callable[[Any], Any]:
        scales = jax.tree.leaves(d)
        blocks = [
            _block(layer, x, scales, uniform) for layer, x in zip(layers, inputs, strict=True)
        ]

        def apply(u: Any) -> Any:
            deltas, gradients = pull(u)
            tangents = [block(delta) for block, delta in zip(blocks, deltas, strict=True)]
            scaled = [
                (scales[i] * g.astype(scales[i].dtype)).astype(g.dtype)
                for i, g in zip(others, gradients, strict=True)
            ]
            return push(tangents, scaled)

        return apply

    size = sum(np.size(leaf) for leaf in leaves)
    return kernel, 1 - sum(np.size(leaves[i]) for i in others) / max(size, 1)


def _is_worth_it(layer: Layer, leaves: list[Any]) -> bool:
    n_in, n_out = jax.eval_shape(layer.matrix, leaves[layer.kernel]).shape
    rows = int(np.prod(layer.output_shape, dtype=int)) // max(n_out, 1)
    return layer.kind == "dense" and 0 < rows <= n_in and n_out > 0


def _linearized(
    program: Program, layers: tuple[Layer, ...], others: list[int], leaves: list[Any]
) -> tuple[list[jax.Array], Callable[..., Any], Callable[[Any], Any]]:
    """Inputs of the layers, and the tangent map from layers' outputs and other leaves, both ways.

    The map back gives the gradients at the layers' outputs and in the other leaves.
    """

    def run(added: list[jax.Array], free: list[jax.Array]) -> Any:
        here = list(leaves)
        for index, leaf in zip(others, free, strict=True):
            here[index] = leaf
        extra = {layer.outputs: x for layer, x in zip(layers, added, strict=True)}
        return evaluate(program, here, extra, [layer.inputs for layer in layers])

    zeros = [jnp.zeros(layer.output_shape, layer.output_dtype) for layer in layers]
    free = [leaves[i] for i in others]
    if contains_primitive(lambda *a: run(*a)[0], zeros, free, prefix=BACKWARD_RULE):
        # The rule of the user's own has no tangent map but the transpose of its linear one.
        z, pull, inputs = jax.vjp(run, zeros, free, has_aux=True)
        forward = jax.linear_transpose(pull, z)
        return inputs, lambda t, v: forward((t, v))[0], pull
    _, push, inputs = jax.linearize(run, zeros, free, has_aux=True)
    return inputs, push, jax.linear_transpose(push, zeros, free)


def _block(
    layer: Layer, x: jax.Array, scales: list[jax.Array], uniform: bool
) -> Callable[[jax.Array], jax.Array]:
    """From the gradients at the layer's outputs to the tangents there, through its parameters."""
    a = tree.accumulate(layer.rows(x))
    a = a.reshape(-1, a.shape[-1])
    d = layer.matrix(scales[layer.kernel]).astype(a.dtype)
    bias = None
    if layer.vector is not None and layer.bias is not None:
        bias = layer.vector(scales[layer.bias]).astype(a.dtype)
    # Constant along one axis, d is the product of its first column and its first row.
    column, row = d[:, 0] / d[0, 0], d[0]
    separable = jnp.all(d == d[:1]) | jnp.all(d == d[:, :1])
    gram = (a * column[None]) @ a.T

    def by_gram(delta: jax.Array) -> jax.Array:
        return (gram @ delta) * row[None]

    def by_weights(delta: jax.Array) -> jax.Array:
        return a @ (d * (a.T @ delta))

    like = jax.ShapeDtypeStruct(layer.output_shape, a.dtype)
    lay_back = jax.linear_transpose(layer.columns, like)  # it only moves entries

    def apply(delta: jax.Array) -> jax.Array:
        laid = layer.columns(delta.astype(a.dtype))
        flat = laid.reshape(-1, laid.shape[-1])
        if uniform:
            made = by_gram(flat)
        else:
            made = jax.lax.cond(separable, by_gram, by_weights, flat)
        if bias is not None:
            made = made + (jnp.sum(flat, 0) * bias)[None]
        return lay_back(made.reshape(laid.shape))[0].astype(delta.dtype)

    return apply
