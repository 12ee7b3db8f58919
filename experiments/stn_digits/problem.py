"""An MLP with three dropout rates, made of layers that respond to them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import bilevel
from bilevel.inner.layers import TunedLinear, split_layers
from bilevel.regularizers import dropout
from experiments.common import data
from experiments.stn_digits.config import Config

PLACES = ("input", "hidden_1", "hidden_2")
TOTAL = 1797  # images in the set


class MLP(nnx.Module):
    """64 pixels, two hidden layers of ReLU units, 10 logits; dropout before every layer."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        sizes = (64, width, width)
        places = len(PLACES)
        self.layers = nnx.List(
            [
                TunedLinear(a, b, places, rngs=rngs)
                for a, b in zip(sizes, (*sizes[1:], 10), strict=True)
            ]
        )

    def __call__(self, x: jax.Array, rates: Any, d: jax.Array | None, key: Any) -> jax.Array:
        """Logits. Without ``key`` nothing is dropped."""
        for i, (place, layer) in enumerate(zip(PLACES, self.layers, strict=True)):
            if key is not None:
                x = dropout(jax.random.fold_in(key, i), x, rates[place])
            x = layer(x if i == 0 else x, d)
            x = jax.nn.relu(x) if i < len(PLACES) - 1 else x
        return x


@functools.cache
def network(width: int, centred: bool = True) -> Any:
    """How the weights follow: Delta-STN's response (centred) or STN's."""
    model = MLP(width, rngs=nnx.Rngs(0))
    return split_layers(model, centred=centred, gain_scale=0.0 if centred else 0.01)[0]


def initial(width: int, seed: int) -> Any:
    """Fresh weights."""
    return split_layers(MLP(width, rngs=nnx.Rngs(seed)))[1]


def batches(config: Config, seed: int) -> dict[str, Any]:
    """``x`` of shape (n, 64) in [0, 1], and ``y``, of the three parts."""
    test = TOTAL - config.train - config.valid
    sets = data.digits(valid=config.valid, test=test, seed=seed)
    return {
        name: {"x": jnp.asarray(part.x.reshape(-1, 64)), "y": jnp.asarray(part.y)}
        for name, part in zip(("train", "valid", "test"), sets, strict=True)
    }


def logits(width: int, params: Any, rates: Any, batch: Any) -> jax.Array:
    """Of weights as a response gives them; dropout is on if the batch has a key."""
    model, d = network(width).merge(params)
    return model(batch["x"], rates, d, batch.get("key"))


def losses(width: int) -> tuple[Any, Any]:
    """``(outer, inner)``: cross-entropy without and with dropout."""

    def cross_entropy(params: Any, rates: Any, batch: Any) -> jax.Array:
        z = logits(width, params, rates, batch)
        return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()

    def outer(params: Any, rates: Any, batch: Any) -> jax.Array:
        return cross_entropy(params, rates, {"x": batch["x"], "y": batch["y"]})

    return outer, cross_entropy


def split(width: int) -> bilevel.GaussNewton:
    """The training loss as a model and a loss of its outputs, for responses that are linearized."""

    def output_loss(z: jax.Array, rates: Any, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()

    return bilevel.GaussNewton(functools.partial(logits, width), output_loss)


def space(config: Config) -> bilevel.Space:
    """All rates in (0, high)."""
    return bilevel.Space({place: bilevel.Interval(0.0, config.high) for place in PLACES})


def rates(value: Any) -> dict[str, jax.Array]:
    """The same rate in all places."""
    return {place: jnp.asarray(value, jnp.float32) for place in PLACES}
