"""The language model of Self-Tuning Networks, of layers that answer for every sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import bilevel
from bilevel.inner.layers import LayerResponse, TunedEmbedding, TunedLSTMCell, split_layers
from bilevel.regularizers import (
    activation_penalty,
    dropout_mask,
    locked_dropout,
    temporal_activation_penalty,
    word_mask,
)
from experiments.lstm.problem import cross_entropy
from experiments.stn_ptb.config import Config

RATES: tuple[str, ...] = ("embedding", "hidden", "input", "output", "weight")
PENALTIES: tuple[str, ...] = ("ar", "tar")
COUNT = len(RATES) + len(PENALTIES)
# Perturbed once a batch: what the sequences of a batch cannot have apart, and the paper's choice.
SHARED = ("embedding", "weight", "ar", "tar")
LAYERS = 2


class Net(nnx.Module):
    """Embedding, two LSTM layers, and the embedding again as the decoder."""

    def __init__(self, words: int, units: int, rngs: nnx.Rngs):
        self.embedding = TunedEmbedding(words, units, COUNT, rngs=rngs)
        self.first = TunedLSTMCell(units, units, COUNT, rngs=rngs)
        self.second = TunedLSTMCell(units, units, COUNT, rngs=rngs)
        self.decoder_bias = nnx.Param(jnp.zeros(words))

    def __call__(
        self,
        tokens: jax.Array,
        carry: Any,
        hparams: Any = None,
        key: jax.Array | None = None,
        d: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
        """Logits (B, T, V), the new carry, the last output dropped and raw; quiet without a key."""
        x, masks = self.embedding(tokens, d), (None, None)
        if key is not None:
            keys = jax.random.split(key, 6)
            words, units = self.embedding.embedding.shape
            x = x * word_mask(keys[0], words, tokens, _common(hparams["embedding"]))
            x = locked_dropout(keys[1], x, hparams["input"])
            rate = _common(hparams["weight"])
            masks = tuple(dropout_mask(k, (units, 4 * units), rate) for k in keys[2:4])
        first, x = self.first.sequence(carry[0], x, d, mask=masks[0])
        if key is not None:
            x = locked_dropout(keys[4], x, hparams["hidden"])
        second, raw = self.second.sequence(carry[1], x, d, mask=masks[1])
        dropped = raw if key is None else locked_dropout(keys[5], raw, hparams["output"])
        logits = self.embedding.attend(dropped) + self.decoder_bias[...]
        return logits, (first, second), dropped, raw


def _common(rate: jax.Array) -> jax.Array:
    """One rate for the batch: the sequences share the draw of a perturbation that is `shared`."""
    return rate if jnp.ndim(rate) == 0 else rate[0]


def build(config: Config, words: int, key: jax.Array) -> tuple[LayerResponse, Any]:
    """The network and its base parameters; STN's layers are uncentred, with small first gains."""
    model = Net(words, config.units, nnx.Rngs(params=key))
    for cell in (model.first, model.second):  # forget gates start open
        n = config.units
        cell.inputs.bias[...] = cell.inputs.bias[...].at[n : 2 * n].set(1.0)
    # At U(-0.1, 0.1) two layers are silent, and training first sits on word frequencies.
    model.embedding.embedding[...] = config.embedding * model.embedding.embedding[...]
    return split_layers(model, centred=False, gain_scale=0.01)


def space(config: Config) -> bilevel.Space:
    """Rates between 0 and `top`, penalties above 0."""
    rate = bilevel.Interval(0.0, config.top)
    return bilevel.Space(dict.fromkeys(RATES, rate) | dict.fromkeys(PENALTIES, bilevel.Positive()))


def hparams(rate: float, penalty: float) -> dict[str, Any]:
    """The seven hyperparameters, all rates alike."""
    rates: dict[str, Any] = dict.fromkeys(RATES, jnp.float32(rate))
    return rates | dict.fromkeys(PENALTIES, jnp.float32(penalty))


def zero_carry(batch: int, units: int) -> Any:
    """States ``(c, h)`` of both layers before the first word."""
    zero = jnp.zeros((batch, units))
    return ((zero, zero),) * LAYERS


def losses(network: LayerResponse) -> tuple[Any, Any]:
    """Validation and training loss of a window from a zero state, whose first words only prepare
    it: cross-entropy; and cross-entropy under all noise, with both penalties."""

    def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return _apply(network, params, None, batch)[0]

    def inner(params: Any, hparams: Any, batch: Any) -> jax.Array:
        loss, dropped, raw = _apply(network, params, hparams, batch)
        loss += activation_penalty(dropped, hparams["ar"])
        return loss + temporal_activation_penalty(raw, hparams["tar"])

    return outer, inner


def _apply(network: LayerResponse, params: Any, hparams: Any, batch: Any) -> Any:
    model, d = network.merge(params)
    carry = zero_carry(batch["x"].shape[0], model.first.features)
    key = None if hparams is None else batch["key"]
    logits, _, dropped, raw = model(batch["x"], carry, hparams, key, d)
    counted = batch["y"].shape[1]
    return cross_entropy(logits[:, -counted:], batch["y"]), dropped, raw
