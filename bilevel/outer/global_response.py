r"""A hypernetwork for the whole range of hyperparameters: train it first, search it after."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar
from bilevel.checks import check_problem
from bilevel.hypergradient.best_response import check_responds
from bilevel.inner.network import Network
from bilevel.linear.base import loop, status_of
from bilevel.operators import slice_batch, wants_straight_line
from bilevel.outer.base import Algorithm, own, same_type
from bilevel.problem import Problem
from bilevel.settings import check_count
from bilevel.status import Status, code


class GlobalResponseState(NamedTuple):
    r"""What :func:`global_response` carries.

    Attributes:
      params: base weights (learnt if the network is residual, otherwise only their shapes count).
      model_state: ``None``.
      response: parameters :math:`\phi` of the network.
      opt_state: of ``inner_tx``, for both.
      hparams: :math:`\lambda`, the current best guess.
      outer_opt_state: of ``outer_tx``.
      step: int32, steps made.
    """

    params: Params
    model_state: ModelState
    response: Any
    opt_state: Any
    hparams: Hparams
    outer_opt_state: Any
    step: jax.Array


class GlobalResponseInfo(NamedTuple):
    """What a step saw.

    Attributes:
      value: outer loss of the network's weights at the hyperparameters before their update.
      inner_value: mean inner loss over the draws of the last training step.
      grad_norm: norm of its gradient.
      hypergrad_norm: norm of the gradient ``outer_tx`` received.
      result: int32 :class:`~bilevel.Status`.
    """

    value: Scalar
    inner_value: Scalar
    grad_norm: Scalar
    hypergrad_norm: Scalar
    result: jax.Array


def global_response(
    outer: Loss,
    inner: Loss,
    network: Network,
    sample: Callable[[Key, Hparams], Hparams],
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int = 1,
    *,
    draws: int = 10,
    seed: int = 0,
) -> Algorithm:
    r"""Hypernetwork training over a distribution of hyperparameters.

    .. math::
        \phi &\leftarrow \phi - u\Bigl(\nabla_\phi \tfrac1S \sum_{s=1}^S
            h(\hat w_\phi(\lambda_s), \lambda_s)\Bigr),
            \qquad \lambda_s \sim p(\cdot \mid \lambda) \\
        \lambda &\leftarrow \lambda - v\bigl(\nabla_\lambda f(\hat w_\phi(\lambda), \lambda)\bigr)

    A fixed broad p that ignores :math:`\lambda` is the *global* algorithm; one around
    :math:`\lambda` the *local* one; ``lambda key, lam: lam`` the simplified joint one, where the
    movement of :math:`\lambda` is the only variation.

    Args:
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss of the same form.
      network: usually a :class:`~bilevel.inner.hypernetwork.Hypernetwork`; not a centred one.
      sample: ``(key, hparams) -> hparams``, one draw of p.
      inner_tx: of :math:`\phi` and the base weights.
      outer_tx: of :math:`\lambda`; ``optax.set_to_zero()`` only trains.
      inner_steps: training steps a step.
      draws: S, draws a training step; the batch is shared.
      seed: of the network's first parameters, where ``init`` gets no ``key``.

    Returns:
      ``(init, step)``: ``init(params, hparams, model_state=None, *, key=None)``, and
      ``step(state, *, inner_batches, outer_batch, key)`` with ``inner_batches`` stacked along a
      leading axis of ``inner_steps``.

    Cost: S inner gradients a training step (mapped, not looped), and S sets of weights.

    Reference: Lorraine and Duvenaud, "Stochastic Hyperparameter Optimization through
    Hypernetworks", 2018.
    """
    check_count("inner_steps", inner_steps)
    check_count("draws", draws)
    if getattr(network, "per_example", False) or network.centred:
        raise ValueError(
            "`network` must give weights for any hyperparameters, not for a distance from the "
            "current ones: use `Hypernetwork(...)` or `StructuredResponse(centred=False)`."
        )
    problem = Problem(outer, inner)

    def init(
        params: Params, hparams: Hparams, model_state: ModelState = None, *, key: Key | None = None
    ) -> GlobalResponseState:
        params, hparams = own(params), own(hparams)
        response = network.init(jax.random.key(seed) if key is None else key, params, hparams)
        return own(
            GlobalResponseState(
                params,
                None,
                response,
                inner_tx.init((params, response)),
                hparams,
                outer_tx.init(hparams),
                jnp.zeros((), jnp.int32),
            )
        )

    def step(
        state: GlobalResponseState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[GlobalResponseState, GlobalResponseInfo]:
        if key is None:
            raise ValueError("`key` is missing: a step draws hyperparameters.")
        first = slice_batch(inner_batches, 0)
        check_problem(problem, state.params, state.hparams, first, outer_batch)
        check_responds(problem, state.params, state.hparams, first, outer_batch)

        def mean_loss(weights: Any, drawn: Hparams, batch: Batch) -> Scalar:
            def one(lam: Hparams) -> Scalar:
                return problem.inner_loss(network.apply(weights[1], weights[0], lam), lam, batch)

            if draws == 1:  # products with a batch of one set of weights are slow on CPU
                return one(jax.tree.map(lambda x: x[0], drawn))
            return jnp.mean(jax.vmap(one)(drawn))

        def train(k: Any, carry: Any) -> Any:
            weights, opt_state, loss, norm = carry
            keys = jax.random.split(jax.random.fold_in(key, k), draws)
            drawn = jax.vmap(lambda k: sample(k, state.hparams))(keys)
            drawn = jax.tree.map(lambda x, y: x.astype(y.dtype), drawn, state.hparams)
            value, grads = jax.value_and_grad(mean_loss)(
                weights, drawn, slice_batch(inner_batches, k)
            )
            updates, opt_state = inner_tx.update(grads, opt_state, weights)
            new = (optax.apply_updates(weights, updates), opt_state)
            new = same_type(new, (weights, carry[1]), "training state", "Keep its dtypes.")
            return *new, value.astype(loss.dtype), tree.norm(grads).astype(norm.dtype)

        straight = wants_straight_line(problem, state.params, state.hparams, first)
        zero = jnp.zeros((), tree.norm(state.params).dtype)
        (params, response), opt_state, inner_value, grad_norm = loop(
            inner_steps, train, ((state.params, state.response), state.opt_state, zero, zero),
            straight,
        )  # fmt: skip

        def validation(lam: Hparams) -> Scalar:
            return problem.outer_loss(network.apply(response, params, lam), lam, outer_batch)[0]

        value, grads = jax.value_and_grad(validation)(state.hparams)
        updates, outer_opt_state = outer_tx.update(grads, state.outer_opt_state, state.hparams)
        hparams = optax.apply_updates(state.hparams, updates)
        norm = tree.norm(grads)
        result = status_of(
            code(Status.ok),
            (~jnp.isfinite(inner_value), Status.nonfinite_input),
            (~jnp.isfinite(value + norm), Status.nonfinite_output),
        )
        new = GlobalResponseState(
            params, None, response, opt_state, hparams, outer_opt_state, state.step + 1
        )
        new = same_type(new, state, "state", "Choose optimizers whose state keeps its dtypes.")
        return new, GlobalResponseInfo(value, inner_value, grad_norm, norm, result)

    return Algorithm(init, step)
