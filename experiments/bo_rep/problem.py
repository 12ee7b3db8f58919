"""The bilevel problems of `bo_rep`: a recurrent network above, and a recurrent network below.

`representation`: the hyperparameters are the embedding and the recurrent encoder, the parameters a
linear readout with a ridge (strongly convex). `cleaning`: the hyperparameters are one weight per
training sentence, the parameters the whole classifier.
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
    x = encoder["embedding"][ids] @ encoder["inputs"] + encoder["bias"]
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
    return features(encoder, ids) @ readout["kernel"] + readout["bias"]


def _losses(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


@dataclasses.dataclass(frozen=True)
class Task:
    """Both losses of one of the two problems. A batch has ``ids``, ``y`` and ``row``."""

    name: str
    ridge: float

    def split(self, params: Tree, hparams: Tree) -> tuple[Tree, Tree]:
        """Encoder and readout."""
        if self.name == "representation":
            return hparams, params
        return params["encoder"], params["readout"]

    def outputs(self, params: Tree, hparams: Tree, ids: jax.Array) -> jax.Array:
        """(N, classes)."""
        return logits(*self.split(params, hparams), ids)

    def inner(self, params: Tree, hparams: Tree, batch: Tree) -> jax.Array:
        """Training loss with a ridge; in `cleaning` every sentence has its weight."""
        losses = _losses(self.outputs(params, hparams, batch["ids"]), batch["y"])
        if self.name == "cleaning":
            losses = jax.nn.sigmoid(hparams[batch["row"]]) * losses
        size = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return jnp.mean(losses) + 0.5 * self.ridge * size

    def outer(self, params: Tree, hparams: Tree, batch: Tree) -> jax.Array:
        """Loss on held-out sentences, without ridge and weights."""
        return jnp.mean(_losses(self.outputs(params, hparams, batch["ids"]), batch["y"]))

    def start(self, config: Config, corpus: Corpus, seed: int) -> tuple[Tree, Tree]:
        """Parameters and hyperparameters."""
        body = encoder(config, corpus.words, seed)
        top = readout(config, corpus.classes)
        if self.name == "representation":
            return top, body
        return {"encoder": body, "readout": top}, jnp.zeros(len(corpus.train.y))


def task(config: Config) -> Task:
    """The problem that a configuration names."""
    return Task(config.task, config.ridge)
