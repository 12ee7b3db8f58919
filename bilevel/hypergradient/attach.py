r"""A solution as a differentiable function of the hyperparameters: the rules of differentiation.

Both functions here are the identity on ``w``. :func:`attach_implicit` has derivatives of every
order, forward and reverse; :func:`attach_response` has the first derivative in reverse mode,
which is all that a response's pullback gives.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params, Vector
from bilevel.ground.status import failed
from bilevel.ground.traced import depends
from bilevel.hypergradient.base import Response
from bilevel.hypergradient.implicit import Implicit, responding, restricted
from bilevel.problem.two_losses import Point, Problem
from bilevel.problem.validate import unread_message


class _Rest(NamedTuple):
    """What a response reads and no derivative is given for."""

    inner_batch: Batch
    key: Any
    response: Any
    closed_over: Any


_NAMES = _Rest(
    "`inner_batch`",
    "`key`",
    "a number inside `response`",
    "a value that `inner` or `response` closes over",
)


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
    marked: bool,
) -> Params:
    r"""``w``, whose tangent along :math:`\dot\lambda` is :math:`-A^{-1}B\dot\lambda`.

    The rule evaluates A and B at the attached ``w``, not at its value. So a derivative of the
    rule sees ``w`` as a function of :math:`\lambda` again, to every order. ``marked``: NaN where
    a solve fails.
    """

    responds = responding(problem, w, hparams, inner_batch)

    def tangent(v: Hparams, response: Implicit, w: Params, lam: Hparams, batch: Batch, key: Any):
        return _implicit_tangent(problem, response, w, lam, batch, key, v, marked, responds)

    def mixed(q: Vector, w: Params, lam: Hparams, batch: Batch) -> Hparams:
        return problem.cross_vjp(w, lam, batch, q)

    run, rest = _closed(tangent, hparams, response, w, hparams, inner_batch, key)
    reads = jax.tree.leaves(depends(mixed, w, w, hparams, inner_batch))

    @jax.custom_jvp
    def attach(w: Params, hparams: Hparams, rest: _Rest) -> Params:
        return w

    @functools.partial(attach.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[Params, Vector]:
        w, hparams, rest = primals
        _, v, v_rest = tangents
        _refuse_other_derivatives([_moves(part) for part in v_rest])
        _refuse_unread(reads, _moves(v), hparams)
        w = attach(w, hparams, rest)
        out = run(_filled(v, hparams), w, hparams, rest)
        return w, jax.tree.unflatten(jax.tree.structure(w), out)

    return attach(w, hparams, rest)


def _implicit_tangent(
    problem: Problem,
    response: Implicit,
    w: Params,
    hparams: Hparams,
    batch: Batch,
    key: Any,
    v: Hparams,
    marked: bool,
    responds: Any,
) -> Vector:
    r""":math:`\dot w` of the block system, whose transpose is the pullback:

    .. math::
        \begin{pmatrix} A & B \\ 0 & I \end{pmatrix}
        \begin{pmatrix} \dot w \\ \mu \end{pmatrix}
        = \begin{pmatrix} 0 \\ \dot\lambda \end{pmatrix}, \qquad
        \begin{pmatrix} A^\top & 0 \\ B^\top & I \end{pmatrix}
        \begin{pmatrix} q \\ \bar\lambda \end{pmatrix}
        = \begin{pmatrix} \bar w \\ 0 \end{pmatrix}

    As one linear solve, JAX derives from it the derivatives of A and B alike, each with one more
    solve by the same solver, and the pullback keeps its cheap product :math:`B^\top q`.
    """

    problem = problem.settled(w, hparams, batch)

    # Bound where it is used and not once here: a scan over `solve` then keeps w and not the
    # residuals of a linearization for its backward pass.
    def product(q: Vector) -> Vector:
        return tree.cast_like(response.bind(problem, w, hparams, batch).forward(q), q)

    def inverse(g: Vector, adjoint: bool) -> Vector:
        system = response.bind(problem, w, hparams, batch)
        g = restricted(g, responds)
        q, (_, result, _) = system.solve(response.solver, g, None, key=key, adjoint=adjoint)
        return tree.cast_like(_nan_where(failed(result), q) if marked else q, g)

    def mixed(mu: Hparams, like: Vector) -> Vector:
        return tree.cast_like(problem.cross_jvp(w, hparams, batch, mu), like)

    def matvec(x: tuple[Vector, Hparams]) -> tuple[Vector, Hparams]:
        q, mu = _coupled(x)
        return _coupled((tree.add(product(q), mixed(mu, q)), mu))

    # Right sides may be partly zero, and must stay runtime values: see `linear.cg._start`.
    def solve(_: Any, b: tuple[Vector, Hparams]) -> tuple[Vector, Hparams]:
        g, mu = jax.lax.optimization_barrier(b)
        return inverse(tree.sub(g, mixed(mu, g)), adjoint=False), mu

    def transpose_solve(_: Any, b: tuple[Vector, Hparams]) -> tuple[Vector, Hparams]:
        g, mu = jax.lax.optimization_barrier(b)
        q = inverse(g, adjoint=True)
        return q, tree.sub(mu, problem.cross_vjp(w, hparams, batch, q))

    b = _coupled((tree.zeros_accumulated(w), v))
    w_dot, _ = _coupled(jax.lax.custom_linear_solve(matvec, b, solve, transpose_solve))
    return tree.cast_like(w_dot, w)


def _nan_where(condition: jax.Array, vector: Vector) -> Vector:
    return jax.tree.map(lambda x: jnp.where(condition, jnp.nan, x), vector)


def _coupled(vectors: Any) -> Any:
    """The identity, in which each leaf depends on every other as far as JAX can tell.

    JAX transposes a linear solve only if *every* leaf of its right side depends on what is
    differentiated, and fails where one is a symbolic zero. The transpose couples likewise.
    """
    # Not `0 * x`, which an infinity would turn into NaN.
    nothing = sum(
        jnp.sum(jax.lax.select(jnp.zeros(x.shape, bool), x, jnp.zeros_like(x)))
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
    marked: bool,
) -> Params:
    """``w``, whose pullback to ``hparams`` is the response's; a second derivative is refused."""

    def pull(g: Vector, response: Any, w: Params, lam: Hparams, batch: Batch, key: Any) -> Hparams:
        state = response.init(problem, w, lam)
        point, pullback = response.vjp(problem, w, lam, batch, state, key=key)
        if isinstance(point, Point):
            raise TypeError(
                f"{type(response).__name__} evaluates the outer loss itself, at a "
                f"{type(point).__name__} in place of parameters, and `with_response` has no outer "
                "loss. Use `hypergrad(outer, inner, response)`."
            )
        indirect, _, result, _ = pullback(g)
        return _nan_where(failed(result), indirect) if marked else indirect

    run, rest = _closed(pull, w, response, w, hparams, inner_batch, key)

    @jax.custom_jvp
    def pullback(g: Vector, w: Params, hparams: Hparams, rest: _Rest) -> list[Any]:
        return run(g, w, hparams, rest)

    @functools.partial(pullback.defjvp, symbolic_zeros=True)
    def linear(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        if any(_moves(tangents[1:])):
            raise TypeError(_first_order_only(response))
        return pullback(*primals), run(_filled(tangents[0], primals[0]), *primals[1:])

    @jax.custom_vjp
    def attach(w: Params, hparams: Hparams, rest: _Rest) -> Params:
        return w

    def forward(w: Any, hparams: Any, rest: Any) -> tuple[Params, Any]:
        def perturbed(part: Any) -> list[bool]:
            leaves = jax.tree.leaves(part, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
            return [leaf.perturbed for leaf in leaves]

        _refuse_other_derivatives([perturbed(part) for part in rest])
        asked = perturbed(hparams)
        w, hparams, rest = jax.tree.map(
            lambda x: x.value, (w, hparams, rest), is_leaf=lambda x: hasattr(x, "perturbed")
        )
        reads = depends(lambda g, *args: run(g, *args), w, w, hparams, rest)
        _refuse_unread(reads, asked, hparams)
        return w, (w, hparams, rest)

    def backward(values: Any, g: Vector) -> tuple[None, Hparams, None]:
        w, hparams, rest = values
        if not any(_moves(g)):
            return None, jax.tree.map(jnp.zeros_like, hparams), None
        out = pullback(_filled(g, w), w, hparams, rest)
        return None, jax.tree.unflatten(jax.tree.structure(hparams), out), None

    attach.defvjp(forward, backward, symbolic_zeros=True)
    return attach(w, hparams, rest)


def _closed(
    function: Callable[..., Any],
    vector: Any,
    response: Response,
    w: Params,
    hparams: Hparams,
    inner_batch: Batch,
    key: Any,
) -> tuple[Callable[..., list[Any]], _Rest]:
    """``function`` as ``run(vector, w, hparams, rest) -> leaves``, which closes over no array.

    Traced once, so that everything that losses and operators close over becomes an argument: a
    custom rule that closes over tracers cannot be transformed inside ``scan``. The numbers in a
    response travel as a list: not every pytree can be rebuilt around JAX's placeholders.
    """
    leaves, structure = jax.tree.flatten(response)
    # A response of somebody else need not be a pytree of numbers; then it is closed over.
    numbers = all(hasattr(x, "dtype") or isinstance(x, (float, int)) for x in leaves)
    carried = leaves if numbers else []

    def flat(v: Any, w: Params, lam: Hparams, batch: Batch, key: Any, carried: list[Any]) -> Any:
        chosen = jax.tree.unflatten(structure, carried) if numbers else response
        return function(v, chosen, w, lam, batch, key)

    closed = jax.make_jaxpr(flat)(vector, w, hparams, inner_batch, key, carried)
    jaxpr = closed.jaxpr
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    jaxpr = jaxpr.replace(constvars=[], invars=inputs, debug_info=info)
    call = jaxpr_as_fun(closed.replace(jaxpr=jaxpr, consts=[]))

    def run(vector: Any, w: Params, hparams: Hparams, rest: _Rest) -> list[Any]:
        args = (vector, w, hparams, rest.inner_batch, rest.key, rest.response)
        return call(*rest.closed_over, *jax.tree.leaves(args))

    consts = [c if isinstance(c, jax.Array) else jnp.asarray(c) for c in closed.consts]
    return run, _Rest(inner_batch, key, carried, consts)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _moves(tangents: Any) -> list[bool]:
    """For each leaf, whether it has a derivative at all."""
    leaves = jax.tree.leaves(tangents, is_leaf=_is_zero)
    return [not _is_zero(x) and getattr(x, "dtype", None) != jax.dtypes.float0 for x in leaves]


def _filled(tangents: Any, like: Any) -> Any:
    """``tangents`` with runtime zeros for what does not move (constant ones: see `linear.cg`)."""

    def leaf(x: Any, y: Any) -> Any:
        return jax.lax.optimization_barrier(jnp.zeros_like(y)) if _is_zero(x) else x

    return jax.tree.map(leaf, tangents, like, is_leaf=_is_zero)


def _refuse_other_derivatives(asked: list[list[bool]]) -> None:
    for name, leaves in zip(_NAMES, asked, strict=True):
        if any(leaves):
            raise ValueError(
                f"A derivative is asked with respect to {name}, which `with_response` does not "
                "give: the response differentiates with respect to `hparams` alone. Make it part "
                "of `hparams` (and let `inner` read it there), or cut it with "
                "`jax.lax.stop_gradient`."
            )


def _refuse_unread(reads: list[bool], asked: list[bool], hparams: Hparams) -> None:
    names = [path for path, _ in tree.paths(hparams, "hparams")]
    dead = [n for n, a, r in zip(names, asked, reads, strict=True) if a and not r]
    if dead:
        raise ValueError(
            unread_message(dead, "the gradient of the inner loss does not depend on it")
            + " One that only your own outer loss reads need not go through `solve`."
        )


def _first_order_only(response: Response) -> str:
    fresh = " with `fresh_batches=True`" if getattr(response, "fresh_batches", False) else ""
    return (
        f"`with_response` gives the first derivative only for {type(response).__name__}{fresh}, "
        "and a second one is asked (`jax.grad` of `jax.grad`, `jax.hessian`, `jax.jvp` of "
        "`jax.grad`): its pullback does not tell how it changes with `hparams`. Use "
        "`Implicit(...)` with one fixed batch and a loss without `jax.custom_vjp`, whose "
        "derivatives of every order are right, or take differences of the first derivative."
    )
