"""The two networks of W5, each twice: plain functions on arrays, and best-response layers.

Both apply the three tuned dropout rates at the same places: to the input (of the LSTM: to the
embeddings), behind the first layer and behind the second. A rate is a scalar, or one per example.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bilevel.inner.layers import TunedConv, TunedEmbedding, TunedLinear, TunedLSTMCell
from bilevel.inner.recurrence import lstm

RATES = 3


@dataclasses.dataclass(frozen=True)
class Drop:
    """Dropout behind layer i; `keys=None` for none. Sequences share a mask over time."""

    rates: Any
    keys: Any
    rule: Callable[..., jax.Array]
    locked: bool = False

    def __call__(self, i: int, x: jax.Array) -> jax.Array:
        if self.keys is None:
            return x
        axes = (1,) if self.locked else ()
        return self.rule(self.keys[i], x, self.rates[..., i], broadcast_axes=axes)


def drop_by_hand(key: Any, x: jax.Array, rate: Any, *, broadcast_axes: Any = ()) -> jax.Array:
    """Inverted dropout at one rate."""
    shape = [1 if i in broadcast_axes else n for i, n in enumerate(x.shape)]
    kept = jax.random.uniform(key, shape, jnp.float32) < 1 - rate  # whatever the dtype of x
    return x * jnp.where(kept, 1 / (1 - rate), 0).astype(x.dtype)


def _uniform(key: Any, *shape: int) -> jax.Array:
    fan_in = 1
    for n in shape[:-1]:
        fan_in *= n
    return jax.random.uniform(key, shape, jnp.float32, -1, 1) / jnp.sqrt(jnp.float32(fan_in))


def _layer(key: Any, *shape: int) -> dict[str, jax.Array]:
    return {"kernel": _uniform(key, *shape), "bias": jnp.zeros(shape[-1], jnp.float32)}


def _affine(x: jax.Array, layer: Any) -> jax.Array:
    return _plus(x @ layer["kernel"], layer["bias"])


def _plus(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def _halve(x: jax.Array) -> jax.Array:
    """Means over 2 x 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


@dataclasses.dataclass(frozen=True)
class CNN:
    """Two 3 x 3 convolutions, each followed by a pooling, and a linear readout."""

    side: int = 28
    channels: tuple[int, int] = (16, 32)
    classes: int = 10

    locked = False

    def init(self, key: Any) -> Any:
        """Parameters of the plain network."""
        (m, n), keys = self.channels, jax.random.split(key, 3)
        return {
            "first": _layer(keys[0], 3, 3, 1, m),
            "second": _layer(keys[1], 3, 3, m, n),
            "readout": _layer(keys[2], (self.side // 4) ** 2 * n, self.classes),
        }

    def __call__(self, params: Any, x: jax.Array, drop: Drop) -> jax.Array:
        """Logits of images `(B, side, side, 1)`."""

        def convolve(layer: Any, x: jax.Array) -> jax.Array:
            dims = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=dims
            )
            return _plus(y, layer["bias"])

        x = drop(0, x)
        x = drop(1, _halve(jax.nn.relu(convolve(params["first"], x))))
        x = drop(2, _halve(jax.nn.relu(convolve(params["second"], x))))
        return _affine(x.reshape(len(x), -1), params["readout"])

    def layered(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network of best-response layers, called `(x, drop, d)`."""
        return _LayeredCNN(self, rngs)


class _LayeredCNN(nnx.Module):
    def __init__(self, sizes: CNN, rngs: nnx.Rngs):
        m, n = sizes.channels
        self.first = TunedConv(1, m, (3, 3), RATES, rngs=rngs)
        self.second = TunedConv(m, n, (3, 3), RATES, rngs=rngs)
        width = (sizes.side // 4) ** 2 * n
        self.readout = TunedLinear(width, sizes.classes, RATES, rngs=rngs)

    def __call__(self, x: jax.Array, drop: Drop, d: Any) -> jax.Array:
        x = drop(0, x)
        x = drop(1, _halve(jax.nn.relu(self.first(x, d))))
        x = drop(2, _halve(jax.nn.relu(self.second(x, d))))
        return self.readout(x.reshape(len(x), -1), d)


@dataclasses.dataclass(frozen=True)
class LSTM:
    """Embedding, two LSTM layers and a decoder that does not respond in layer mode.

    The recurrence is the library's in every column: its kernel's gradient is one product, not a
    sum over the steps, which is faster for the ordinary step as well.
    """

    words: int = 1000
    features: int = 256

    locked = True

    def init(self, key: Any) -> Any:
        """Parameters of the plain network."""
        n, keys = self.features, jax.random.split(key, 6)
        params: dict[str, Any] = {
            f"lstm{i}": {
                "inputs": _layer(keys[2 * i], n, 4 * n),
                "kernel": _uniform(keys[2 * i + 1], n, 4 * n),
            }
            for i in range(2)
        }
        table = jax.random.uniform(keys[4], (self.words, n), jnp.float32, -0.1, 0.1)
        return params | {"embedding": table, "readout": _layer(keys[5], n, self.words)}

    def __call__(self, params: Any, tokens: jax.Array, drop: Drop) -> jax.Array:
        """Logits of the next words, `(B, T, words)`, for `tokens` of shape `(B, T)`."""
        x = drop(0, params["embedding"][tokens])
        for i in range(2):
            x = drop(i + 1, self._sequence(params[f"lstm{i}"], x))
        return _affine(x, params["readout"])

    def _sequence(self, layer: Any, xs: jax.Array) -> jax.Array:
        projected = jnp.swapaxes(_affine(xs, layer["inputs"]), 0, 1)
        zeros = jnp.zeros((len(xs), self.features), xs.dtype)
        outputs = lstm((zeros, zeros), projected, layer["kernel"])[1]
        return jnp.swapaxes(outputs, 0, 1)

    def layered(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network of best-response layers, called `(tokens, drop, d)`."""
        return _LayeredLSTM(self, rngs)


class _LayeredLSTM(nnx.Module):
    def __init__(self, sizes: LSTM, rngs: nnx.Rngs):
        n = sizes.features
        self.embedding = TunedEmbedding(sizes.words, n, RATES, rngs=rngs)
        self.first = TunedLSTMCell(n, n, RATES, rngs=rngs)
        self.second = TunedLSTMCell(n, n, RATES, rngs=rngs)
        self.readout = nnx.Param(_uniform(rngs.params(), n, sizes.words))
        self.bias = nnx.Param(jnp.zeros(sizes.words, jnp.float32))

    def __call__(self, tokens: jax.Array, drop: Drop, d: Any) -> jax.Array:
        x = drop(0, self.embedding(tokens, d))
        for i, cell in enumerate((self.first, self.second)):
            start = cell.start(len(tokens), x.dtype)
            x = drop(i + 1, cell.sequence(start, x, d)[1])
        return _plus(x @ self.readout[...], self.bias[...])
