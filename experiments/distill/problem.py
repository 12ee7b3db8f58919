"""The bilevel problem of `distill`: the training images of a linear model are hyperparameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel

CLASSES = 10


def cross_entropy(logits: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def operator(decay: float) -> bilevel.GaussNewton:
    r"""Cross-entropy on the learned images plus :math:`\tfrac\rho2\|w\|^2`, as an operator.

    ``operator.loss`` is the inner loss and, the model being linear, the operator its exact
    Hessian. The images are ``hparams``, (m, pixels); the batch holds their labels alone.
    """

    def penalty(params: Any, hparams: Any) -> jax.Array:
        return 0.5 * decay * (jnp.sum(params["kernel"] ** 2) + jnp.sum(params["bias"] ** 2))

    def images(hparams: Any, batch: Any) -> jax.Array:
        return hparams

    return bilevel.GaussNewton(bilevel.LinearModel(images), cross_entropy, 0.0, penalty)


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Outputs of the linear model on real images."""
    return x @ params["kernel"] + params["bias"][None, :]


def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """The loss on real training images, of the model trained on the learned ones."""
    return cross_entropy(logits(params, batch["x"]), hparams, batch)


def zeros(pixels: int) -> Any:
    """The linear model before training."""
    return {"kernel": jnp.zeros((pixels, CLASSES)), "bias": jnp.zeros(CLASSES)}


def labels(per_class: int) -> np.ndarray:
    """The fixed labels of the learned images: 0 .. 9, again and again."""
    return np.tile(np.arange(CLASSES, dtype=np.int32), per_class)


def to_minimum(op: bilevel.GaussNewton, params: Any, images: Any, batch: Any, config: Any) -> Any:
    """Newton's method from `params`: the loss is strongly convex and `params` near its minimum."""
    problem = bilevel.Problem(outer, op.loss)
    solver = bilevel.CG(max_steps=config.products)

    def step(params: Any, _: Any) -> tuple[Any, None]:
        bound = op.bind(problem, params, images, batch, fresh=False)
        move = solver.solve(bound.mv, bound.inner_grad, certify=False).value
        return jax.tree.map(jnp.subtract, params, move), None

    return jax.lax.scan(step, params, length=config.newton_steps)[0]
