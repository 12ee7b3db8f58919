"""The convolutional network of `stn_cifar` and `stn_fashion`, its losses, and its plain training.

Their configs have, beside those of `stn`: ``pooled``, ``as_products``, ``lr`` and ``batch``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bilevel
from bilevel.inner.layers import TunedConv, TunedLinear, split_layers
from bilevel.regularizers import color_jitter, cutout, dropout, input_scaling
from experiments.common import batches
from experiments.common.stn import JITTER, dropouts, names, pool

CLASSES = 10


def neighbourhoods(x: jax.Array, stride: int) -> jax.Array:
    """``(B, H, W, C)`` to its windows of 3 x 3, ``(B, H', W', 9 C)``, with zeros outside.

    They begin where those of a convolution with padding "SAME" and this stride begin, on sides
    that the stride divides. A dense layer on them is a convolution: XLA on CPU runs the products
    of a scan fast, and the gradients of convolutions there slowly.
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
    """Convolutions with ReLU, pools and channel dropout, then dense layers with dropout.

    Args:
      config: with the channels and the units.
      side, colours: of the images.
    """

    def __init__(self, config: Any, side: int, colours: int, *, rngs: nnx.Rngs):
        self.config, count = config, len(names(config))
        inputs, layers = (colours, *config.channels[:-1]), []
        for i, (a, b) in enumerate(zip(inputs, config.channels, strict=True)):
            if config.as_products:
                layers.append(TunedLinear(9 * a, b, count, rngs=rngs))
            else:
                layers.append(TunedConv(a, b, (3, 3), count, strides=_stride(i), rngs=rngs))
        self.convolutions = nnx.List(layers)
        side //= 2
        for _ in range(sum(i < len(config.channels) for i in config.pooled)):
            side //= 2
        units = (side * side * config.channels[-1], *config.dense, CLASSES)
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
                x = neighbourhoods(x, _stride(i))
            x = jax.nn.relu(layer(x, d))
            x = pool(x) if i in self.config.pooled else x
            x = drop(x, f"conv_dropout_{i}", (1, 2))
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.dense
        for i, layer in enumerate(hidden):
            x = jax.nn.relu(layer(drop(x, f"dense_dropout_{i}"), d))
        return last(x, d)


def _stride(index: int) -> int:
    return 2 if index == 0 else 1


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and how it reads images.

    Attributes:
      config: of the experiment.
      side, colours: of the images.
      normalized: pixels in [0, 1] to what the network reads, ``(B, side, side, colours)``.
    """

    config: Any
    side: int
    colours: int
    normalized: Callable[[jax.Array], jax.Array]

    def _made(self, seed: int) -> CNN:
        return CNN(self.config, self.side, self.colours, rngs=nnx.Rngs(seed))

    def network(self, centred: bool = True) -> Any:
        """How the weights follow, a displacement per example: Delta-STN's response, or STN's."""
        made = nnx.eval_shape(lambda: self._made(0))
        return split_layers(made, centred=centred, gain_scale=0.0 if centred else 0.01)[0]

    def initial(self, seed: int) -> Any:
        """Fresh weights."""
        return split_layers(self._made(seed))[1]

    def augment(self, key: Any, x: jax.Array, h: Any) -> jax.Array:
        """Colour jitter on ``(B, side, side, 3)``; normalize, drop inputs, scale and cut out."""
        keys = jax.random.split(key, 4)
        x = self.normalized(color_jitter(keys[0], x, **{name: h[name] for name in JITTER}))
        x = dropout(keys[1], x, h["input_dropout"])
        x = input_scaling(keys[2], x, h["input_scaling"])
        holes, length = h["cutout_holes"], h["cutout_length"]
        return cutout(keys[3], x, holes, length, max_holes=self.config.max_holes)

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        """Of images as they are, ``(B, side, side, 3)``, without dropout."""
        model, d = _network(self).merge(params)
        return model(self.normalized(x), None, d, None)

    def losses(self) -> tuple[Any, Any]:
        """``(outer, inner)``: cross-entropy of images as they are, and with all that is tuned."""

        def outer(params: Any, h: Any, batch: Any) -> jax.Array:
            return cross_entropy(self.logits(params, coloured(batch["x"])), batch["y"])

        def inner(params: Any, h: Any, batch: Any) -> jax.Array:
            model, d = _network(self).merge(params)
            augment_key, drop_key = jax.random.split(batch["key"])
            x = self.augment(augment_key, coloured(batch["x"]), h)
            return cross_entropy(model(x, h, d, drop_key), batch["y"])

        return outer, inner

    def evaluated(self, params: Any, parts: Any) -> dict[str, jax.Array]:
        """Loss and error of plain weights on each part, a few hundred examples at a time.

        The neighbourhoods of all would not fit.
        """
        measured = {}
        for name, part in parts.items():
            blocks = max(1, len(part["y"]) // 500)

            def one(block: Any) -> tuple[jax.Array, jax.Array]:
                z = self.logits(params, coloured(block["x"]))
                return cross_entropy(z, block["y"]), jnp.mean(jnp.argmax(z, -1) != block["y"])

            def blocked(a: jax.Array, blocks: int = blocks) -> jax.Array:
                return a[: len(a) // blocks * blocks].reshape(blocks, -1, *a.shape[1:])

            loss, error = jax.lax.map(one, jax.tree.map(blocked, part))
            measured[f"{name}_loss"], measured[f"{name}_error"] = loss.mean(), error.mean()
        return measured


# A Task made anew for the same config is equal to the last one: it has its network already.
_network = functools.cache(Task.network)


def cross_entropy(z: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over examples."""
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def coloured(x: jax.Array) -> jax.Array:
    """Gray images ``(B, H, W)`` in three colours alike; colour images as they are."""
    return jnp.broadcast_to(x[..., None], (*x.shape, 3)) if x.ndim == 3 else x


