"""Questions that a traced program answers: which inputs an output depends on, which
primitives it contains. They cost one abstract trace and no arithmetic.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def _subjaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def contains_primitive(function: Callable[..., Any], *args: Any, prefix: str) -> bool:
    """Whether the traced program has a primitive whose name starts with ``prefix``."""

    def search(jaxpr: Any) -> bool:
        return any(
            eqn.primitive.name.startswith(prefix) or any(map(search, _subjaxprs(eqn)))
            for eqn in jaxpr.eqns
        )

    return search(jax.make_jaxpr(function)(*args).jaxpr)


def _masks(
    jaxpr: Any, inputs: list[bool], blocked: Callable[[Any], bool] | None = None
) -> list[bool]:
    """Which outputs depend on the marked inputs; loops and branches count as one operation."""
    marked = dict(zip(jaxpr.invars, inputs, strict=True))

    def mark(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and marked.get(atom, False)

    for eqn in jaxpr.eqns:
        incoming = [mark(atom) for atom in eqn.invars]
        if not any(incoming) or (blocked is not None and blocked(eqn)):
            continue
        bodies = list(_subjaxprs(eqn))
        one_to_one = (
            len(bodies) == 1
            and len(bodies[0].invars) == len(eqn.invars)
            and len(bodies[0].outvars) == len(eqn.outvars)
            and eqn.primitive.name not in ("scan", "while")
        )
        outgoing = _masks(bodies[0], incoming, blocked) if one_to_one else [True] * len(eqn.outvars)
        marked.update({v: m for v, m in zip(eqn.outvars, outgoing, strict=True) if m})
    return [mark(atom) for atom in jaxpr.outvars]


def depends(
    function: Callable[..., Any], *args: Any, blocked: Callable[[Any], bool] | None = None
) -> Any:
    """For each output leaf of ``function(*args)``: does it depend on the *first* argument?

    Static and conservative: False means that no chain of operations leads there, so a
    derivative, which is linear in the first argument when that is a tangent, is zero.
    Operations for which ``blocked(equation)`` holds pass nothing on.
    """
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(*args)
    first = len(jax.tree.leaves(args[0]))
    inputs = [i < first for i in range(len(closed.jaxpr.invars))]
    return jax.tree.unflatten(jax.tree.structure(out_shape), _masks(closed.jaxpr, inputs, blocked))
