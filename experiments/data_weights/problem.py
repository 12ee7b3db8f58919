"""The text, the language model, and the network that weighs windows of text."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data
from experiments.data_weights.config import Config


class Text(NamedTuple):
    """Windows of symbols, (n, length) int32; of the training ones, which are shuffled."""

    train: jax.Array
    valid: jax.Array
    test: jax.Array
    shuffled: jax.Array


def text(config: Config, seed: int) -> Text:
    """WikiText-2 as characters, cut into windows that the seed draws."""
    tokens = data.wikitext2()
    names = np.array(tokens.vocabulary, dtype=object)
    length = config.context + config.predicted
    draw = np.random.default_rng(seed)
    known: dict[str, int] = {}

    def windows(stream: np.ndarray, count: int) -> np.ndarray:
        written = " ".join(names[stream[: 12 * count * length // 5]])
        if not known:
            letters, counts = np.unique(list(written), return_counts=True)
            common = letters[np.argsort(-counts, kind="stable")][: config.symbols - 1]
            known.update({letter: i + 1 for i, letter in enumerate(common)})
        ids = np.fromiter((known.get(c, 0) for c in written), np.int32, len(written))
        cut = ids[: len(ids) // length * length].reshape(-1, length)
        return cut[draw.permutation(len(cut))[:count]]

    train = windows(tokens.train, config.train)
    shuffled = draw.random(len(train)) < config.corrupted
    train[shuffled] = draw.permuted(train[shuffled], axis=1)
    parts = (
        train,
        windows(tokens.valid, config.held_out),
        windows(tokens.test, config.held_out),
        shuffled,
    )
    return Text(*map(jnp.asarray, parts))


def initial(config: Config, key: jax.Array) -> dict[str, jax.Array]:
    """The language model: the embedded context, one hidden layer, the next symbol."""
    k = jax.random.split(key, 3)
    inputs = config.context * config.embedding
    return {
        "embed": jax.random.normal(k[0], (config.symbols, config.embedding)),
        "hidden": jax.random.normal(k[1], (inputs, config.hidden)) / inputs**0.5,
        "shift": jnp.zeros(config.hidden),
        "out": jax.random.normal(k[2], (config.hidden, config.symbols)) / config.hidden**0.5,
        "bias": jnp.zeros(config.symbols),
    }


def losses(w: Any, windows: jax.Array, context: int) -> jax.Array:
    """Cross-entropy in nats per character, one number per window."""
    predicted = windows.shape[1] - context
    embedded = w["embed"][windows]
    seen = jnp.stack([embedded[:, i : i + predicted] for i in range(context)], 2)
    seen = seen.reshape(*seen.shape[:2], context * embedded.shape[-1])
    z = jnp.tanh(seen @ w["hidden"] + w["shift"][None, None]) @ w["out"] + w["bias"][None, None]
    aims = windows[:, context:]
    return optax.softmax_cross_entropy_with_integer_labels(z, aims).mean(1)


def scorer(config: Config, key: jax.Array) -> dict[str, jax.Array]:
    """The network that scores windows: every pair of neighbours, one hidden layer, their mean."""
    k = jax.random.split(key, 2)
    return {
        "embed": jax.random.normal(k[0], (config.symbols, config.features)),
        "hidden": jax.random.normal(k[1], (2 * config.features, config.scored))
        / (2 * config.features) ** 0.5,
        "shift": jnp.zeros(config.scored),
        "out": jnp.zeros(config.scored),
    }


def weights(lam: Any, windows: jax.Array) -> jax.Array:
    """Weights of the windows of a batch, with a mean of one; all one at the start."""
    embedded = lam["embed"][windows]
    pairs = jnp.concatenate([embedded[:, :-1], embedded[:, 1:]], -1)
    told = jnp.tanh(pairs @ lam["hidden"] + lam["shift"][None, None]).mean(1)
    return len(windows) * jax.nn.softmax(10.0 * (told @ lam["out"]))
