r"""Derivatives of an optimizer's update where a second moment is exactly zero.

Adam divides by :math:`\sqrt v`, and where a gradient has always been exactly zero (a dead
unit, a padded input) automatic differentiation multiplies the infinite slope of the root by
the zero of the first moment. With :math:`m = (1 - b_1) g` and :math:`v = (1 - b_2) g^2` the
update is a function of g whose derivative at zero exists: the term through the root vanishes.
So, inside an update and nowhere else, roots have slope zero at exactly zero.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevel.ground.traced import programs_within, scan_counts


def _flat_at_zero(
    root: Callable[[jax.Array], jax.Array], slope: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[..., jax.Array]:
    """``root`` with slope zero at exactly zero; ``slope(x, root(x))`` elsewhere."""

    @jax.custom_jvp
    def function(x):
        return root(x)

    @function.defjvp
    def _(primals, tangents):
        (x,), (dx,) = primals, tangents
        value, elsewhere = function(x), x != 0
        there = slope(jnp.where(elsewhere, x, 1), jnp.where(elsewhere, value, 1))
        # A product with zero and not a selection: a tangent that is NaN stays NaN.
        return value, dx * jnp.where(elsewhere, there, 0)

    return lambda x, **_: function(x)


@jax.custom_jvp
def _power(x, y):
    return jax.lax.pow(x, y)


@_power.defjvp
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    steep = (x == 0) & (y < 1)
    _, tangent = jax.jvp(
        jax.lax.pow, (jnp.where(steep, 1, x), y), (dx * jnp.where(steep, 0, 1).astype(x.dtype), dy)
    )
    return _power(x, y), tangent


_ROOTS: dict[str, Callable[..., jax.Array]] = {
    "sqrt": _flat_at_zero(jax.lax.sqrt, lambda x, y: 0.5 / y),
    "rsqrt": _flat_at_zero(jax.lax.rsqrt, lambda x, y: -0.5 * y / x),
    "cbrt": _flat_at_zero(jax.lax.cbrt, lambda x, y: y / (3 * x)),
    "pow": lambda x, y, **_: _power(x, y),
}


def flat_roots(
    function: Callable[..., Any], unless: Callable[[], bool] = lambda: False
) -> Callable[..., Any]:
    """``function`` with roots whose derivative at exactly zero is zero; its values are the same.

    Reaches into loops, branches and jitted functions; a ``custom_jvp`` or ``custom_vjp`` keeps
    its own rule. ``unless()``, asked after the function was traced, leaves it as it is. Costs
    one more abstract trace, and nothing at run time.
    """

    def call(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        if unless() or not _has_root(closed.jaxpr):
            return function(*args)
        out = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return call


def _has_root(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _ROOTS or any(map(_has_root, programs_within(eqn)))
        for eqn in jaxpr.eqns
    )


def _evaluate(jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
    """The outputs of a traced program, with :data:`_ROOTS` in place of its roots."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        out = _apply(jaxpr, eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _closed(program: Any) -> Callable[..., list[Any]]:
    if isinstance(program, core.ClosedJaxpr):
        return functools.partial(_evaluate, program.jaxpr, program.consts)
    return functools.partial(_evaluate, program, ())


def _apply(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """The outputs of one equation of ``jaxpr``."""
    name, params = eqn.primitive.name, eqn.params
    if name in _ROOTS:
        return [_ROOTS[name](*values)]
    if any(map(_has_root, programs_within(eqn))):
        if name in ("jit", "pjit", "closed_call", "core_call"):
            return _closed(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])(*values)
        if name in ("checkpoint", "remat", "remat2"):
            return jax.checkpoint(_closed(params["jaxpr"]))(*values)
        if name == "cond":
            return jax.lax.switch(values[0], [_closed(b) for b in params["branches"]], *values[1:])
        if name == "scan":
            return _scan(eqn, values)
        if name == "while":
            return _while(eqn, values)
    inputs = {
        atom: value
        for atom, value in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, core.Literal)
    }
    alone = jaxpr.replace(constvars=[], invars=[*inputs], outvars=eqn.outvars, eqns=[eqn])
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values())


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    body = _closed(eqn.params["jaxpr"])
    num_consts, num_carry = scan_counts(eqn, eqn.params["jaxpr"].jaxpr)
    consts, rest = values[:num_consts], values[num_consts:]

    def step(carry: list[Any], scanned: list[Any]) -> tuple[list[Any], list[Any]]:
        out = body(*consts, *carry, *scanned)
        return out[:num_carry], out[num_carry:]

    carry, stacked = jax.lax.scan(
        step,
        rest[:num_carry],
        rest[num_carry:],
        **{k: eqn.params[k] for k in ("length", "reverse", "unroll")},
    )
    return [*carry, *stacked]


def _while(eqn: Any, values: list[Any]) -> list[Any]:
    test, body = _closed(eqn.params["cond_jaxpr"]), _closed(eqn.params["body_jaxpr"])
    start = len(values) - len(eqn.outvars)
    split = len(eqn.params["cond_jaxpr"].jaxpr.invars) - len(eqn.outvars)
    of_test, of_body = values[:split], values[split:start]
    return jax.lax.while_loop(
        lambda carry: test(*of_test, *carry)[0],
        lambda carry: body(*of_body, *carry),
        values[start:],
    )
