"""The bilevel problem of `digits`: an MLP whose weight decays are the hyperparameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import bilevel
from experiments.digits.config import Config

HIDDEN_KERNEL = ("hidden", "kernel")


class MLP(nnx.Module):
    """64 pixels, one hidden layer of tanh units, 10 logits."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.readout = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.readout(jnp.tanh(self.hidden(x)))


def structure(width: int) -> Any:
    """The static part of the model; parameters travel apart from it."""
    return nnx.split(MLP(width, nnx.Rngs(0)), nnx.Param)[0]


def initial(config: Config, seed: int) -> Any:
    """Fresh parameters, as a plain dictionary of arrays."""
    _, params = nnx.split(MLP(config.hidden, nnx.Rngs(seed)), nnx.Param)
    return nnx.to_pure_dict(params)


def operator(config: Config) -> bilevel.GaussNewton:
    r"""The training loss :math:`\ell(z(w)) + \tfrac12\sum_j e^{\lambda_j} w_j^2` as an operator.

    ``operator.loss`` is the inner loss. A decay is one number for each tensor or one for each
    weight: both broadcast against the weights they belong to.
    """
    graphdef = structure(config.hidden)

    def logits(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return nnx.merge(graphdef, nnx.State(params))(batch["x"])

    def penalty(params: Any, hparams: Any) -> jax.Array:
        parts = jax.tree.map(lambda w, lam: 0.5 * jnp.sum(jnp.exp(lam) * w**2), params, hparams)
        return jnp.sum(jnp.stack(jax.tree.leaves(parts)))

    return bilevel.GaussNewton(logits, cross_entropy, config.damping, penalty)


def cross_entropy(logits: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def validation(op: bilevel.GaussNewton):
    """The outer loss: cross-entropy without penalty."""
    return lambda params, hparams, batch: cross_entropy(
        op.model(params, hparams, batch), hparams, batch
    )


def decays(params: Any, value: float, *, per_weight: bool) -> Any:
    """Log decays at ``value``: one for each weight, or one for each tensor."""
    return jax.tree.map(lambda w: jnp.full(w.shape if per_weight else (), value, w.dtype), params)
