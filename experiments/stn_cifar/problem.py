"""A CNN on colour images with the hyperparameters of the STN paper's: fifteen for its AlexNet."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bilevel.inner.layers import TunedConv, TunedLinear, split_layers
from bilevel.regularizers import color_jitter, cutout, dropout, input_scaling
from experiments.common import data
from experiments.common.stn import CUTOUT as CUTOUT
from experiments.common.stn import JITTER, dropouts, names, pool
from experiments.common.stn import space as space
from experiments.common.stn import start as start
from experiments.stn_cifar.config import Config

SIDE = 32
# Of the pixels of CIFAR-10's training images, as in the paper's code.
MEAN = np.array([0.4914, 0.4824, 0.4467], np.float32)
STD = np.array([0.2471, 0.2435, 0.2616], np.float32)


def neighbourhoods(x: jax.Array, stride: int) -> jax.Array:
    """``(B, H, W, C)`` to its windows of 3 x 3, ``(B, H', W', 9 C)``, with zeros outside.

    They begin where those of a convolution with padding "SAME" and this stride begin.
    """
    height, width = x.shape[1:3]
    before = 1 if stride == 1 else 0
    padded = jnp.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    windows = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(windows, axis=-1)


class CNN(nnx.Module):
    """Convolutions with ReLU, pools and channel dropout, then dense layers with dropout."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config, count = config, len(names(config))
        inputs = (3, *config.channels[:-1])
        pairs = zip(inputs, config.channels, strict=True)
        layers = []
        for i, (a, b) in enumerate(pairs):
            if config.as_products:
                layers.append(TunedLinear(9 * a, b, count, rngs=rngs))
            else:
                stride = 2 if i == 0 else 1
                layers.append(TunedConv(a, b, (3, 3), count, strides=stride, rngs=rngs))
        self.convolutions = nnx.List(layers)
        side = SIDE // 2 ** (1 + len(config.pooled))
        units = (side * side * config.channels[-1], *config.dense, 10)
        self.dense = nnx.List(
            [TunedLinear(a, b, count, rngs=rngs) for a, b in zip(units, units[1:], strict=False)]
        )

    def __call__(self, x: jax.Array, h: Any, d: jax.Array | None, key: Any) -> jax.Array:
        """Logits of normalized images. Without ``key`` nothing is dropped."""
        places = dropouts(self.config)

        def drop(x: jax.Array, name: str, axes: tuple[int, ...] = ()) -> jax.Array:
            if key is None:
                return x
            own = jax.random.fold_in(key, places.index(name))
            return dropout(own, x, h[name], broadcast_axes=axes)

        for i, layer in enumerate(self.convolutions):
            if self.config.as_products:
                x = neighbourhoods(x, 2 if i == 0 else 1)
            x = jax.nn.relu(layer(x, d))
            x = pool(x) if i in self.config.pooled else x
            x = drop(x, f"conv_dropout_{i}", (1, 2))
        x = x.reshape(x.shape[0], -1)
        for i, layer in enumerate(self.dense):
            last = i == len(self.config.dense)
            x = layer(x if last else drop(x, f"dense_dropout_{i}"), d)
            x = x if last else jax.nn.relu(x)
        return x


@functools.cache
def network(config: Config) -> Any:
    """How the weights follow: Delta-STN's response, with a displacement for every example."""
    return split_layers(CNN(config, rngs=nnx.Rngs(0)))[0]


def initial(config: Config, seed: int) -> Any:
    """Fresh weights."""
    return split_layers(CNN(config, rngs=nnx.Rngs(seed)))[1]


def normalised(x: jax.Array) -> jax.Array:
    """Pixels in [0, 1] to channels of mean 0 and variance 1."""
    return (x - MEAN.reshape(1, 1, 1, 3)) / STD.reshape(1, 1, 1, 3)


def augment(config: Config, key: Any, x: jax.Array, h: Any) -> jax.Array:
    """Colour jitter on pixels in [0, 1]; then normalize, drop inputs, scale and cut out."""
    keys = jax.random.split(key, 4)
    x = normalised(color_jitter(keys[0], x, **{name: h[name] for name in JITTER}))
    x = dropout(keys[1], x, h["input_dropout"])
    x = input_scaling(keys[2], x, h["input_scaling"])
    return cutout(keys[3], x, h["cutout_holes"], h["cutout_length"], max_holes=config.max_holes)


def logits(config: Config, params: Any, batch: Any) -> jax.Array:
    """Of images as they are, without dropout."""
    model, d = network(config).merge(params)
    return model(normalised(batch["x"]), None, d, None)


def losses(config: Config) -> tuple[Any, Any]:
    """``(outer, inner)``: cross-entropy of images as they are, and with all that is tuned."""

    def cross_entropy(z: jax.Array, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()

    def outer(params: Any, h: Any, batch: Any) -> jax.Array:
        return cross_entropy(logits(config, params, batch), batch)

    def inner(params: Any, h: Any, batch: Any) -> jax.Array:
        model, d = network(config).merge(params)
        augment_key, drop_key = jax.random.split(batch["key"])
        x = augment(config, augment_key, batch["x"], h)
        return cross_entropy(model(x, h, d, drop_key), batch)

    return outer, inner


def parts(config: Config, seed: int) -> dict[str, Any]:
    """``x`` of shape (n, 32, 32, 3) in [0, 1], and ``y``, of the three parts."""
    if config.data == "digits":
        found = data.digits(valid=config.valid, test=config.test, seed=seed)
        found = data.Dataset(*(data.Split(_coloured(part.x), part.y) for part in found))
    else:
        found = data.cifar10(valid=config.valid, seed=seed)
    rng = np.random.default_rng(seed)
    sizes = (config.train, config.valid, config.test)
    chosen = {}
    for name, part, size in zip(("train", "valid", "test"), found, sizes, strict=True):
        rows = rng.permutation(len(part.y))[:size]
        chosen[name] = {"x": jnp.asarray(part.x[rows]), "y": jnp.asarray(part.y[rows])}
    return chosen


def _coloured(x: np.ndarray) -> np.ndarray:
    """8 x 8 to 32 x 32 x 3: each pixel four times along a side, in three colours alike."""
    return np.repeat(x.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
