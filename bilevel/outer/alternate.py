r"""The plain outer loop: some training steps, one hypergradient, one outer step."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.ground.settings import check_count, check_flag
from bilevel.hypergradient.base import Response, inner_for
from bilevel.hypergradient.best_response import BestResponse
from bilevel.inner.optimizer import InnerTx, check_inner_tx, check_tx
from bilevel.outer.alternation import Alternation
from bilevel.outer.base import Algorithm, own_params
from bilevel.outer.variable import Mover, check_space
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_losses
from bilevel.space.space import Space


def alternate(
    outer: Loss,
    inner: Loss | None,
    response: Response,
    inner_tx: InnerTx,
    outer_tx: optax.GradientTransformation,
    inner_steps: int,
    constrain: Space | None = None,
    has_aux: bool = False,
    has_state: bool = False,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Alternates K training steps with one step along the hypergradient.

    .. math::
        w_{k+1} &= w_k - u(∇_w h(w_k, λ)),  k = 0 … K-1 \\
        ρ &← ρ - v(
            (∂c/∂ρ)ᵀ dF/dλ (w_K, λ)
            ),  λ = c(ρ)

    with the updates :math:`u, v` of two optax optimizers and the bounds :math:`c`.

    Args:
      outer: validation loss :math:`f`, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss :math:`h`, of the same form. ``None`` with ``inner_steps=0`` and
        ``UnrollMap``, whose steps are then all there is (``inner_tx=optax.identity()``).
      response: how the hypergradient is found, such as ``Implicit(CG())``. Parameters that it
        moves (``Unroll`` trains while it differentiates) are kept.
      inner_tx: an optax transformation, or a function ``hparams -> transformation`` for inner
        optimizers whose settings are themselves tuned (needs ``Unroll``; implicit responses
        refuse a hyperparameter that only the optimizer reads).
      outer_tx: an optax transformation for the hyperparameters. A hypergradient that is NaN
        makes them NaN; ``optax.apply_if_finite(outer_tx, n)`` skips up to n such steps. Line
        searches are refused: each trial would solve the inner problem again.
      inner_steps: K, at least 0.
      constrain: bounds; None leaves the hyperparameters free.
      has_aux: ``outer`` returns ``(scalar, aux)``.
      has_state: both losses are ``loss(params, hparams, batch, model_state) -> (scalar,
        model_state)``. Training steps, those of an unrolled response too, pass ``model_state``
        on and keep what comes back; an implicit solve and the outer loss read it frozen.
      unroll: write the training steps out one by one; None decides by
        itself (for convolutions on CPU, tens of times slower inside a loop).

    Returns:
      ``Algorithm(init, step, deploy)``.

      ``init(params, hparams, model_state=None) -> state`` copies its arguments, so that
      ``state`` may be donated.

      ``step(state, *, inner_batches, outer_batch, response_batch=None, key=None) -> (state,
      info)`` is pure, keeps the type of ``state`` (jit, scan, vmap, donation), and reads:

      * ``inner_batches``: stacked along a leading axis (a single ``jax.random.key`` may come
        without, and is split by step). The first K slices are trained on.
        The response reads ``response_batch`` if given (the axis is then K long); otherwise a
        response for one batch reads the last slice, the one last trained on (the axis is K
        long, or 1 if K is 0), and a response for a stack of L batches, as its
        ``num_inner_batches()`` tells, the L slices after the first K (K + L long).
      * ``outer_batch``: what ``outer`` reads.
      * ``key``: for responses that draw random numbers. Randomness of the losses is part of
        their batches.

      ``deploy(state, hparams=None)`` is ``state.params``.

    A response that makes training steps itself (``Unroll``, ``Evolution``, ``FiniteDifference``)
    shares the optimizer state of the run, so that K + T steps are those of one plain run: give it
    the same ``inner_tx``. Other responses differentiate the leaves of ``params`` that
    ``inner_tx`` trains; leaves that it freezes (``optax.multi_transform`` with ``set_to_zero``,
    ``optax.freeze``) are constants to them.

    Raises:
      TypeError, ValueError: at construction or at trace time, for settings, trees, axes and
        values outside their bounds that do not fit; the message names the argument.

    Cost: K inner gradients, one outer gradient, and what the response costs. Memory: the
    state, one gradient, and the response's.

    Reference: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020, Algorithm 1; Franceschi et al., "Bilevel programming for
    hyperparameter optimization and meta-learning", ICML 2018.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.alternate(
      ...     valid, train, bilevel.Implicit(bilevel.CG()), optax.sgd(0.2), optax.adam(0.1),
      ...     inner_steps=20, constrain=bilevel.Space(bilevel.Positive()))
      >>> state = alg.init(jnp.zeros(1), 1.0)
      >>> step = jax.jit(alg.step, donate_argnums=0)
      >>> for _ in range(50):
      ...     state, info = step(
      ...         state, inner_batches=jnp.full((20, 1), 2.0), outer_batch=jnp.array([1.0]))
      >>> bool(abs(info.value) < 0.01)  # the decay that halves the mean of the data is 1
      True
    """
    inner = inner_for(response, inner)
    check_losses(outer=outer, inner=inner)
    check_inner_tx(inner_tx)
    check_tx("outer_tx", outer_tx)
    check_count("inner_steps", inner_steps, low=0)
    check_flag("has_aux", has_aux)
    check_flag("has_state", has_state)
    check_flag("unroll", unroll, optional=True)
    check_space(constrain, "{'decay': Positive()}")
    _check_response(response, inner_steps)
    alternation = Alternation(
        Problem(outer, inner, has_aux, has_state),
        response,
        inner_tx,
        Mover(outer_tx, constrain),
        inner_steps,
        unroll,
    )
    return Algorithm(alternation.init, alternation.step, own_params)


def _check_response(response: Any, inner_steps: int) -> None:
    if not isinstance(response, Response) or isinstance(response, type):
        raise TypeError(
            f"`response` must be a response such as `Implicit(CG())`, got {response!r}."
        )
    if isinstance(response, BestResponse) and not response.network.centred:
        raise ValueError(
            "an uncentred network is trained together with the base weights: use `self_tuning`, "
            "or `BestResponse(StructuredResponse(centred=True), ...)`."
        )
    if getattr(response, "real_time", False) and inner_steps:
        raise ValueError(
            f"`real_time=True` differentiates the whole run, but the inner_steps={inner_steps} "
            "training steps between two calls are not recorded: pass `inner_steps=0` and let "
            "`Unroll(steps=...)` make all steps."
        )
