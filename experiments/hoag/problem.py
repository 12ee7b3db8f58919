"""The problems of `hoag`: logistic regression whose penalties are the hyperparameters."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import data
from experiments.hoag.config import Config


class Task(NamedTuple):
    """One regression: three parts, and the shape of its weights."""

    train: Any
    valid: Any
    test: Any
    weights: tuple[int, ...]


def load(name: str, config: Config, seed: int) -> Task:
    """Rows of unit length for the newsgroups, pixels in [0, 1] for images, else as they come."""
    if name == "digits":
        sets, outputs = data.digits(seed=seed), 10
    elif name == "mnist":
        full = data.mnist(valid=config.mnist, seed=seed)
        train = np.random.default_rng(seed).permutation(len(full.train.y))[: config.mnist]
        sets, outputs = (
            full._replace(train=data.Split(full.train.x[train], full.train.y[train])),
            10,
        )
    elif name == "newsgroups":
        sets, outputs = data.newsgroups(valid=3_700, seed=seed), 2
    else:
        sets, outputs = data.libsvm(name, seed=seed), 2
    parts = [_sparse(part) if name == "newsgroups" else _dense(part, outputs) for part in sets]
    features = sets[0].x[:1].reshape(1, -1).shape[1]
    train, valid, test = parts
    return Task(train, valid, test, (features, outputs) if outputs > 2 else (features,))


def _dense(part: Any, outputs: int) -> Any:
    x = jnp.asarray(np.asarray(part.x, np.float32).reshape(len(part.y), -1))
    return {"x": x, "y": jnp.asarray(part.y if outputs > 2 else 2.0 * part.y - 1)}


def _sparse(part: Any) -> Any:
    """Rows of unit length as three lists, sorted by row; the first ten groups against the last."""
    x = part.x.tocsr()
    length = np.sqrt(np.asarray(x.multiply(x).sum(1))).ravel()
    rows = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    return {
        "value": jnp.asarray(x.data / np.maximum(length, 1e-12)[rows]),
        "row": jnp.asarray(rows, jnp.int32),
        "column": jnp.asarray(x.indices, jnp.int32),
        "y": jnp.asarray(np.where(part.y < 10, 1.0, -1.0), jnp.float32),
    }


def outputs(params: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Margins or logits."""
    if "x" in batch:
        return batch["x"] @ params
    products = batch["value"] * params[batch["column"]]
    count = batch["y"].shape[0]
    return jax.ops.segment_sum(products, batch["row"], count, indices_are_sorted=True)


def data_loss(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """The sum over examples, in nats."""
    if z.ndim == 1:
        return jnp.sum(jnp.logaddexp(0, -batch["y"] * z))
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))


def penalty(params: jax.Array, hparams: jax.Array) -> jax.Array:
    r""":math:`\tfrac12 \sum_j e^{\lambda_j} w_j^2`, one number for all or one for each weight."""
    return 0.5 * jnp.sum(jnp.broadcast_to(jnp.exp(hparams), params.shape) * params**2)


def inner(params: jax.Array, hparams: jax.Array, batch: Any) -> jax.Array:
    """The training loss."""
    return data_loss(outputs(params, hparams, batch), hparams, batch) + penalty(params, hparams)


def outer(params: jax.Array, hparams: jax.Array, batch: Any) -> jax.Array:
    """The validation loss."""
    return data_loss(outputs(params, hparams, batch), hparams, batch)


def curvature() -> bilevel.GaussNewton:
    """The Hessian of a dense problem, with its exact diagonal."""
    model = bilevel.LinearModel(lambda hparams, batch: batch["x"])
    return bilevel.GaussNewton(model, data_loss, penalty=penalty)


@jax.jit
def measured(params: jax.Array, batch: Any) -> dict[str, jax.Array]:
    """Mean loss and error of a part."""
    z = outputs(params, None, batch)
    wrong = z * batch["y"] <= 0 if z.ndim == 1 else jnp.argmax(z, -1) != batch["y"]
    return {"loss": data_loss(z, None, batch) / len(batch["y"]), "error": jnp.mean(wrong)}


@functools.cache
def solve() -> Any:
    """A jitted inner solve from zero, to a tolerance relative to the gradient there."""

    @jax.jit
    def solved(start: jax.Array, lam: jax.Array, batch: Any, tol: float) -> Any:
        scale = jnp.linalg.norm(jax.grad(inner)(start, lam, batch))
        return bilevel.minimize(inner, start, lam, batch, tol=tol * scale)

    return solved
