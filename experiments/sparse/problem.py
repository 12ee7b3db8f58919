"""The bilevel problems of `sparse`: linear models with L1 penalties whose strengths are tuned.

One form holds them all. Parameters are (folds, features, outputs): a model for every fold, trained
in one inner problem whose parts do not meet. A batch is a design, its targets, and weights
(folds, rows) that say which rows a fold trains on, or is judged on:

.. math:: \\sum_k \\sum_i c_{ki}\\, \\ell(x_i^\\top w_k, y_i)

Hold-out has one fold. A design is dense, or a sparse ``BCOO``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel


def predict(params: jax.Array, x: Any) -> jax.Array:
    """(rows, folds, outputs)."""
    folds, features, outputs = params.shape
    flat = jnp.transpose(params, (1, 0, 2)).reshape(features, folds * outputs)
    return (x @ flat).reshape(-1, folds, outputs)


def row_losses(params: jax.Array, batch: Any) -> jax.Array:
    """The loss of each fold on each row, (rows, folds): the targets tell which loss it is.

    Reals: half the squared error. A boolean: logistic. Integers: softmax cross-entropy.
    """
    outputs, y = predict(params, batch["x"]), batch["y"][:, None]
    if y.dtype == jnp.bool_:
        return jax.nn.softplus(jnp.where(y, -outputs[..., 0], outputs[..., 0]))
    if jnp.issubdtype(y.dtype, jnp.integer):
        y = jnp.broadcast_to(y, outputs.shape[:2])
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    return 0.5 * (outputs[..., 0] - y) ** 2


def data_loss(params: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """The weighted loss; what judges a model, too."""
    return jnp.sum(batch["weights"].T * row_losses(params, batch))


def inner(params: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """The smooth part of the training loss: data, and the ridge of an elastic net."""
    loss = data_loss(params, hparams, batch)
    if "l2" in hparams:
        loss += 0.5 * jnp.exp(hparams["l2"]) * jnp.sum(params**2)
    return loss


def soft_threshold(params: jax.Array, hparams: Any, step_size: jax.Array) -> jax.Array:
    """The proximal operator of the L1 penalty; ``l1`` broadcasts against (features, outputs)."""
    strength = jnp.broadcast_to(jnp.exp(hparams["l1"]), params.shape)
    return bilevel.prox.l1(params, strength, step_size)


def outer(params: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """The criterion: the loss on rows that a fold did not train on, mean over folds."""
    return data_loss(params, hparams, batch)


def training(step_size: Any) -> bilevel.Composite:
    """The inner problem; it does not depend on the step size, which a solve would have to find."""
    return bilevel.Composite(inner, soft_threshold, step_size)


POWER = 10


def step_size(params: jax.Array, fit: Any) -> jax.Array:
    """One over the largest curvature of the data at zero, by `POWER` products."""
    grad = jax.grad(data_loss)

    def product(v: jax.Array) -> jax.Array:
        return jax.jvp(lambda w: grad(w, None, fit), (jnp.zeros_like(v),), (v,))[1]

    def step(_: Any, v: jax.Array) -> jax.Array:
        return product(v / jnp.linalg.norm(v))

    start = grad(jnp.zeros_like(params), None, fit)
    return 1 / jnp.linalg.norm(jax.lax.fori_loop(0, POWER, step, start))


def largest(params: jax.Array, fit: Any) -> jax.Array:
    """The smallest penalty at which every weight of every fold is zero."""
    return jnp.abs(jax.grad(data_loss)(jnp.zeros_like(params), None, fit)).max()
