"""Does a hyperparameter reach the responded parameters at all? Asked of the traced program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Params
from bilevel.ground.traced import depends, reaching
from bilevel.ground.tree import paths
from bilevel.inner.mixed import is_float
from bilevel.inner.optimizer import InnerTx, build_tx, concrete_setting, explain_search
from bilevel.problem.two_losses import Problem


def _loses_derivative(equation: Any) -> bool:
    """Operations that hide a dependence a user would want differentiated.

    ``sign`` is not among them: its derivative is truthfully zero (lion's b1).
    """
    if equation.primitive.name in ("stop_gradient", "floor", "ceil", "round"):
        return True
    return not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars)


def check_reaches(
    problem: Problem,
    advance: Callable[[Hparams, Hparams], Any],
    params: Params,
    hparams: Hparams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    inner_tx: InnerTx,
    by: str = "reverse",
) -> None:
    """Refuse hyperparameters that nothing depends on: their derivative would be silently zero.

    Args:
      advance: ``advance(hparams, in_loss)``, one training step written as a loop: everything
        the outer loss then reads. The loss reads ``in_loss``, all else ``hparams``.
      inner_batch: one batch.
      inner_tx: named where it is what cannot be differentiated.
      by: how the steps are differentiated, ``"reverse"`` or ``"forward"``, which decides which
        programs can be; ``"values"`` where any dependence will do (evolution strategies).
    """

    def floats(lam: Hparams, in_loss: Hparams) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(advance(lam, in_loss)) if is_float(leaf)]

    def both(lam: Hparams) -> list[Any]:
        return floats(lam, lam)

    def of_tx(lam: Hparams) -> list[Any]:
        return floats(lam, jax.lax.stop_gradient(lam))

    try:
        shapes = jax.eval_shape(both, hparams)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        raise concrete_setting(error) from error
    alive = jax.tree.leaves(_through_outer(problem, params, hparams, outer_batch))

    def also(found: Any) -> None:
        alive[:] = [a or b for a, b in zip(alive, jax.tree.leaves(found), strict=True)]

    if by == "values":
        also(reaching(both, hparams))
    elif by == "forward":
        also(reaching(lambda t, lam: jax.jvp(both, (lam,), (t,))[1], hparams, hparams))
    else:
        try:
            also(depends(lambda cts, lam: jax.vjp(both, lam)[1](cts)[0], shapes, hparams))
        except ValueError as error:
            raise explain_search(error, build_tx(inner_tx, hparams), params) from error
    if by != "values" and not all(alive):
        # What an optimizer makes of a setting may be flat (a sign) and zero its true derivative.
        also(reaching(of_tx, hparams, blocked=_loses_derivative))
    if by != "values" and not all(alive):
        # So may what it makes of a gradient that does depend on the hyperparameter.
        read = reaching(both, hparams, blocked=_loses_derivative)
        cross = depends(
            lambda v, lam, batch: problem.cross_vjp(params, lam, batch, v),
            params,
            hparams,
            inner_batch,
        )
        also(jax.tree.map(lambda a, b: a and b, read, cross))
    _refuse_dead(hparams, alive, _why(by))


def check_map_reaches(
    problem: Problem,
    advance: Callable[[Hparams], Params],
    params: Params,
    hparams: Hparams,
    outer_batch: Batch,
    *,
    by: str,
) -> None:
    """As :func:`check_reaches`, for steps that are the user's own: ``advance`` makes one."""
    found = [_through_outer(problem, params, hparams, outer_batch)]
    shapes = jax.eval_shape(advance, hparams)
    if by == "forward":
        found.append(reaching(lambda t, lam: jax.jvp(advance, (lam,), (t,))[1], hparams, hparams))
    else:
        try:
            reads = depends(lambda cts, lam: jax.vjp(advance, lam)[1](cts)[0], shapes, hparams)
        except ValueError as error:
            if "while_loop" not in str(error):
                raise
            raise ValueError(
                "`step` has a loop whose length is decided while it runs (`jax.lax.while_loop`), "
                "which reverse mode cannot differentiate. Use `UnrollMap(..., mode='forward')`, or "
                "a loop of known length (`jax.lax.fori_loop` with Python numbers, `jax.lax.scan`)."
            ) from error
        found.append(reads)
    # A derivative that is truly zero everywhere (of a sign) is one.
    found.append(reaching(advance, hparams, blocked=_loses_derivative))
    alive = [any(marks) for marks in zip(*map(jax.tree.leaves, found), strict=True)]
    _refuse_dead(
        hparams,
        alive,
        "neither `step` nor the outer loss depends on it differentiably, so its hypergradient "
        "would be silently zero. Usual causes: `step` closes over a value instead of reading "
        "`hparams`; a `stop_gradient`, a rounding or a comparison on the way. Remove it from "
        "`hparams` if it is not to be tuned.",
    )


def _through_outer(
    problem: Problem, params: Params, hparams: Hparams, outer_batch: Batch
) -> Hparams:
    """For each hyperparameter, whether the outer loss reads it itself."""

    def direct(ct: Any, lam: Hparams) -> Hparams:
        value, pull = jax.vjp(lambda lam: problem.outer_loss(params, lam, outer_batch)[0], lam)
        return pull(ct.astype(value.dtype))[0]

    return depends(direct, jax.ShapeDtypeStruct((), jnp.float32), hparams)


def _refuse_dead(hparams: Hparams, alive: list[bool], why: str) -> None:
    names = [path for path, _ in paths(hparams, "hparams")]
    dead = [name for name, is_alive in zip(names, alive, strict=True) if not is_alive]
    if dead:
        raise ValueError(f"No derivative reaches {', '.join(dead)}: {why}")


def _why(by: str) -> str:
    fixed = (
        "Usual causes: `inner_tx` is a fixed transformation (pass a function `lambda hparams: "
        "optax.sgd(hparams['lr'])`); a schedule given to `optax.inject_hyperparams`, which is "
        "recomputed at every update and ignores a value set in the state; a term of the inner "
        "loss without the parameters, which moves nothing"
    )
    if by == "values":
        return (
            "neither a training step nor the outer loss depends on it, so its estimate would be "
            f"silent noise around zero. {fixed}. Remove it from `hparams` if it is not to be tuned."
        )
    return (
        "neither a training step nor the outer loss depends on it differentiably, so its "
        f"hypergradient would be silently zero. {fixed}; a `stop_gradient`, a rounding or a "
        "comparison on the way (the rate of `regularizers.dropout` is one). Use `Evolution` or "
        "`BestResponse` for what has no derivative, and remove it from `hparams` if it is not to "
        "be tuned."
    )
