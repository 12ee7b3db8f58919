"""The problems of `hoag`: logistic regression whose penalties are the hyperparameters."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import linear_call

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
    """Rows of unit length, by row and by column; the first ten groups against the last."""
    x = part.x.tocsr()
    length = np.sqrt(np.asarray(x.multiply(x).sum(1))).ravel()
    rows = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    value = (x.data / np.maximum(length, 1e-12)[rows]).astype(np.float32)
    return {
        "rows": _pieces(rows, x.indices, value, x.shape[0], 16),
        "columns": _pieces(x.indices, rows, value, x.shape[1], 8),
        "y": jnp.asarray(np.where(part.y < 10, 1.0, -1.0), jnp.float32),
    }


def _pieces(
    major: np.ndarray, minor: np.ndarray, value: np.ndarray, count: int, width: int
) -> dict[str, jax.Array]:
    """Entries by line, each line filled up with zeros to pieces of one width.

    A sum over lines adds within the pieces first: three times as fast as a sum over entries.
    """
    order = np.argsort(major, kind="stable")
    major, minor, value = major[order], minor[order], value[order]
    size = np.bincount(major, minlength=count)
    pieces = -(-size // width)
    ahead = (np.cumsum(pieces) - pieces) * width - (np.cumsum(size) - size)
    place = ahead[major] + np.arange(len(value))
    values, minors = np.zeros(pieces.sum() * width, np.float32), np.zeros(pieces.sum() * width, int)
    values[place], minors[place] = value, minor
    return {
        "value": jnp.asarray(values.reshape(-1, width)),
        "minor": jnp.asarray(minors.reshape(-1, width), jnp.int32),
        "major": jnp.asarray(np.repeat(np.arange(count), pieces), jnp.int32),
    }


def _product(pieces: dict[str, jax.Array], x: jax.Array, count: int) -> jax.Array:
    sums = jnp.sum(pieces["value"] * x[pieces["minor"]], axis=1)
    return jax.ops.segment_sum(sums, pieces["major"], count, indices_are_sorted=True)


def outputs(params: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Margins or logits."""
    if "x" in batch:
        return batch["x"] @ params
    examples, features = len(batch["y"]), len(params)
    return linear_call(
        lambda both, w: _product(both["rows"], w, examples),
        lambda both, z: _product(both["columns"], z, features),
        {name: batch[name] for name in ("rows", "columns")},
        params,
    )


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
