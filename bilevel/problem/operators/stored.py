r"""Products that read a matrix along its rows, where JAX's derivative reads it across them.

A backward pass contracts the activations a of a layer with the errors e over the examples,
:math:`aᵀ e`. XLA on CPU takes 1.2 times as long for that as for a product with :math:`aᵀ` stored
as a matrix of its own, more for few columns. What all products of a solve share is stored so
once; what changes is turned in each product, which takes less than it saves. Results that are there
to be transposed are made as their transposes.
"""

import math
from collections import Counter
from collections.abc import Callable, Container
from typing import Any

import jax

from bilevel.ground import tree
from bilevel.ground.aliases import Vector
from bilevel.problem.layers.program import PLAIN_CALLS, Op, Program, evaluate, trace


def with_stored(product: Callable[[Any], Vector], like: Any, room: Vector) -> Callable:
    """``product``, a linear function of arguments like ``like``, with its matrices turned.

    On CPU only. Cost: one trace; memory for the transposes of constants, where they fit in that
    of ``room``: otherwise those products stay as they are.
    """
    if jax.default_backend() != "cpu":
        return product
    program = trace(product, like, calls=PLAIN_CALLS)
    sides = _turned(program, sum(map(_bytes, jax.tree.leaves(room))))
    if not sides:
        return product
    across = _across(program, sides)
    # By constant and by how many of its numbers are contracted.
    stored: dict[tuple[int, int], jax.Array] = {}
    for op in program.ops:
        index = op.inputs[sides[op.outputs]] if op.outputs in sides else None
        if index in program.constants:
            stored[index, _rows(op)] = _turn(program.constants[index], op)

    def contract(op: Op, inputs: list[Any]) -> jax.Array:
        side = sides[op.outputs]
        turned = stored.get((op.inputs[side], _rows(op)))
        turned = _turn(inputs[side], op) if turned is None else turned
        names = ("precision", "preferred_element_type")
        made = jax.lax.dot_general(
            turned,
            _matrix(inputs[1 - side], op),
            (((1,), (0,)), ((), ())),
            **{name: op.eqn.params[name] for name in names},
        )
        if op.outputs[0] in across:
            return made if side == 1 else made.T
        return (made if side == 0 else made.T).reshape(op.eqn.outvars[0].aval.shape)

    instead: dict[tuple[int, ...], Callable] = dict.fromkeys(sides, contract)
    for op in filter(_is_transpose, program.ops):
        if op.inputs[0] in across:
            instead[op.outputs] = lambda op, inputs: inputs[0]

    def stored_product(v: Any) -> Vector:
        # The program has the casts of the types that it was traced with, and no others.
        return evaluate(program, jax.tree.leaves(tree.cast_like(v, like)), instead=instead)[0]

    return stored_product


def _turned(program: Program, room: int) -> dict[tuple[int, ...], int]:
    """By its outputs, for each product over examples, which of its two matrices is turned.

    The one whose columns become the rows of what is made, which may be the transpose of the result
    (:func:`_across`); or the one with a single column, which a reshape turns.
    """
    products = {op.outputs: op for op in program.ops if _over_examples(op)}
    across = _across(program, products)
    sides, constants = {}, {}
    for op in products.values():
        columns = [v.aval.size // _rows(op) for v in op.eqn.invars]
        side = 1 if op.outputs[0] in across else 0
        side = columns.index(1) if 1 in columns else side
        sides[op.outputs] = side
        index = op.inputs[side]
        if index in program.constants:
            constants[index, _rows(op)] = _bytes(program.constants[index])
    if sum(constants.values()) <= room:
        return sides
    inputs = {op.outputs: op.inputs for op in program.ops}
    known = program.constants
    return {at: side for at, side in sides.items() if inputs[at][side] not in known}


def _across(program: Program, products: Container[tuple[int, ...]]) -> set[int]:
    """Values that are there to be transposed and nothing else: these products, and sums of them.

    They are made as their transposes. A tangent of a product is a sum of two, and to transpose
    that would take as long as to make one of them.
    """
    reads = [*program.outputs, *(index for op in program.ops for index in op.inputs)]
    uses = Counter(index for index in reads if isinstance(index, int))  # the others are literals
    able: set[int] = set()
    for op in program.ops:
        parts = _is_sum(op) and all(isinstance(i, int) and i in able for i in op.inputs)
        if op.outputs in products or parts:
            able.update(index for index in op.outputs if uses[index] == 1)
    across = {op.inputs[0] for op in program.ops if _is_transpose(op) and op.inputs[0] in able}
    for op in reversed(program.ops):
        if _is_sum(op) and op.outputs[0] in across:
            across.update(op.inputs)
    return across


def _is_sum(op: Op) -> bool:
    return op.eqn.primitive.name in ("add_any", "add")


def _is_transpose(op: Op) -> bool:
    return op.eqn.primitive.name == "transpose" and op.eqn.params["permutation"] == (1, 0)


def _over_examples(op: Op) -> bool:
    """Whether the operation contracts the leading axes of two arrays that have others besides."""
    if op.eqn.primitive.name != "dot_general" or op.eqn.params["out_sharding"] is not None:
        return False
    contracted, batched = op.eqn.params["dimension_numbers"]
    leading = tuple(range(len(contracted[0])))
    return (
        not any(batched)
        and all(tuple(axes) == leading for axes in contracted)
        and all(v.aval.ndim > len(leading) > 0 and v.aval.size > 0 for v in op.eqn.invars)
    )


def _rows(op: Op) -> int:
    """How many numbers are contracted: the product of the leading axes of both arrays."""
    count = len(op.eqn.params["dimension_numbers"][0][0])
    return math.prod(op.eqn.invars[0].aval.shape[:count])


def _matrix(x: jax.Array, op: Op) -> jax.Array:
    """``x`` with the contracted axes as its rows."""
    return x.reshape(_rows(op), -1)


def _turn(x: jax.Array, op: Op) -> jax.Array:
    # Without the barrier XLA folds the transpose back into the product.
    return jax.lax.optimization_barrier(_matrix(x, op).T)


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize
