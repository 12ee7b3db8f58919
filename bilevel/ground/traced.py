"""What a traced program tells: which inputs an output depends on, which
primitives it contains. They cost one abstract trace and no arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

BACKWARD_RULE = "custom_vjp_call"
"""How the primitives of ``jax.custom_vjp`` begin: JAX pushes no tangent through them."""


def programs_within(eqn: Any) -> Iterator[Any]:
    """The traced programs that one operation holds: the body of a loop, the branches, a call."""
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
            eqn.primitive.name.startswith(prefix) or any(map(search, programs_within(eqn)))
            for eqn in jaxpr.eqns
        )

    return search(jax.make_jaxpr(function)(*args).jaxpr)


def _live(jaxpr: Any) -> list[Any]:
    """The operations of a traced program that some output needs, in their order."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, core.Literal)}
    return kept[::-1]


def pushes_tangents(function: Callable[..., Any], point: Any, tangent: Any) -> bool:
    """Whether JAX can push ``tangent`` through ``function`` at ``point``.

    It cannot through a backward rule of the user's own (``jax.custom_vjp``), and then raises while
    tracing, or leaves an operation behind that raises when it is compiled, unless nothing needs it.
    """

    def stuck(jaxpr: Any) -> bool:
        return any(
            eqn.primitive.name == "custom_lin" or any(map(stuck, programs_within(eqn)))
            for eqn in _live(jaxpr)
        )

    try:
        pushed = jax.make_jaxpr(lambda x, v: jax.jvp(function, (x,), (v,))[1])(point, tangent)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return False
    return not stuck(pushed.jaxpr)


def _masks(
    jaxpr: Any, inputs: list[bool], blocked: Callable[[Any], bool] | None = None
) -> list[bool]:
    """Which outputs depend on the marked inputs, through loops, branches and calls."""
    marked = dict(zip(jaxpr.invars, inputs, strict=True))

    def mark(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and marked.get(atom, False)

    for eqn in jaxpr.eqns:
        incoming = [mark(atom) for atom in eqn.invars]
        if not any(incoming) or (blocked is not None and blocked(eqn)):
            continue
        outgoing = _through(eqn, incoming, blocked)
        marked.update({v: m for v, m in zip(eqn.outvars, outgoing, strict=True) if m})
    return [mark(atom) for atom in jaxpr.outvars]


def _through(
    eqn: Any, incoming: list[bool], blocked: Callable[[Any], bool] | None
) -> Sequence[bool]:
    """Which outputs of one operation depend on its marked inputs.

    Operations whose programs are not understood pass everything on.
    """
    name, bodies, everything = (
        eqn.primitive.name,
        list(programs_within(eqn)),
        [True] * len(eqn.outvars),
    )
    if name == "scan" and len(bodies) == 1:
        return _scan_masks(eqn, bodies[0], incoming, blocked)
    if name == "while":
        return _while_masks(eqn, incoming, blocked)
    if name == "cond":
        if incoming[0]:  # which branch is taken
            return everything
        found = [_masks(body, incoming[1:], blocked) for body in bodies]
        return [any(marks) for marks in zip(*found, strict=True)]
    is_call = (
        len(bodies) == 1
        and len(bodies[0].invars) == len(eqn.invars)
        and len(bodies[0].outvars) == len(eqn.outvars)
        and not name.startswith("reduce")  # its body sees two elements at a time, again and again
    )
    return _masks(bodies[0], incoming, blocked) if is_call else everything


def _until_stable(
    carried: list[bool], step: Callable[[list[bool]], list[bool]]
) -> tuple[list[bool], list[bool]]:
    """Marks of a loop's carry after any number of iterations, and all marks of the last."""
    while True:
        out = step(carried)
        new = [a or b for a, b in zip(carried, out, strict=False)]
        if new == carried:
            return carried, out
        carried = new


def scan_counts(eqn: Any, body: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are its carry."""

    # What is scanned over has one axis less inside; how the parameters of the equation name
    # these counts is not the same in all versions of JAX.
    def scanned(outside: Any, inside: Any) -> int:
        return sum(a.aval.ndim != b.aval.ndim for a, b in zip(outside, inside, strict=True))

    num_carry = len(eqn.outvars) - scanned(eqn.outvars, body.outvars)
    return len(eqn.invars) - scanned(eqn.invars, body.invars) - num_carry, num_carry


def _scan_masks(eqn: Any, body: Any, incoming: list[bool], blocked: Any) -> list[bool]:
    num_consts, num_carry = scan_counts(eqn, body)
    consts, scanned = incoming[:num_consts], incoming[num_consts + num_carry :]
    carried, out = _until_stable(
        incoming[num_consts : num_consts + num_carry],
        lambda carried: _masks(body, [*consts, *carried, *scanned], blocked),
    )
    return [*carried, *out[num_carry:]]


def _while_masks(eqn: Any, incoming: list[bool], blocked: Any) -> list[bool]:
    test, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    num_carry = len(eqn.outvars)
    num_test, num_body = len(test.invars) - num_carry, len(body.invars) - num_carry
    of_test, of_body = incoming[:num_test], incoming[num_test : num_test + num_body]

    def step(carried: list[bool]) -> list[bool]:
        if any(_masks(test, [*of_test, *carried], blocked)):  # how often it runs
            return [True] * num_carry
        return _masks(body, [*of_body, *carried], blocked)

    return _until_stable(incoming[num_test + num_body :], step)[0]


def depends(
    function: Callable[..., Any], *args: Any, blocked: Callable[[Any], bool] | None = None
) -> Any:
    """For each output leaf of ``function(*args)``: does it depend on the *first* argument?

    Static and conservative: False means that no chain of operations leads there, so a
    derivative, which is linear in the first argument when that is a tangent, is zero. A loop
    is taken to run any number of times. Operations for which ``blocked(equation)`` holds pass
    nothing on, wherever they stand.
    """
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(*args)
    first = len(jax.tree.leaves(args[0]))
    inputs = [i < first for i in range(len(closed.jaxpr.invars))]
    return jax.tree.unflatten(jax.tree.structure(out_shape), _masks(closed.jaxpr, inputs, blocked))


def reaching(
    function: Callable[..., Any], *args: Any, blocked: Callable[[Any], bool] | None = None
) -> Any:
    """For each leaf of the *first* argument: does any output of ``function(*args)`` depend on it?

    Of one trace; otherwise as :func:`depends`.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    leaves, treedef = jax.tree.flatten(args[0])
    indices = range(len(jaxpr.invars))
    found = [any(_masks(jaxpr, [i == j for j in indices], blocked)) for i in range(len(leaves))]
    return jax.tree.unflatten(treedef, found)


COSTLY = (
    *("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated", "fft", "sort"),
    *("cholesky", "eig", "eigh", "lu", "householder_product", "qr", "schur", "svd"),
    *("triangular_solve", "tridiagonal_solve", "custom_linear_solve", "scan", "while", "cond"),
    *(BACKWARD_RULE, "pallas_call", "ffi_call", "pure_callback"),
)
"""Primitives that are, or may contain, more than a pass over their inputs."""


def is_costly(eqn: Any) -> bool:
    """Whether an operation is more than a pass over its inputs."""
    return eqn.primitive.name in COSTLY


def reaches(function: Callable[..., Any], *args: Any, where: Callable[[Any], bool]) -> bool:
    """Whether an operation for which ``where(equation)`` holds reads the *first* argument.

    Directly or by other operations; conservative as :func:`depends`.
    """
    found = []

    def asked(eqn: Any) -> bool:
        found.append(where(eqn))
        return found[-1]

    depends(function, *args, blocked=asked)
    return any(found)