def sample(config: Any, steps: int, valid_batch: int, train: Any, valid: Any, key: Any) -> Any:
    """Batches of a cycle: a stack to train, with keys of dropout, and one to validate."""
    inner_key, outer_key, drop_key = jax.random.split(key, 3)
    inner_batches = batches.draw(train, inner_key, (steps, config.batch))
    inner_batches["key"] = jax.random.split(drop_key, steps)
    return inner_batches, batches.draw(valid, outer_key, (valid_batch,))


def trained(task: Task, tx: optax.GradientTransformation, steps: int, points: int) -> Any:
    """``(params, schedule, key, train, held_out) -> measured`` of one plain run.

    ``schedule`` is hyperparameters, leaves ``(k,)``: the run is cut in k equal parts, and each
    reads its own. ``measured`` is stacked over the points.
    """
    network, (_, inner) = _network(task), task.losses()
    every = steps // points

    @jax.jit
    def some(state: Any, first: jax.Array, schedule: Any, key: Any, train: Any, held_out: Any):

        def loss(params: Any, schedule: Any, t: jax.Array) -> jax.Array:
            batch_key, drop_key = jax.random.split(jax.random.fold_in(key, t))
            batch = {**batches.draw(train, batch_key, (task.config.batch,)), "key": drop_key}
            count = len(jax.tree.leaves(schedule)[0])
            row = jnp.minimum(t * count // steps, count - 1)
            hparams = jax.tree.map(lambda x: x[row], schedule)
            return inner(network.plain(None, params), hparams, batch)

        # A stretch is too long to be straight-line code.
        state, _ = bilevel.descend(
            loss, tx, state, schedule, first + jnp.arange(every), steps=every, unroll=False
        )
        return state, task.evaluated(network.plain(None, state.params), held_out)

    def whole(params: Any, schedule: Any, key: Any, train: Any, held_out: Any) -> Any:
        state, rows = bilevel.InnerState(params, tx.init(params)), []
        for i in range(points):
            state, row = some(state, i * every, schedule, key, train, held_out)
            rows.append(row)
        return jax.tree.map(lambda *a: jnp.stack(a), *rows)

    return whole


def chosen(found: Any, config: Any, rng: np.random.Generator) -> dict[str, Any]:
    """As many images of each part as the config asks for, drawn by ``rng``: ``x`` and ``y``."""
    sizes = (config.train, config.valid, config.test)
    drawn = {}
    for name, part, size in zip(("train", "valid", "test"), found, sizes, strict=True):
        rows = rng.permutation(len(part.y))[:size]
        drawn[name] = {"x": np.asarray(part.x[rows], np.float32), "y": part.y[rows]}
    return drawn
