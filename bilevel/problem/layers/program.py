"""A traced model as one flat list of operations, run again with something added on the way."""

from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.extend import core

from bilevel.ground.traced import programs_within

PLAIN_CALLS = ("jit", "pjit", "closed_call", "core_call")
CALLS = (*PLAIN_CALLS, "checkpoint", "remat", "remat2")
"""Operations that only hold a program: it is written out in their place."""


class Op(NamedTuple):
    """One operation: its equation, and which values it reads and writes.

    An input is the index of a value, or a literal itself.
    """

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class Program(NamedTuple):
    """A flat program.

    Attributes:
      arguments: the indices of the arguments' leaves.
      constants: values by index.
      ops: in the order in which they run.
      outputs: indices of the outputs, or literals.
      treedef: structure of the outputs.
      names: what JAX calls the parts of the program.
    """

    arguments: tuple[int, ...]
    constants: dict[int, Any]
    ops: tuple[Op, ...]
    outputs: tuple[Any, ...]
    treedef: Any
    names: Any


def trace(function: Callable[..., Any], *args: Any, calls: Container[str] = CALLS) -> Program:
    """``function(*args)`` as a flat program; ``calls`` are written out, loops stay whole."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    constants: dict[int, Any] = {}
    ops: list[Op] = []
    size = 0

    def new() -> int:
        nonlocal size
        size += 1
        return size - 1

    def inline(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        known: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            known[var] = new()
            constants[known[var]] = value

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            incoming = [read(atom) for atom in eqn.invars]
            bodies = list(programs_within(eqn))
            if eqn.primitive.name in calls and len(bodies) == 1:
                body = bodies[0]
                outgoing = inline(body, _constants_of(eqn), incoming)
            else:
                outgoing = [new() for _ in eqn.outvars]
                ops.append(Op(eqn, tuple(incoming), tuple(outgoing)))
            known.update(zip(eqn.outvars, outgoing, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    arguments = [new() for _ in closed.jaxpr.invars]
    outputs = inline(closed.jaxpr, closed.consts, arguments)
    treedef = jax.tree.structure(shape)
    names = closed.jaxpr.debug_info
    return Program(tuple(arguments), constants, tuple(ops), tuple(outputs), treedef, names)


def _constants_of(eqn: Any) -> Sequence[Any]:
    for value in eqn.params.values():
        if isinstance(value, core.ClosedJaxpr):
            return value.consts
    return ()


def evaluate(
    program: Program,
    leaves: Sequence[Any],
    added: Mapping[int, Any] = MappingProxyType({}),
    kept: Sequence[Any] = (),
    instead: Mapping[tuple[int, ...], Callable[..., Any]] = MappingProxyType({}),
) -> tuple[Any, list[Any]]:
    """Outputs of the program, and the values at the indices ``kept``.

    ``added`` holds what is added to values, by index; ``instead`` functions of an operation and
    its inputs that compute its one output in its place, by ``outputs`` of the operation.
    """
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.arguments, leaves, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for op in program.ops:
        inputs = [read(atom) for atom in op.inputs]
        other = instead.get(op.outputs)
        made = [other(op, inputs)] if other else _run(op.eqn, inputs, program.names)
        for index, value in zip(op.outputs, made, strict=True):
            values[index] = value + added[index] if index in added else value
    outputs = jax.tree.unflatten(program.treedef, [read(atom) for atom in program.outputs])
    return outputs, [read(atom) for atom in kept]


def _run(eqn: Any, inputs: Sequence[Any], names: Any) -> Sequence[Any]:
    """One operation; one with a program inside as a program of its own, so that custom
    derivatives stay whole.
    """
    if not any(programs_within(eqn)):
        made = eqn.primitive.bind(*inputs, **eqn.params)
        return made if eqn.primitive.multiple_results else [made]
    given = {v: x for v, x in zip(eqn.invars, inputs, strict=True) if isinstance(v, core.Var)}
    names = names._replace(arg_names=("",) * len(given), result_paths=("",) * len(eqn.outvars))
    alone = core.Jaxpr((), list(given), list(eqn.outvars), [eqn], eqn.effects, names)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
