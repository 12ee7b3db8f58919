"""The networks of `augment`: classifiers, and two whose weights are hyperparameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

CLASSES = 10


class SmallCNN(nnx.Module):
    """Convolutions 3x3 of stride 2 with ReLU, then one hidden dense layer."""

    def __init__(
        self, side: int, channels: int, widths: tuple[int, ...], hidden: int, rngs: nnx.Rngs
    ):
        sizes = (channels, *widths)
        self.convolutions = nnx.List(
            [
                nnx.Conv(a, b, (3, 3), (2, 2), rngs=rngs)
                for a, b in zip(sizes[:-1], widths, strict=True)
            ]
        )
        last = -(-side // 2 ** len(widths))
        self.hidden = nnx.Linear(last * last * widths[-1], hidden, rngs=rngs)
        self.readout = nnx.Linear(hidden, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        return self.readout(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Block(nnx.Module):
    """A residual block of two convolutions, normalized in groups."""

    def __init__(self, before: int, after: int, stride: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(before, after, (3, 3), (stride, stride), use_bias=False, rngs=rngs)
        self.second = nnx.Conv(after, after, (3, 3), use_bias=False, rngs=rngs)
        groups = min(32, after)
        self.norms = nnx.List([nnx.GroupNorm(after, num_groups=groups, rngs=rngs) for _ in "ab"])
        self.shortcut = nnx.List([])
        if stride > 1 or before != after:
            self.shortcut.append(
                nnx.Conv(before, after, (1, 1), (stride, stride), use_bias=False, rngs=rngs)
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        for shortcut in self.shortcut:
            x = shortcut(x)
        return nnx.relu(y + x)


class ResNet18(nnx.Module):
    """ResNet-18 for small images (He et al. 2016), with group in place of batch norm.

    Batch norm's statistics would tie the examples of a batch together, and with them the
    augmentation of one image to the loss of another.
    """

    def __init__(self, channels: int, width: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(channels, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=min(32, width), rngs=rngs)
        blocks, before = [], width
        for stage in range(4):
            after = width * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(Block(before, after, stride, rngs))
                before = after
        self.blocks = nnx.List(blocks)
        self.readout = nnx.Linear(before, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.readout(x.mean((1, 2)))


class UNet(nnx.Module):
    r"""The augmentation network: :math:`x \mapsto \mathrm{warp}(x, u) + r`.

    Two levels down and up, with skip connections. It reads the image and its noise, constant
    over the image, and gives for every pixel an additive change r and a displacement
    :math:`u = s\tanh(\cdot)`, in pixels. With zeros in its last layer it is the identity,
    which is a stationary point, since r and u then do not depend on the noise: it starts small.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        noise: int,
        reach: float,
        strength: float,
        start: float,
        rngs: nnx.Rngs,
    ):
        self.reach, self.strength, self.channels = reach, strength, channels
        self.down0 = nnx.Conv(channels + noise, width, (3, 3), (2, 2), rngs=rngs)
        self.down1 = nnx.Conv(width, 2 * width, (3, 3), (2, 2), rngs=rngs)
        self.middle = nnx.Conv(2 * width, 2 * width, (3, 3), rngs=rngs)
        self.up1 = nnx.Conv(3 * width, width, (3, 3), rngs=rngs)
        self.up0 = nnx.Conv(
            width + channels,
            channels + 2,
            (3, 3),
            kernel_init=nnx.initializers.normal(start),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        spread = jnp.broadcast_to(noise[:, None, None, :], (*x.shape[:3], noise.shape[-1]))
        fine = nnx.silu(self.down0(jnp.concatenate([x - 0.5, spread], -1)))
        coarse = nnx.silu(self.down1(fine))
        coarse = nnx.silu(self.middle(coarse))
        fine = nnx.silu(self.up1(jnp.concatenate([_doubled(coarse, fine), fine], -1)))
        out = jnp.tanh(self.up0(jnp.concatenate([_doubled(fine, x), x - 0.5], -1)))
        change = self.strength * out[..., : self.channels]
        return warp(x, self.reach * out[..., self.channels :]) + change


def _doubled(x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)[:, : like.shape[1], : like.shape[2]]


def warp(images: jax.Array, moves: jax.Array) -> jax.Array:
    """Each pixel read `moves` (B, H, W, 2) pixels away, bilinearly; edges are continued."""
    height, width = images.shape[1:3]
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")

    def one(image: jax.Array, move: jax.Array) -> jax.Array:
        row = jnp.clip(rows + move[..., 0], 0, height - 1)
        column = jnp.clip(columns + move[..., 1], 0, width - 1)
        top = jnp.clip(jnp.floor(row).astype(jnp.int32), 0, height - 2)
        left = jnp.clip(jnp.floor(column).astype(jnp.int32), 0, width - 2)
        down, right = (row - top)[..., None], (column - left)[..., None]
        upper = image[top, left] * (1 - right) + image[top, left + 1] * right
        lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
        return upper * (1 - down) + lower * down

    return jax.vmap(one)(images, moves)


class Reweighter(nnx.Module):
    r"""Weights of examples, :math:`v_i = B\,\mathrm{softmax}_i(\log\sigma(m(\ell_i)))`.

    A hidden layer on the loss of an example; the weights of a batch have mean 1. The last layer
    starts at zero: all weights are 1.
    """

    def __init__(self, hidden: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(1, hidden, rngs=rngs)
        self.readout = nnx.Linear(hidden, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, losses: jax.Array) -> jax.Array:
        scores = self.readout(nnx.tanh(self.hidden(losses[:, None])))[:, 0]
        weights = nnx.sigmoid(scores)
        return weights / weights.mean()


def pieces(module: nnx.Module) -> tuple[Any, Any]:
    """The static part of a module, and its weights as a plain dictionary of arrays."""
    graph, weights = nnx.split(module, nnx.Param)
    return graph, nnx.to_pure_dict(weights)


def call(graph: Any, weights: Any, *arguments: jax.Array) -> jax.Array:
    """The module with these weights, called."""
    return nnx.merge(graph, nnx.State(weights))(*arguments)
