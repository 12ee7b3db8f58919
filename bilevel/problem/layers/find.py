"""Which parameters are kernels and biases of dense and convolutional layers: read off a program.

A kernel is a leaf of the parameters that reaches one ``dot_general`` or
``conv_general_dilated`` through changes of shape and type alone, and nothing else. A bias is one
that is added, in the same way, to what such an operation made, constant along all axes but
those of the units. Anything else (scales of a normalization, embeddings, kernels inside a loop or
in two layers) is no layer, and the reason is kept.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bilevel.problem.layers.program import Op, Program

TWICE = "it is read in more than one place"
PLACED = ("reshard", "sharding_constraint")  # a weight that is gathered where it is read
NOT_A_KERNEL = "it is no kernel or bias of a dense or convolutional layer"


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf after changes of shape: ``view(leaf)``, along whose axes ``varying`` it varies."""

    leaf: int
    shape: tuple[int, ...]
    varying: tuple[int, ...]
    apply: Callable[[jax.Array], jax.Array]

    def then(self, shape: tuple[int, ...], varying: Any, change: Callable) -> "View":
        """The view after one more change."""
        before = self.apply
        return View(self.leaf, tuple(shape), tuple(varying), lambda x: change(before(x)))

    @property
    def size(self) -> int:
        """Entries along the axes where the view varies."""
        return int(np.prod([self.shape[a] for a in self.varying], dtype=int))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense or convolutional layer, its inputs and outputs as matrices.

    Attributes:
      kind: ``"dense"`` or ``"conv"``.
      kernel: index of the kernel's leaf.
      bias: index of the bias' leaf, or None.
      inputs, outputs: indices of the values that are the operation's input and output.
      output_shape, output_dtype: of the operation's output.
      rows: lays an input out as ``(free..., in)``.
      columns: lays what is shaped like the output out as ``(free..., out)``.
      matrix: lays the kernel's leaf out as ``(in, out)``.
      vector: lays the bias' leaf out as ``(out,)``.
    """

    kind: str
    kernel: int
    bias: int | None
    inputs: Any
    outputs: int
    output_shape: tuple[int, ...]
    output_dtype: Any
    rows: Callable[[jax.Array], jax.Array]
    columns: Callable[[jax.Array], jax.Array]
    matrix: Callable[[jax.Array], jax.Array]
    vector: Callable[[jax.Array], jax.Array] | None = None


def find_layers(program: Program, leaves: list[Any]) -> tuple[tuple[Layer, ...], dict[int, str]]:
    """The layers, and for every other leaf of the parameters why it belongs to none."""
    views: dict[int, View] = {}
    for index, leaf in zip(program.arguments[: len(leaves)], range(len(leaves)), strict=True):
        shape = tuple(np.shape(leaves[leaf]))
        varying = (a for a, n in enumerate(shape) if n != 1)
        views[index] = View(leaf, shape, tuple(varying), lambda x: x)
    layers: dict[int, Layer] = {}  # by the index of the kernel's leaf
    made_by: dict[int, tuple[int, tuple[int, ...]]] = {}  # value -> (kernel's leaf, unit axes)
    refused: dict[int, str] = {}
    used: set[int] = set()

    def use(leaf: int, fits: bool) -> bool:
        if leaf in used:
            refused[leaf] = TWICE
        elif not fits:
            refused[leaf] = NOT_A_KERNEL
        used.add(leaf)
        return leaf not in refused

    for op in program.ops:
        read = [views.get(i) if isinstance(i, int) else None for i in op.inputs]
        found = [v for v in read if v is not None]
        if not found:
            _carry_outputs(op, made_by)
            continue
        changed = _changed(op, found[0]) if len(op.inputs) == 1 else None
        if changed is not None:
            views[op.outputs[0]] = changed
            continue
        layer = _layer(op, read) if len(found) == 1 else None
        if layer is not None and use(layer[0].kernel, True):
            layers[layer[0].kernel] = layer[0]
            made_by[op.outputs[0]] = (layer[0].kernel, layer[1])
            continue
        bias = _bias(op, read, made_by) if len(found) == 1 else None
        if bias is not None and layer is None and layers[bias[0]].bias is None:
            view, kernel = found[0], bias[0]
            if use(view.leaf, True):
                lay = _as_vector(view)
                layers[kernel] = dataclasses.replace(layers[kernel], bias=view.leaf, vector=lay)
            continue
        for view in found if layer is None else ():
            use(view.leaf, False)
    for index in program.outputs:  # a leaf handed out as it is
        if isinstance(index, int) and index in views:
            use(views[index].leaf, False)
    return _settled(layers, refused, len(leaves), used)


def _settled(
    layers: dict[int, Layer], refused: dict[int, str], count: int, used: set[int]
) -> tuple[tuple[Layer, ...], dict[int, str]]:
    """Layers whose kernel was refused later are none; so are biases without their kernel."""
    kept = []
    for kernel, layer in layers.items():
        if kernel in refused:
            continue
        if layer.bias in refused:
            layer = dataclasses.replace(layer, bias=None, vector=None)
        kept.append(layer)
    covered = {i for layer in kept for i in (layer.kernel, layer.bias) if i is not None}
    reasons = {i: refused.get(i, NOT_A_KERNEL) for i in range(count) if i not in covered}
    return tuple(kept), {i: r if i in used else "it is not read" for i, r in reasons.items()}


def _changed(op: Op, view: View) -> View | None:
    """The view after a change of shape or type, or None where the operation is another."""
    name, params = op.eqn.primitive.name, op.eqn.params
    shape = tuple(op.eqn.outvars[0].aval.shape)
    if name in ("convert_element_type", "copy", "reduce_precision", *PLACED):
        return view
    if name == "transpose":
        order = tuple(params["permutation"])
        varying = (i for i, a in enumerate(order) if a in view.varying)
        return view.then(shape, varying, lambda x: jax.lax.transpose(x, order))
    if name == "broadcast_in_dim":
        axes = tuple(params["broadcast_dimensions"])
        varying = (axes[a] for a in view.varying)
        return view.then(shape, varying, lambda x: jax.lax.broadcast_in_dim(x, shape, axes))
    if name in ("reshape", "squeeze", "expand_dims"):
        varying = _axes_after_reshape(view, shape)
        return None if varying is None else view.then(shape, varying, lambda x: x.reshape(shape))
    return None


def _axes_after_reshape(view: View, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the view varies in its new shape; None where that is no whole axis."""
    old = [a for a, n in enumerate(view.shape) if n != 1]
    new = [a for a, n in enumerate(shape) if n != 1]
    if [view.shape[a] for a in old] == [shape[a] for a in new]:
        return tuple(b for a, b in zip(old, new, strict=True) if a in view.varying)
    return tuple(new) if set(old) <= set(view.varying) else None


