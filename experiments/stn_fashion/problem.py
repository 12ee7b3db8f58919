"""A CNN on gray images with the fifteen hyperparameters of the STN paper's CNN."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bilevel.inner.layers import TunedLinear, split_layers
from bilevel.regularizers import color_jitter, cutout, dropout, input_scaling
from experiments.common import data
from experiments.common.stn import CUTOUT as CUTOUT
from experiments.common.stn import JITTER, dropouts, names, pool
from experiments.common.stn import space as space
from experiments.common.stn import start as common_start
from experiments.stn_fashion.config import Config

SIDE = 28
MEAN, STD = 0.286, 0.353  # of the pixels of Fashion-MNIST's training images
# On gray images these two do nothing: nothing that is learnt may move them.
IDLE = ("saturation", "hue")
POOLED = 2  # the first convolutions are followed by a pool


def patches(x: jax.Array, stride: int) -> jax.Array:
    """``(B, H, W, C)`` to the 3 x 3 neighbourhoods ``(B, H', W', 9 C)``, zeros outside.

    A dense layer on them is a convolution. XLA on CPU runs the products of a scan fast, and
    the gradients of convolutions there slowly.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(parts, axis=-1)


class CNN(nnx.Module):
    """Convolutions (the first with stride 2, pools after two), then dense layers."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        count = len(names(config))
        side = SIDE // 2
        for _ in config.channels[:POOLED]:
            side //= 2
        inputs = (1, *config.channels[:-1])
        self.convolutions = nnx.List(
            [
                TunedLinear(9 * a, b, count, rngs=rngs)
                for a, b in zip(inputs, config.channels, strict=True)
            ]
        )
        units = (side**2 * config.channels[-1], *config.dense, 10)
        self.dense = nnx.List(
            [TunedLinear(a, b, count, rngs=rngs) for a, b in itertools.pairwise(units)]
        )
        self.dropouts = dropouts(config)

    def __call__(self, x: jax.Array, h: Any, d: jax.Array | None, key: Any) -> jax.Array:
        """Logits of normalized images. Without ``key`` nothing is dropped."""

        def drop(x: jax.Array, name: str, axes: tuple[int, ...] = ()) -> jax.Array:
            if key is None:
                return x
            fold = jax.random.fold_in(key, self.dropouts.index(name))
            return dropout(fold, x, h[name], broadcast_axes=axes)

        for i, layer in enumerate(self.convolutions):
            x = layer(patches(x, 2 if i == 0 else 1), d)
            x = jax.nn.relu(pool(x) if i < POOLED else x)
            x = drop(x, f"conv_dropout_{i}", (1, 2))
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.dense
        for i, layer in enumerate(hidden):
            x = jax.nn.relu(layer(drop(x, f"dense_dropout_{i}"), d))
        return last(x, d)


def start(config: Config, rate: float | None = None) -> dict[str, jax.Array]:
    """Where tuning starts; with ``rate`` all dropout starts there."""
    moved = {} if rate is None else {name: jnp.float32(rate) for name in dropouts(config)}
    return {**common_start(config), **moved}


@functools.cache
def network(config: Config, centred: bool = True) -> Any:
    """How the weights follow, a displacement per example: Delta-STN's response, or STN's."""
    made = nnx.eval_shape(lambda: CNN(config, rngs=nnx.Rngs(0)))
    return split_layers(made, centred=centred, gain_scale=0.0 if centred else 0.01)[0]


def initial(config: Config, seed: int) -> Any:
    """Fresh weights."""
    return split_layers(CNN(config, rngs=nnx.Rngs(seed)))[1]


def augment(config: Config, key: Any, x: jax.Array, h: Any) -> jax.Array:
    """Jitter on pixels in [0, 1]; then normalize, drop inputs, scale and cut out."""
    keys = jax.random.split(key, 4)
    colours = jnp.broadcast_to(x[..., None], (*x.shape, 3))
    jittered = color_jitter(keys[0], colours, **{name: h[name] for name in JITTER})
    x = normalised(jittered[..., 0])
    x = dropout(keys[1], x, h["input_dropout"])
    x = input_scaling(keys[2], x, h["input_scaling"])
    return cutout(keys[3], x, h["cutout_holes"], h["cutout_length"], max_holes=config.max_holes)


def normalised(x: jax.Array) -> jax.Array:
    """``(B, 28, 28)`` to ``(B, 28, 28, 1)`` of mean 0 and variance 1."""
    return ((x - MEAN) / STD)[..., None]


def shown(x: np.ndarray) -> np.ndarray:
    """Back from ``normalised`` to gray values in [0, 1]."""
    return np.clip(x[..., 0] * STD + MEAN, 0, 1)


def logits(config: Config, params: Any, batch: Any) -> jax.Array:
    """Of clean images, without dropout."""
    model, d = network(config).merge(params)
    return model(normalised(batch["x"]), None, d, None)


def losses(config: Config) -> tuple[Any, Any]:
    """``(outer, inner)``: cross-entropy of clean images, and with all that is tuned."""

    def entropy(z: jax.Array, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()

    def outer(params: Any, h: Any, batch: Any) -> jax.Array:
        return entropy(logits(config, params, batch), batch)

    def inner(params: Any, h: Any, batch: Any) -> jax.Array:
        model, d = network(config).merge(params)
        augment_key, drop_key = jax.random.split(batch["key"])
        x = augment(config, augment_key, batch["x"], h)
        return entropy(model(x, h, d, drop_key), batch)

    return outer, inner


def sets(config: Config, seed: int) -> dict[str, Any]:
    """The parts, and validation and test with an occluder on every image.

    The square has the mean gray of the set, as a hole of cutout, and a place drawn by ``seed``.
    """
    if config.data == "digits":
        found = data.digits(valid=config.valid, test=config.test, seed=seed)
        found = data.Dataset(*(data.Split(_enlarge(part.x), part.y) for part in found))
    else:
        found = data.fashion_mnist(valid=config.valid, seed=seed)
    draw = np.random.default_rng(seed)
    parts = {}
    sizes = (config.train, config.valid, config.test)
    for name, part, size in zip(("train", "valid", "test"), found, sizes, strict=True):
        chosen = draw.permutation(len(part.y))[:size]
        parts[name] = data.Split(np.asarray(part.x[chosen], np.float32), part.y[chosen])
    for name in ("valid", "test"):
        hidden = _occlude(parts[name].x, config.occluder, MEAN, draw)
        parts[f"{name}_occluded"] = data.Split(hidden, parts[name].y)
    return {
        name: {"x": jnp.asarray(part.x), "y": jnp.asarray(part.y)} for name, part in parts.items()
    }


def _enlarge(x: np.ndarray) -> np.ndarray:
    """8 x 8 to 28 x 28: each pixel thrice, within a margin of two."""
    return np.pad(x.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))


def _occlude(x: np.ndarray, side: int, value: float, draw: np.random.Generator) -> np.ndarray:
    """A square of one gray value somewhere inside every image."""
    x = x.copy()
    for image, (i, j) in zip(x, draw.integers(0, SIDE - side + 1, (len(x), 2)), strict=True):
        image[i : i + side, j : j + side] = value
    return x
