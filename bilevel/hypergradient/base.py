r"""The protocol of a response: *how do the parameters follow the hyperparameters?*

A response answers with a point and a pullback,

.. code-block:: python

    w, pullback = response.vjp(problem, params, hparams, inner_batch, state, key=key)
    indirect, state, result, stats = pullback(g)

where ``indirect`` is :math:`(∂w/∂λ)ᵀ g`. That is all the rest of the
library knows of any method.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Key, Params, Stats, Vector
from bilevel.ground.cost import UNKNOWN, Cost
from bilevel.problem.two_losses import Problem

Pullback: TypeAlias = Callable[[Vector], tuple[Hparams, Any, jax.Array, Stats]]


@runtime_checkable
class Response(Protocol):
    """Anything with these methods is a response (see ``docs/extend.md``).

    ``init`` returns what is carried from call to call (a warm start, an optimizer state);
    it must accept ``jax.ShapeDtypeStruct`` leaves and return the structure ``pullback``
    gives back. Three further methods may be left out. ``check`` raises at trace time what is
    specific to the response. ``num_inner_batches() -> int | None`` tells outer loops the length
    of the leading axis of ``inner_batch``; None, or no such method, means one single batch.
    ``cost(hparams, stats) -> Cost`` tells them what a call costs besides its outer gradient.
    Where ``needs_inner`` is False, callers may pass None for the inner problem.
    A response that trains while it differentiates keeps the model state it has advanced in
    ``state.model_state``, where outer loops take it from.
    """

    def init(self, problem: Problem, params: Params, hparams: Hparams) -> Any: ...

    def vjp(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        state: Any,
        *,
        key: Key | None = None,
    ) -> tuple[Params, Pullback]: ...


class Hypergradient(NamedTuple):
    r"""A hypergradient and the evidence for it.

    Attributes:
      value: :math:`f(w, λ)`.
      aux: the outer loss's auxiliary output (``None`` without ``has_aux``).
      params: the point where the outer loss was evaluated: the given parameters for an
        implicit response, the advanced ones for an unrolled one.
      grads: ``direct + indirect``, shaped like ``hparams``.
      direct: :math:`∂_λ f`.
      indirect: :math:`(∂w/∂λ)ᵀ ∇_w f`.
      state: hand it to the next call.
      result: int32 :class:`~bilevel.Status`; see :func:`~bilevel.raise_for_status`.
      stats: scalars. Always ``stationarity`` (norm of the inner gradient at the point the
        response linearizes), ``direct_norm``, ``indirect_norm``; with a solve also those of
        :class:`~bilevel.linear.LinearSolution`, and ``relative_stationarity`` and
        ``predicted_change`` (see :mod:`bilevel.hypergradient.judge`).
    """

    value: Any
    aux: Any
    params: Params
    grads: Any
    direct: Any
    indirect: Any
    state: Any
    result: jax.Array
    stats: Stats


def inner_for(response: Any, inner: Any) -> Any:
    """``inner``; where it is None and ``response`` needs no inner problem, a loss that is zero."""
    if inner is None and getattr(response, "needs_inner", True) is False:
        return no_loss
    return inner


def no_loss(params: Params, hparams: Hparams, batch: Batch, *model_state: Any) -> Any:
    """Nothing is minimized: the inner loss where a response brings its own iteration."""
    return (jnp.zeros(()), *model_state) if model_state else jnp.zeros(())


def cost_of(response: Response, hparams: Hparams, stats: Stats) -> Cost:
    """What one call of ``response`` cost besides its outer gradient; NaN if it does not tell."""
    cost = getattr(response, "cost", None)
    return Cost(UNKNOWN, UNKNOWN, 0) if cost is None else cost(hparams, stats)
