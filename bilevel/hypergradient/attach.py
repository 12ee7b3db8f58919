r"""A solution as a differentiable function of hyperparameters and data: the rules.

Both functions here are the identity on ``w``. :func:`attach_implicit` has derivatives of every
order, forward and reverse; :func:`attach_response` has the first derivative in reverse mode,
which is all that a response's pullback gives.

Each holds up to two programs: the rule for :math:`θ = λ`, and where the batch may move
one for :math:`θ = (λ, data)`. A derivative in hyperparameters alone never
pays for the second.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params, Vector
from bilevel.ground.traced import depends
from bilevel.hypergradient.base import Response
from bilevel.hypergradient.implicit import Implicit, responding, restricted
from bilevel.hypergradient.rules import (
    Marks,
    Program,
    Rest,
    can_move,
    close,
    data_of,
    filled,
    first_order_only,
    in_batch,
    is_zero,
    joined,
    moves,
    numbers_of,
    refuse_other_derivatives,
    refuse_unread,
)
from bilevel.problem.two_losses import Point, Problem


def differentiates_fully(response: Response) -> bool:
    """Whether :func:`attach_implicit` knows this response: the pullback of ``Implicit``, on one
    fixed matrix."""
    return (
        isinstance(response, Implicit)
        and type(response).vjp is Implicit.vjp
        and not response.fresh_batches
    )


def attach_implicit(
    problem: Problem,
    response: Implicit,
    w: Params,
    hparams: Hparams,
    inner_batch: Batch,
    key: Key | None,
    marks: Marks,
) -> Params:
    r"""``w``, whose tangent along :math:`\dot θ` is :math:`-A^{-1}B\dot θ`.

    The rule evaluates A and B at the attached ``w``, not at its value. So a derivative of the
    rule sees ``w`` as a function of :math:`θ` again, to every order.
    """

    def program(with_data: bool) -> tuple[Program, list[bool]]:
        cross = joined(problem) if with_data else problem

        def chosen(lam: Hparams, batch: Batch) -> Any:
            return (lam, data_of(batch)) if with_data else lam

        theta = chosen(hparams, inner_batch)
        responds = responding(cross, w, theta, inner_batch)

        def tangent(v: Any, response: Implicit, w: Params, lam: Hparams, batch: Batch, key: Any):
            system = _System(problem, response, w, lam, batch, key, with_data, chosen(lam, batch))
            return _implicit_tangent(system, v, marks, responds)

        def mixed(q: Vector, w: Params, theta: Any, batch: Batch) -> Any:
            return cross.cross_vjp(w, theta, batch, q)

        reads = jax.tree.leaves(depends(mixed, w, w, theta, inner_batch))
        return close(tangent, theta, response, w, hparams, inner_batch, key), reads

    programs = [program(with_data) for with_data in (False, True)[: 1 + can_move(inner_batch)]]
    rest = Rest(inner_batch, key, numbers_of(response), [p.constants for p, _ in programs])

    @jax.custom_jvp
    def attach(w: Params, hparams: Hparams, rest: Rest) -> Params:
        return w

    @functools.partial(attach.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[Params, Vector]:
        w, hparams, rest = primals
        _, v, v_rest = tangents
        batch = rest.inner_batch
        refuse_other_derivatives(Rest(*map(moves, v_rest)), batch, response, data=True)
        v_data = data_of(batch, jax.tree.leaves(v_rest.inner_batch, is_leaf=is_zero))
        with_data, asked = any(moves(v_data)), moves(v)
        v = filled(v, hparams)
        if with_data:
            asked += moves(v_data)
            v = v, filled(v_data, data_of(batch))
        (run, _), reads = programs[with_data]
        refuse_unread(reads, asked, hparams, batch)
        w = attach(w, hparams, rest)
        out = run(v, w, hparams, rest, rest.closed_over[with_data])
        return w, jax.tree.unflatten(jax.tree.structure(w), out)

    return attach(w, hparams, rest)


class _System(NamedTuple):
    """The point of one block system; ``with_data``, B is in hyperparameters and data."""

    problem: Problem
    response: Implicit
    w: Params
    hparams: Hparams
    batch: Batch
    key: Any
    with_data: bool
    theta: Any


def _implicit_tangent(at: _System, v: Any, marks: Marks, responds: Any) -> Vector:
    r""":math:`\dot w` of the block system, whose transpose is the pullback:

    .. math::
        \begin{pmatrix} A & B \\ 0 & I \end{pmatrix}
        \begin{pmatrix} \dot w \\ μ \end{pmatrix}
        = \begin{pmatrix} 0 \\ \dot λ \end{pmatrix},
        \begin{pmatrix} Aᵀ & 0 \\ Bᵀ & I \end{pmatrix}
        \begin{pmatrix} q \\ \bar λ \end{pmatrix}
        = \begin{pmatrix} \bar w \\ 0 \end{pmatrix}

    As one linear solve, JAX derives from it the derivatives of A and B alike, each with one more
    solve by the same solver, and the pullback keeps its cheap product :math:`Bᵀ q`.
    """

    problem = at.problem.settled(at.w, at.hparams, at.batch)
    cross = joined(problem) if at.with_data else problem

    # Bound where it is used and not once here: a scan over `solve` then keeps w and not the
    # residuals of a linearization for its backward pass.
    def product(q: Vector) -> Vector:
        system = at.response.bind(problem, at.w, at.hparams, at.batch)
        return tree.cast_like(system.forward(q), q)

    def inverse(g: Vector, adjoint: bool) -> Vector:
        system = at.response.bind(problem, at.w, at.hparams, at.batch)
        mv, right_side, back = system.equation(restricted(g, responds), adjoint=adjoint)
        z, result, stats = at.response.solver.solve(mv, right_side, None, key=at.key)
        return tree.cast_like(marks.apply(back(z), result, stats, at.response), g)

    def mixed(mu: Any, like: Vector) -> Vector:
        return tree.cast_like(cross.cross_jvp(at.w, at.theta, at.batch, mu), like)

    def matvec(x: tuple[Vector, Any]) -> tuple[Vector, Any]:
        q, mu = _coupled(x)
        return _coupled((tree.add(product(q), mixed(mu, q)), mu))

    # Right sides may be partly zero, and must stay runtime values: see `linear.cg._start`.
    def solve(_: Any, b: tuple[Vector, Any]) -> tuple[Vector, Any]:
        g, mu = jax.lax.optimization_barrier(b)
        return inverse(tree.sub(g, mixed(mu, g)), adjoint=False), mu

    def transpose_solve(_: Any, b: tuple[Vector, Any]) -> tuple[Vector, Any]:
        g, mu = jax.lax.optimization_barrier(b)
        q = inverse(g, adjoint=True)
        return q, tree.sub(mu, cross.cross_vjp(at.w, at.theta, at.batch, q))

    b = _coupled((tree.zeros_accumulated(at.w), v))
    w_dot, _ = _coupled(jax.lax.custom_linear_solve(matvec, b, solve, transpose_solve))
    return tree.cast_like(w_dot, at.w)


def tangent_in_data(
    problem: Problem,
    response: Implicit,
    w: Params,
    hparams: Hparams,
    batch: Batch,
    direction: list[Any],
    key: Key | None = None,
) -> Vector:
    r""":math:`\dot w = -A^{-1} ∂_{data} R v`: how the solution moves along its data.

    ``direction`` holds a tangent for each floating leaf of the batch, as ``data_of`` lists them.
    A function of w, the hyperparameters and the data that JAX may differentiate in all of them:
    an outer loss that reads sensitivities is one of the point like any other.
    """
    theta = (hparams, data_of(batch))
    responds = responding(joined(problem), w, theta, batch)
    system = _System(problem, response, w, hparams, batch, key, True, theta)
    # Runtime zeros: see `linear.cg._start`.
    still = jax.tree.map(lambda x: jax.lax.optimization_barrier(jnp.zeros_like(x)), hparams)
    return _implicit_tangent(system, (still, direction), Marks(), responds)


def _coupled(vectors: Any) -> Any:
    """The identity, in which each leaf depends on every other as far as JAX can tell.

    JAX transposes a linear solve only if *every* leaf of its right side depends on what is
    differentiated, and fails where one is a symbolic zero. The transpose couples likewise.
    """
    # Not `0 * x`, which an infinity would turn into NaN.
    nothing = sum(
        jnp.sum(jax.lax.select(jnp.zeros_like(x, bool), x, jnp.zeros_like(x)))
        for x in jax.tree.leaves(vectors)
    )
    return jax.tree.map(lambda x: x + jnp.asarray(nothing).astype(x.dtype), vectors)


def attach_response(
    problem: Problem,
    response: Response,
    w: Params,
    hparams: Hparams,
    inner_batch: Batch,
    key: Key | None,
    marks: Marks,
) -> Params:
    """``w``, whose pullback is the response's; a second derivative is refused.

    To the batch too for an ``Implicit`` on one fixed batch (whose loss has a backward rule of its
    own).
    """
    gives_data = differentiates_fully(response)

    def pull(g: Vector, response: Any, w: Params, lam: Hparams, batch: Batch, key: Any) -> Any:
        state = response.init(problem, w, lam)
        point, pullback = response.vjp(problem, w, lam, batch, state, key=key)
        if isinstance(point, Point):
            raise TypeError(
                f"{type(response).__name__} evaluates the outer loss itself, at a "
                f"{type(point).__name__} in place of parameters, and `with_response` has no outer "
                "loss. Use `hypergrad(outer, inner, response)`."
            )
        indirect, _, result, stats = pullback(g)
        return marks.apply(indirect, result, stats, response)

    def pull_to_both(
        g: Vector, response: Any, w: Params, lam: Hparams, batch: Batch, key: Any
    ) -> Any:
        here = problem.settled(w, lam, batch)
        cross, theta = joined(here), (lam, data_of(batch))
        g = restricted(g, responding(cross, w, theta, batch))
        mv, right_side, back = response.bind(here, w, lam, batch).equation(g)
        z, result, stats = response.solver.solve(mv, right_side, None, key=key)
        q = marks.apply(back(z), result, stats, response)
        return tree.scale(-1, cross.cross_vjp(w, theta, batch, q))

    pulls = (pull, pull_to_both)[: 1 + (gives_data and can_move(inner_batch))]
    programs = [close(p, w, response, w, hparams, inner_batch, key) for p in pulls]
    rest = Rest(inner_batch, key, numbers_of(response), [p.constants for p in programs])
    pullbacks = [_linear(program.run, response) for program in programs]

    @jax.custom_vjp
    def attach(w: Params, hparams: Hparams, rest: Rest) -> Params:
        return w

    def forward(w: Any, hparams: Any, rest: Any) -> tuple[Params, Any]:
        asked, moving = _perturbed(hparams), Rest(*map(_perturbed, rest))
        w, hparams, rest = jax.tree.map(
            lambda x: x.value, (w, hparams, rest), is_leaf=lambda x: hasattr(x, "perturbed")
        )
        batch = rest.inner_batch
        refuse_other_derivatives(moving, batch, response, gives_data)
        with_data = any(moving.inner_batch)
        if with_data:
            asked += data_of(batch, moving.inner_batch)
        constants = rest.closed_over[with_data]
        reads = depends(programs[with_data].run, w, w, hparams, rest, constants)
        refuse_unread(reads, asked, hparams, batch)
        # Which program it is, as the structure of a tree: that is known while tracing.
        return w, (w, hparams, rest, ((),) * with_data)

    def backward(values: Any, g: Vector) -> tuple[None, Hparams, Any]:
        w, hparams, rest, with_data = values
        if not any(moves(g)):
            return None, jax.tree.map(jnp.zeros_like, hparams), None
        which, (leaves, structure) = len(with_data), jax.tree.flatten(hparams)
        out = pullbacks[which](filled(g, w), w, hparams, rest, rest.closed_over[which])
        to_hparams = jax.tree.unflatten(structure, out[: len(leaves)])
        if not which:
            return None, to_hparams, None
        to_batch = in_batch(out[len(leaves) :], rest.inner_batch, lambda _: None)
        return None, to_hparams, Rest(to_batch, None, None, None)

    attach.defvjp(forward, backward, symbolic_zeros=True)
    return attach(w, hparams, rest)


def _perturbed(part: Any) -> list[bool]:
    leaves = jax.tree.leaves(part, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    return [leaf.perturbed for leaf in leaves]


def _linear(run: Callable[..., list[Any]], response: Response) -> Callable[..., list[Any]]:
    """A pullback that is linear in its cotangent, and refuses to be differentiated in the rest."""

    @jax.custom_jvp
    def pullback(g: Vector, *args: Any) -> list[Any]:
        return run(g, *args)

    @functools.partial(pullback.defjvp, symbolic_zeros=True)
    def linear(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        if any(moves(tangents[1:])):
            raise TypeError(first_order_only(response))
        return pullback(*primals), run(filled(tangents[0], primals[0]), *primals[1:])

    return pullback