def _carry_outputs(op: Op, made_by: dict[int, Any]) -> None:
    """What a layer made is still its output after a change of type."""
    first = op.inputs[0] if op.inputs else None
    same = op.eqn.primitive.name == "convert_element_type"
    if same and isinstance(first, int) and first in made_by:
        made_by[op.outputs[0]] = made_by[first]


def _layer(op: Op, read: list[Any]) -> tuple[Layer, tuple[int, ...]] | None:
    """The layer that an operation is, and the axes of its units in what it makes."""
    name = op.eqn.primitive.name
    if name == "dot_general" and len(read) == 2:
        return _dense(op, read)
    if name == "conv_general_dilated" and read[1] is not None and read[0] is None:
        return _convolution(op, read[1])
    return None


def _dense(op: Op, read: list[Any]) -> tuple[Layer, tuple[int, ...]] | None:
    side = 0 if read[0] is not None else 1  # of the kernel
    view: View = read[side]
    contracted, batched = op.eqn.params["dimension_numbers"]
    if batched[0] or view.size != np.prod(view.shape, dtype=int):
        return None
    ins, along = tuple(contracted[side]), tuple(contracted[1 - side])
    outs = tuple(a for a in range(len(view.shape)) if a not in ins)
    x = op.eqn.invars[1 - side].aval
    free = tuple(a for a in range(x.ndim) if a not in along)
    out = op.eqn.outvars[0].aval
    count = len(outs)
    units = tuple(range(count)) if side == 0 else tuple(range(out.ndim - count, out.ndim))
    rest = tuple(a for a in range(out.ndim) if a not in units)

    def laid(axes: tuple[int, ...], last: tuple[int, ...]) -> Callable:
        def lay(x: jax.Array) -> jax.Array:
            lead = x.shape[: x.ndim - len(axes) - len(last)]
            skip = len(lead)
            order = (*range(skip), *(skip + a for a in (*axes, *last)))
            x = jnp.transpose(x, order)
            return x.reshape(*x.shape[: skip + len(axes)], -1)

        return lay

    def matrix(leaf: jax.Array) -> jax.Array:
        x = jnp.transpose(view.apply(leaf), (*ins, *outs))
        return x.reshape(int(np.prod([view.shape[a] for a in ins], dtype=int)), -1)

    layer = Layer(
        "dense",
        view.leaf,
        None,
        op.inputs[1 - side],
        op.outputs[0],
        out.shape,
        out.dtype,
        laid(free, along),
        laid(rest, units),
        matrix,
    )
    return layer, units


