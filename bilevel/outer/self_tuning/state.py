r"""What a self-tuning run carries, and the scales of its perturbations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Hparams, ModelState, Params, Scalar
from bilevel.inner.descend import InnerState
from bilevel.outer.variable import Variable


class Trained(NamedTuple):
    r"""What the training steps move.

    Attributes:
      weights: base weights, state of ``inner_tx``, statistics of the model (``None`` without).
      network: parameters :math:`φ` of the response network, and state of ``response_tx``.
    """

    weights: InnerState
    network: InnerState


class Moved(NamedTuple):
    r"""What the validation steps move.

    Attributes:
      outer: :math:`λ`: what the losses read (bounded, integers rounded), unconstrained,
        and the state of ``outer_tx``.
      widths: s, with :math:`σ = softplus(s)`, a tree like the hyperparameters, and
        the state of ``scale_tx`` (``None`` with fixed scales).
    """

    outer: Variable
    widths: Variable


class SelfTuningState(NamedTuple):
    r"""Everything a run is: one tree holds weights, hyperparameters and scales together.

    Attributes:
      trained: weights and response network.
      moved: hyperparameters and scales.
      measured: the unconstrained hyperparameters that the last reported value belongs to (those
        of now at first).
      step: int32, cycles made.
    """

    trained: Trained
    moved: Moved
    measured: Hparams
    step: jax.Array

    @property
    def params(self) -> Params:
        """Base weights; ``deploy`` gives those that the losses read."""
        return self.trained.weights.params

    @property
    def model_state(self) -> ModelState:
        """Statistics of the model."""
        return self.trained.weights.model_state

    @property
    def network_params(self) -> Any:
        r"""Parameters :math:`φ` of the response network."""
        return self.trained.network.params

    @property
    def hparams(self) -> Hparams:
        """What the losses read."""
        return self.moved.outer.hparams

    @property
    def raw(self) -> Hparams:
        r""":math:`λ`, unconstrained: what ``outer_tx`` moves."""
        return self.moved.outer.moving

    @property
    def raw_scales(self) -> Hparams:
        r"""s, what ``scale_tx`` moves."""
        return self.moved.widths.moving

    @property
    def scales(self) -> Hparams:
        r""":math:`σ = softplus(s)`, in unconstrained units."""
        return jax.tree.map(jax.nn.softplus, self.raw_scales)


def entropy_of(scales: Hparams) -> Scalar:
    r"""Entropy of the perturbation, :math:`∑_k log σ_k + ½ log(2π e)` nats."""
    constant = 0.5 * (1 + jnp.log(2 * jnp.pi))
    parts = [jnp.sum(jnp.log(s) + constant.astype(s.dtype)) for s in jax.tree.leaves(scales)]
    return jnp.sum(jnp.stack(parts))


def inverse_softplus(scale: jax.Array) -> jax.Array:
    """The s with softplus(s) = ``scale``, without overflow for large scales."""
    return scale + jnp.log(-jnp.expm1(-scale))
