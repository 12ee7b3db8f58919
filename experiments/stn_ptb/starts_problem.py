"""One LSTM layer whose output dropout is tuned: the network, its losses, and what a step costs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import bilevel
from bilevel.inner.layers import LayerResponse, TunedEmbedding, TunedLSTMCell, split_layers
from bilevel.regularizers import locked_dropout
from experiments.common import budget
from experiments.lstm.problem import cross_entropy
from experiments.stn_ptb.config import Starts


class Net(nnx.Module):
    """Embedding, an LSTM layer, dropout, and the embedding again as the decoder."""

    def __init__(self, words: int, units: int, rngs: nnx.Rngs):
        self.embedding = TunedEmbedding(words, units, 1, rngs=rngs)
        self.cell = TunedLSTMCell(units, units, 1, rngs=rngs)
        self.decoder_bias = nnx.Param(jnp.zeros(words))

    def __call__(
        self,
        tokens: jax.Array,
        carry: Any,
        rate: Any = None,
        key: jax.Array | None = None,
        d: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits (B, T, V) and the new carry; without a key nothing is dropped."""
        carry, x = self.cell.sequence(carry, self.embedding(tokens, d), d)
        if key is not None:
            x = locked_dropout(key, x, rate)
        return self.embedding.attend(x) + self.decoder_bias[...], carry


def build(config: Starts, words: int, centred: bool, key: jax.Array) -> tuple[LayerResponse, Any]:
    """The network and its base parameters, the same for both kinds of response."""
    model = Net(words, config.units, nnx.Rngs(params=key))
    n, cell = config.units, model.cell
    cell.inputs.bias[...] = cell.inputs.bias[...].at[n : 2 * n].set(1.0)  # forget gates open
    model.embedding.embedding[...] = config.embedding * model.embedding.embedding[...]
    return split_layers(model, centred=centred, gain_scale=0.01)


def plain(network: LayerResponse, params: Any) -> Any:
    """Weights without a response, as the losses read them."""
    return network.plain(None, params)


def hparams(rate: Any) -> dict[str, Any]:
    """The one hyperparameter."""
    return {"rate": jnp.asarray(rate, jnp.float32)}


def space(config: Starts) -> bilevel.Space:
    """A rate between 0 and `top`, moved as its logit."""
    return bilevel.Space({"rate": bilevel.Interval(0.0, config.top)})


def losses(network: LayerResponse) -> tuple[Any, Any]:
    """Validation and training loss on a window from a zero state: without dropout, and with."""

    def loss(params: Any, batch: Any, rate: Any, key: Any) -> jax.Array:
        model, d = network.merge(params)
        carry = model.cell.start(batch["x"].shape[0])
        logits, _ = model(batch["x"], carry, rate, key, d)
        return cross_entropy(logits[:, -batch["y"].shape[1] :], batch["y"])

    def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return loss(params, batch, None, None)

    def inner(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return loss(params, batch, hparams["rate"], batch["key"])

    return outer, inner


def windows(config: Starts, ids: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Any:
    """Windows at random places: what is read, what is to be predicted, and keys of dropout."""
    width = config.context + config.steps
    place, noise = jax.random.split(key)
    starts = jax.random.randint(place, shape, 0, ids.shape[0] - width)
    text = ids[starts[..., None] + jnp.arange(width + 1)]
    noise = jax.random.split(noise, shape[:-1]) if len(shape) > 1 else noise
    return {"x": text[..., :-1], "y": text[..., config.context + 1 :], "key": noise}


def measure(config: Starts, network: LayerResponse, weights: Any, stream: jax.Array) -> jax.Array:
    """Loss on a whole text, in parallel streams whose state is carried along."""
    model, d = network.merge(weights)
    t = config.steps

    def body(carry: Any, i: jax.Array) -> Any:
        cut = jax.lax.dynamic_slice_in_dim(stream, i * t, t + 1, axis=1)
        logits, carry = model(cut[:, :-1], carry, d=d)
        return carry, cross_entropy(logits, cut[:, 1:])

    carry = model.cell.start(stream.shape[0])
    return jax.lax.scan(body, carry, jnp.arange((stream.shape[1] - 1) // t))[1].mean()


@functools.cache
def cycle_cost(config: Starts, method: str) -> float:
    """G of the training steps of a cycle and of its validation step."""
    # Every layer counts alike: a vocabulary of two words does.
    network, _ = build(config, 2, method == "delta_stn", jax.random.key(0))
    outer = budget.weight(config.valid_batch, config.batch)
    return budget.self_tuning(network, config.inner_steps, outer).total


def cycles(config: Starts, method: str) -> int:
    """As many as the budget pays, a multiple of the measured points."""
    return budget.stretches(config.budget, cycle_cost(config, method), config.points)
