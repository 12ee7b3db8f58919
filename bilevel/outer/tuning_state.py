r"""What a self-tuning run carries and reports, and the scales of its perturbations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.aliases import Hparams, ModelState, Params, Scalar


class SelfTuningState(NamedTuple):
    r"""Everything a run is: one tree holds weights, hyperparameters and scales together.

    Attributes:
      params: base weights; with a centred network the ones to deploy (see
        :func:`~bilevel.tuned_params`).
      model_state: mutable statistics of the model (``None`` without ``has_state``).
      inner_opt_state: state of ``inner_tx``.
      response: parameters :math:`\phi` of the network.
      response_opt_state: state of ``response_tx``.
      hparams: what the losses read: bounded, integers rounded.
      raw: :math:`\lambda`, unconstrained, what ``outer_tx`` moves.
      outer_opt_state: state of ``outer_tx``.
      raw_scales: s, with :math:`\sigma = \mathrm{softplus}(s)`, a tree like ``raw``.
      scale_opt_state: state of ``scale_tx`` (``None`` with fixed scales).
      measured: those of ``raw`` that the last reported value belongs to (``raw`` itself at first).
      step: int32, cycles made.
    """

    params: Params
    model_state: ModelState
    inner_opt_state: Any
    response: Any
    response_opt_state: Any
    hparams: Hparams
    raw: Hparams
    outer_opt_state: Any
    raw_scales: Hparams
    scale_opt_state: Any
    measured: Hparams
    step: jax.Array


class SelfTuningInfo(NamedTuple):
    r"""What a cycle saw.

    Attributes:
      value: (perturbed) outer loss at the new weights and the hyperparameters *before* their
        update, without the entropy; of the first outer step.
      inner_value: inner loss of the last training step, at the current hyperparameters
        (uncentred: perturbed).
      response_value: inner loss of the last response step, perturbed.
      hypergrad_norm: norm of the gradient that ``outer_tx`` received.
      response_norm: :math:`|\hat w(\sigma) - \hat w(0)| / |w|`: how far the weights are said to
        move for one scale.
      hparams: what the training steps of this cycle read, as in :class:`SelfTuningState`.
      scales: :math:`\sigma` of this cycle.
      result: int32 :class:`~bilevel.Status`; ``invalid_setting`` where ``response_norm`` is
        exactly 0, a network that has not trained.
    """

    value: Scalar
    inner_value: Scalar
    response_value: Scalar
    hypergrad_norm: Scalar
    response_norm: Scalar
    hparams: Hparams
    scales: Hparams
    result: jax.Array


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


def weights_at(network: Any, response: Any, params: Params, raw: Hparams) -> Any:
    """What the losses read as weights of an uncentred network at ``raw``, for all examples."""
    # A network of layers takes a displacement an example; here one serves them all.
    layered = getattr(network, "per_example", False)
    return (network.everywhere if layered else network.apply)(response, params, raw)


def entropy_of(scales: Hparams) -> Scalar:
    r"""Entropy of the perturbation, :math:`\sum_k \log\sigma_k + \tfrac12\log(2\pi e)` nats."""
    constant = 0.5 * (1 + jnp.log(2 * jnp.pi))
    parts = [jnp.sum(jnp.log(s) + constant.astype(s.dtype)) for s in jax.tree.leaves(scales)]
    return jnp.sum(jnp.stack(parts))


def inverse_softplus(scale: jax.Array) -> jax.Array:
    """The s with softplus(s) = ``scale``, without overflow for large scales."""
    return scale + jnp.log(-jnp.expm1(-scale))