def _convolution(op: Op, view: View) -> tuple[Layer, tuple[int, ...]] | None:
    params = op.eqn.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    if view.size != np.prod(view.shape, dtype=int):
        return None
    numbers = params["dimension_numbers"]
    kernel_axes, out_axes = numbers.rhs_spec, numbers.out_spec  # (out, in, space), (N, C, space)
    window = tuple(view.shape[a] for a in kernel_axes[2:])
    out = op.eqn.outvars[0].aval

    def rows(x: jax.Array) -> jax.Array:
        return _patches(x, window, params)

    def columns(d: jax.Array) -> jax.Array:
        skip = d.ndim - len(out_axes)
        order = (out_axes[0], *out_axes[2:], out_axes[1])
        return jnp.transpose(d, (*range(skip), *(skip + a for a in order)))

    def matrix(leaf: jax.Array) -> jax.Array:
        x = jnp.transpose(view.apply(leaf), (*kernel_axes[1:], kernel_axes[0]))
        return x.reshape(-1, x.shape[-1])

    layer = Layer(
        "conv",
        view.leaf,
        None,
        op.inputs[0],
        op.outputs[0],
        out.shape,
        out.dtype,
        rows,
        columns,
        matrix,
    )
    return layer, (out_axes[1],)


def _patches(x: jax.Array, window: tuple[int, ...], params: Any) -> jax.Array:
    """(N, space..., in x window): what each output position sees, by slices of the padded input.

    JAX's own patches are a convolution in groups, which XLA on CPU does not do fast.
    """
    spec, strides = params["dimension_numbers"].lhs_spec, params["window_strides"]
    x = jnp.transpose(x, (spec[0], *spec[2:], spec[1]))
    margins = zip(params["padding"], params["lhs_dilation"], strict=True)
    config = [(0, 0, 0), *((low, high, d - 1) for (low, high), d in margins), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
    spread = params["rhs_dilation"]
    count = [
        (n - d * (w - 1) - 1) // s + 1
        for n, w, s, d in zip(x.shape[1:-1], window, strides, spread, strict=True)
    ]
    seen = []
    for offset in np.ndindex(*window):
        first = [o * d for o, d in zip(offset, spread, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, count, strides, strict=True)]
        start, limit = (0, *first, 0), (x.shape[0], *last, x.shape[-1])
        seen.append(jax.lax.slice(x, start, limit, (1, *strides, 1)))
    stacked = jnp.stack(seen, -1)  # (N, space..., in, window)
    return stacked.reshape(*stacked.shape[:-2], -1)


def _bias(op: Op, read: list[Any], made_by: dict[int, Any]) -> tuple[int, tuple] | None:
    """The layer whose bias is added here, by the leaf of its kernel."""
    if op.eqn.primitive.name not in ("add", "add_any") or len(read) != 2:
        return None
    side = 0 if read[0] is not None else 1
    view, other = read[side], op.inputs[1 - side]
    if isinstance(other, core.Literal) or other not in made_by:
        return None
    kernel, units = made_by[other]
    shape = op.eqn.invars[1 - side].aval.shape
    if op.eqn.outvars[0].aval.shape != shape:
        return None
    wanted = tuple(a for a in units if shape[a] != 1)
    same = set(view.varying) == set(wanted) and view.size == np.prod([shape[a] for a in wanted])
    return (kernel, units) if same and len(view.shape) == len(shape) else None


def _as_vector(view: View) -> Callable[[jax.Array], jax.Array]:
    def vector(leaf: jax.Array) -> jax.Array:
        x = view.apply(leaf)
        first = tuple(slice(None) if a in view.varying else 0 for a in range(x.ndim))
        return x[first].reshape(-1)

    return vector
