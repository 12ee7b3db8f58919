r"""Building blocks of the rules of a differentiable solution.

Programs that close over no array, tangents that may be zero, the batch as one more argument to
differentiate in, and the derivatives that are refused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Params, Stats, Vector
from bilevel.ground.status import failed
from bilevel.hypergradient.base import Response
from bilevel.inner.mixed import is_float
from bilevel.problem.conditions import Composite, FixedPoint, Root
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import unread_message


class Marks(NamedTuple):
    """Which solves make a derivative NaN: those that failed, and those that left more than a part
    of their right side as residual (``None``: any residual will do)."""

    failures: bool = True
    residual: float | None = None

    def apply(self, vector: Vector, result: jax.Array, stats: Stats, response: Response) -> Vector:
        """``vector``, or NaN where its solve is one of these."""
        if not self.failures:
            return vector
        bad = failed(result)
        if self.residual is not None:
            if "residual_norm" not in stats:
                raise ValueError(
                    f"`residual` judges linear solves, and {type(response).__name__} tells of "
                    "none: leave it out."
                )
            bad |= ~(stats["residual_norm"] <= self.residual * stats["rhs_norm"])
        return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), vector)


class Rest(NamedTuple):
    """What a response reads beside ``hparams``. Of these only ``inner_batch`` may move.

    ``closed_over`` holds the constants of each :class:`Program`.
    """

    inner_batch: Batch
    key: Any
    response: Any
    closed_over: Any


NAMES = Rest(
    "`inner_batch`",
    "`key`",
    "a number inside `response`",
    "a value that `inner` or `response` closes over",
)


class Program(NamedTuple):
    """A traced function of ``(vector, w, hparams, rest)``, without its constants.

    ``run(vector, w, hparams, rest, constants) -> leaves``.
    """

    run: Callable[..., list[Any]]
    constants: list[Any]


def close(
    function: Callable[..., Any],
    vector: Any,
    response: Response,
    w: Params,
    hparams: Hparams,
    inner_batch: Batch,
    key: Any,
) -> Program:
    """``function`` as a program that closes over no array.

    Traced once, so that everything that losses and operators close over becomes an argument: a
    custom rule that closes over tracers cannot be transformed inside ``scan``. The numbers in a
    response travel as a list: not every pytree can be rebuilt around JAX's placeholders.
    """
    carried = numbers_of(response)
    structure = jax.tree.structure(response)

    def flat(v: Any, w: Params, lam: Hparams, batch: Batch, key: Any, carried: list[Any]) -> Any:
        chosen = jax.tree.unflatten(structure, carried) if carried else response
        return function(v, chosen, w, lam, batch, key)

    closed = jax.make_jaxpr(flat)(vector, w, hparams, inner_batch, key, carried)
    jaxpr = closed.jaxpr
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    jaxpr = jaxpr.replace(constvars=[], invars=inputs, debug_info=info)
    call = core.jaxpr_as_fun(closed.replace(jaxpr=jaxpr, consts=[]))

    def run(vector: Any, w: Params, hparams: Hparams, rest: Rest, constants: Any) -> list[Any]:
        args = (vector, w, hparams, rest.inner_batch, rest.key, rest.response)
        return call(*constants, *jax.tree.leaves(args))

    return Program(run, [c if isinstance(c, jax.Array) else jnp.asarray(c) for c in closed.consts])


def numbers_of(response: Response) -> list[Any]:
    """The numbers in a response; that of somebody else need not be a pytree, and is closed over."""
    leaves = jax.tree.leaves(response)
    numbers = all(hasattr(x, "dtype") or isinstance(x, (float, int)) for x in leaves)
    return leaves if numbers else []


# --- the batch as an argument to differentiate in


def data_of(batch: Batch, leaves: list[Any] | None = None) -> list[Any]:
    """The floating leaves of a batch; or those of ``leaves`` that stand in their places."""
    own = jax.tree.leaves(batch)
    return [x for x, like in zip(leaves or own, own, strict=True) if is_float(like)]


def in_batch(data: list[Any], batch: Batch, otherwise: Callable[[Any], Any] = lambda x: x) -> Batch:
    """``batch`` with ``data`` as its floating leaves, and ``otherwise(leaf)`` as the others."""
    found = iter(data)
    return jax.tree.map(lambda x: next(found) if is_float(x) else otherwise(x), batch)


def can_move(batch: Batch) -> bool:
    """Whether a derivative in ``batch`` may still be asked: concrete arrays are constants."""
    return any(isinstance(x, Tracer) for x in data_of(batch))


def joined(problem: Problem) -> Problem:
    """The same inner problem, with ``(hparams, data)`` in place of its hyperparameters."""

    def reading(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Params, both: Any, batch: Batch) -> Any:
            hparams, data = both
            return function(params, hparams, in_batch(data, batch))

        return call

    inner = problem.inner
    if isinstance(inner, FixedPoint):
        return dataclasses.replace(problem, inner=FixedPoint(reading(inner.step)))
    if isinstance(inner, Root):
        return dataclasses.replace(problem, inner=Root(reading(inner.equation)))
    if isinstance(inner, Composite):

        def prox(params: Params, both: Any, step_size: Any) -> Params:
            return inner.prox(params, both[0], step_size)

        condition = Composite(reading(inner.loss), prox, inner.step_size)
        return dataclasses.replace(problem, inner=condition)
    return dataclasses.replace(problem, inner=reading(inner))


# --- tangents that may be zero


def is_zero(x: Any) -> bool:
    """Whether a tangent is zero by structure."""
    return isinstance(x, SymbolicZero)


def moves(tangents: Any) -> list[bool]:
    """For each leaf, whether it has a derivative at all."""
    leaves = jax.tree.leaves(tangents, is_leaf=is_zero)
    return [not is_zero(x) and getattr(x, "dtype", None) != jax.dtypes.float0 for x in leaves]


def filled(tangents: Any, like: Any) -> Any:
    """``tangents`` with runtime zeros for what does not move (constant ones: see `linear.cg`)."""

    def leaf(x: Any, y: Any) -> Any:
        return jax.lax.optimization_barrier(jnp.zeros_like(y)) if is_zero(x) else x

    return jax.tree.map(leaf, tangents, like, is_leaf=is_zero)


# --- what is refused


def refuse_other_derivatives(asked: Rest, batch: Batch, response: Response, data: bool) -> None:
    """Refuse derivatives in what is not a floating leaf of a batch.

    ``asked`` holds a list of booleans for each field, whether its leaves move; ``data`` says
    whether ``response`` gives derivatives in the batch.
    """
    if not data and any(asked.inner_batch):
        raise ValueError(
            "A derivative is asked with respect to `inner_batch`, which `with_response` does not "
            f"give for {name_of(response)}: its pullback is in `hparams` alone. Use "
            "`Implicit(...)` with one fixed batch, make it part of `hparams` (and let `inner` "
            "read it there), or cut it with `jax.lax.stop_gradient`."
        )
    leaves = jax.tree.leaves(batch)
    other = [a and not is_float(x) for a, x in zip(asked.inner_batch, leaves, strict=True)]
    if any(other):
        raise ValueError(
            "A derivative is asked with respect to a complex leaf of `inner_batch`: pass its real "
            "and its imaginary part as two leaves, and join them with `jax.lax.complex` inside "
            "`inner`; or cut it with `jax.lax.stop_gradient`."
        )
    for name, moving in zip(NAMES[1:], asked[1:], strict=True):
        if any(moving):
            raise ValueError(
                f"A derivative is asked with respect to {name}, which `with_response` does not "
                "give: the response differentiates with respect to `hparams` and `inner_batch`. "
                "Make it part of `hparams` (and let `inner` read it there), or cut it with "
                "`jax.lax.stop_gradient`."
            )


def refuse_unread(reads: list[bool], asked: list[bool], hparams: Hparams, batch: Batch) -> None:
    """Refuse leaves in which the derivative would be zero by structure."""
    of_hparams = [path for path, _ in tree.paths(hparams, "hparams")]
    of_batch = [path for path, x in tree.paths(batch, "inner_batch") if is_float(x)]
    dead = [
        name
        for name, a, r in zip([*of_hparams, *of_batch][: len(reads)], asked, reads, strict=True)
        if a and not r
    ]
    if any(name in of_batch for name in dead):
        raise ValueError(
            f"No derivative reaches {', '.join(dead)}: the gradient of `inner` does not depend on "
            "it differentiably, so the derivative would be zero by structure. Differentiate in "
            "the other leaves alone, or cut it with `jax.lax.stop_gradient` before `solve`."
        )
    if dead:
        raise ValueError(
            unread_message(dead, "the gradient of the inner loss does not depend on it")
            + " One that only your own outer loss reads need not go through `solve`."
        )


def name_of(response: Response) -> str:
    """A response in a message."""
    fresh = " with `fresh_batches=True`" if getattr(response, "fresh_batches", False) else ""
    return f"{type(response).__name__}{fresh}"


def first_order_only(response: Response) -> str:
    """What to say where a second derivative is asked of a response that has one."""
    return (
        f"`with_response` gives the first derivative only for {name_of(response)}, "
        "and a second one is asked (`jax.grad` of `jax.grad`, `jax.hessian`, `jax.jvp` of "
        "`jax.grad`): its pullback does not tell how it changes with `hparams`. Use "
        "`Implicit(...)` with one fixed batch and a loss without `jax.custom_vjp`, whose "
        "derivatives of every order are right, or take differences of the first derivative."
    )
