r"""The door for a solver of the user's own: ``jax.grad`` sees through it by a response."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, Loss, Params, Vector
from bilevel.checks import (
    check_batch,
    check_inexact,
    check_inner,
    check_response,
    check_same_tree,
    unread_message,
)
from bilevel.hypergradient.base import Response
from bilevel.problem import Problem
from bilevel.traced import depends


def with_response(
    solve: Callable[[Params, Hparams, Batch], Params], inner: Loss, response: Response
) -> Callable[..., Params]:
    r"""``solve``, made differentiable with respect to the hyperparameters.

    .. math::
        w = \mathrm{solve}(w_0, \lambda, \mathrm{batch}), \qquad
        \bar\lambda = \Bigl(\frac{\partial w}{\partial\lambda}\Bigr)^\top \bar w,
        \qquad \bar w_0 = 0

    Args:
      solve: ``solve(params, hparams, inner_batch) -> params``, from a start to (near) a
        minimiser of ``inner``. It is only called, never differentiated: outside ``jit`` it may
        be ordinary Python (a loop with an early stop, another library), inside it must trace.
      inner: the loss that ``solve`` minimises, ``inner(params, hparams, batch) -> scalar``.
      response: applied at the point that ``solve`` returns, e.g. ``Implicit(CG())``. It starts
        cold in every call.

    Returns:
      ``fn(params, hparams, inner_batch, *, key=None) -> params``, with the values of ``solve``.
      ``key`` goes to a response that draws random numbers. The derivative with respect to the
      starting ``params`` is zero, because a minimiser does not know where the search began.

    Reverse mode only (``jax.grad``, ``jax.vjp``, ``jax.jacrev``), under ``jit``, ``vmap`` and
    ``scan``. **Inside automatic differentiation there is no place for a status**: whether the
    linear solve converged, or ``solve`` itself did, is not reported. Use
    :func:`~bilevel.hypergrad_solve` to see it.

    Raises:
      TypeError, ValueError: for trees, dtypes and shapes that do not fit; when a derivative is
        asked with respect to ``inner_batch``, ``key``, or a value that ``inner`` or ``response``
        closes over (the answer would silently be wrong); and for a hyperparameter that the
        response cannot see, whose derivative would be zero by structure.

    Cost: that of ``solve``, and for each derivative what ``response`` costs.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def ridge(w, lam, batch):
      ...     x, y = batch
      ...     return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * lam * jnp.sum(w**2)
      >>> def exact(w, lam, batch):
      ...     x, y = batch
      ...     return jnp.linalg.solve(x.T @ x + lam * jnp.eye(x.shape[1]), x.T @ y)
      >>> solve = bilevel.with_response(exact, ridge, bilevel.Implicit(bilevel.Dense()))
      >>> x, y = jnp.eye(2), jnp.array([1.0, 2.0])
      >>> g = jax.grad(lambda lam: jnp.sum(solve(jnp.zeros(2), lam, (x, y))))(1.0)
      >>> bool(jnp.allclose(g, -0.75))
      True

    Reference: Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022
    (``custom_root``); here for any response, and with the inner loss as the condition.
    """
    for name, function in (("solve", solve), ("inner", inner)):
        if not callable(function):
            raise TypeError(f"`{name}` must be callable, got {function!r}.")
    check_response(response)
    problem = Problem(outer=_no_outer, inner=inner)

    def solved(
        params: Params, hparams: Hparams, inner_batch: Batch, *, key: Key | None = None
    ) -> Params:
        check_inexact(params, "params", "Split the model into its trainable floats and the rest.")
        check_inexact(hparams, "hparams", "A gradient exists for real numbers only.")
        check_batch(inner_batch, "inner_batch")
        hparams = jax.tree.map(jnp.asarray, hparams)
        if not getattr(response, "fresh_batches", False):
            check_inner(problem, params, hparams, inner_batch)
        # Cut here and not around the call: `solve` then runs on plain values, is never
        # differentiated, and may close over tracers as any other function.
        start, fixed, batch = jax.lax.stop_gradient((params, hparams, inner_batch))
        w = jax.lax.stop_gradient(solve(start, fixed, batch))
        check_same_tree(w, params, "the result of `solve`")
        w = jax.tree.map(jnp.asarray, w)
        return _attach(problem, response, w, hparams, inner_batch, key)

    return solved


def _no_outer(*_: Any) -> Any:
    raise TypeError("`with_response` has no outer loss: a response may read `inner` only.")


class _Rest(NamedTuple):
    """What a pullback reads and no derivative is given for."""

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


def _attach(
    problem: Problem,
    response: Response,
    w: Params,
    hparams: Hparams,
    inner_batch: Batch,
    key: Key | None,
) -> Params:
    """The identity on ``w``, whose pullback to ``hparams`` is the response's."""

    # A response of somebody else need not be a pytree; then it is closed over like a loss.
    plain = all(isinstance(x, (jax.Array, float, int)) for x in jax.tree.leaves(response))
    carried = response if plain else None

    def pull(g: Vector, w: Params, hparams: Hparams, batch: Batch, key: Any, carried: Any):
        chosen = response if carried is None else carried
        state = chosen.init(problem, w, hparams)
        return chosen.vjp(problem, w, hparams, batch, state, key=key)[1](g)[0]

    # Traced once, so that everything that losses and operators close over becomes an
    # argument: a custom rule that closes over tracers cannot be transformed inside `scan`.
    closed = jax.make_jaxpr(pull)(w, w, hparams, inner_batch, key, carried)
    structure = jax.tree.structure(hparams)
    run = jaxpr_as_fun(closed.replace(jaxpr=_consts_as_inputs(closed), consts=[]))

    @jax.custom_vjp
    def identity(w: Params, hparams: Hparams, rest: Any) -> Params:
        return w

    def forward(w: Any, hparams: Any, rest: Any) -> tuple[Params, Any]:
        _refuse_other_derivatives(rest)
        values = jax.tree.map(
            lambda x: x.value, (w, hparams, rest), is_leaf=lambda x: hasattr(x, "perturbed")
        )
        perturbed = [x.perturbed for x in _primals(hparams)]
        _refuse_unread(run, values, perturbed, structure)
        return values[0], values

    def backward(values: Any, g: Vector) -> tuple[None, Hparams, None]:
        w, hparams, rest = values
        zero = [isinstance(x, SymbolicZero) for x in jax.tree.leaves(g, is_leaf=_is_zero)]
        if all(zero):
            return None, jax.tree.map(jnp.zeros_like, hparams), None
        # A partly zero cotangent must stay a runtime value, as a zero start of `CG`.
        g = jax.tree.map(
            lambda x, y: jax.lax.optimization_barrier(jnp.zeros_like(y)) if _is_zero(x) else x,
            g,
            w,
            is_leaf=_is_zero,
        )
        out = _evaluate(run, g, w, hparams, rest)
        return None, jax.tree.unflatten(structure, out), None

    identity.defvjp(forward, backward, symbolic_zeros=True)
    rest = _Rest(inner_batch, key, carried, closed.consts)
    return identity(w, hparams, rest)


