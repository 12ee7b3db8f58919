"""The bilevel problem of `bo_rep`: a representation above, a linear readout below.

The hyperparameters are the embedding and a recurrent encoder, the parameters a linear readout with
a ridge, which makes the inner problem strongly convex.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.bo_rep.config import Config
from experiments.bo_rep.texts import PAD, Corpus

Tree = Any


def encoder(config: Config, words: int, seed: int) -> Tree:
    """Fresh embedding and recurrence; the recurrent kernel is orthogonal."""
    keys = jax.random.split(jax.random.key(seed), 3)
    e, h = config.embedding, config.hidden
    return {
        "embedding": 0.1 * jax.random.normal(keys[0], (words, e)),
        "inputs": jax.random.normal(keys[1], (e, h)) / e**0.5,
        "recurrent": jax.random.orthogonal(keys[2], h),
        "bias": jnp.zeros(h),
    }


def readout(config: Config, classes: int) -> Tree:
    """A linear layer at zero."""
    return {"kernel": jnp.zeros((config.hidden, classes)), "bias": jnp.zeros(classes)}


def features(encoder: Tree, ids: jax.Array) -> jax.Array:
    """Mean over the words of the states of a tanh recurrence: (N, hidden) from (N, length)."""
    x = encoder["embedding"][ids] @ encoder["inputs"] + encoder["bias"][None, None, :]
    there = (ids != PAD).astype(x.dtype)[..., None]

    def step(state: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]) -> Any:
        h, total = state
        x, there = now
        new = jnp.tanh(x + h @ encoder["recurrent"])
        h = there * new + (1 - there) * h
        return (h, total + there * new), None

    zero = jnp.zeros((len(ids), x.shape[-1]), x.dtype)
    moved = jnp.moveaxis(x, 1, 0), jnp.moveaxis(there, 1, 0)
    (_, total), _ = jax.lax.scan(step, (zero, zero), moved)
    return total / jnp.maximum(1, there.sum(1))


def logits(encoder: Tree, readout: Tree, ids: jax.Array) -> jax.Array:
    """(N, classes)."""
    return features(encoder, ids) @ readout["kernel"] + readout["bias"][None, :]


def _losses(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


@dataclasses.dataclass(frozen=True)
class Task:
    """Both losses. A batch has ``ids`` and ``y``."""

    ridge: float

    def inner(self, params: Tree, hparams: Tree, batch: Tree) -> jax.Array:
        """Training loss with a ridge."""
        size = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return self.outer(params, hparams, batch) + 0.5 * self.ridge * size

    def outer(self, params: Tree, hparams: Tree, batch: Tree) -> jax.Array:
        """Loss without ridge."""
        return jnp.mean(_losses(logits(hparams, params, batch["ids"]), batch["y"]))


def start(config: Config, corpus: Corpus, seed: int) -> tuple[Tree, Tree]:
    """Parameters and hyperparameters."""
    return readout(config, corpus.classes), encoder(config, corpus.words, seed)