def _consts_as_inputs(closed: Any) -> Any:
    jaxpr = closed.jaxpr
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], debug_info=info)


def _evaluate(run: Callable, g: Vector, w: Params, hparams: Hparams, rest: _Rest) -> list[Any]:
    inputs = (g, w, hparams, rest.inner_batch, rest.key, rest.response)
    return run(*rest.closed_over, *jax.tree.leaves(inputs))


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _primals(x: Any) -> list[Any]:
    return jax.tree.leaves(x, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))


def _refuse_other_derivatives(rest: _Rest) -> None:
    for name, part in zip(_NAMES, rest, strict=True):
        if any(leaf.perturbed for leaf in _primals(part)):
            raise ValueError(
                f"A derivative is asked with respect to {name}, which `with_response` does not "
                "give: the response differentiates with respect to `hparams` alone. Make it part "
                "of `hparams` (and let `inner` read it there), or cut it with "
                "`jax.lax.stop_gradient`."
            )


def _refuse_unread(run: Callable, values: Any, perturbed: list[bool], structure: Any) -> None:
    w, hparams, rest = values
    reads = depends(lambda g, w, lam, r: _evaluate(run, g, w, lam, r), w, w, hparams, rest)
    names = [path for path, _ in tree.paths(hparams, "hparams")]
    dead = [n for n, p, r in zip(names, perturbed, reads, strict=True) if p and not r]
    if dead:
        raise ValueError(
            unread_message(dead, "the gradient of the inner loss does not depend on it")
            + " One that only your own outer loss reads need not go through `solve`."
        )
