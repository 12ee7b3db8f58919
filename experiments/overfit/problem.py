"""The bilevel problem of `overfit`: three networks whose weight decays are the hyperparameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel

PIXELS, CLASSES = 784, 10
GRANULARITY = ("per_weight", "per_layer", "one")


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _convolution(key: jax.Array, size: int, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, (size, size, inputs, outputs)) / (size * inputs**0.5)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def initial(model: str, width: int, seed: int) -> Any:
    """Fresh parameters: layers by name, each a kernel and a bias."""
    keys = jax.random.split(jax.random.key(seed), 4)
    if model == "linear":
        return {"readout": _dense(keys[0], PIXELS, CLASSES)}
    if model == "mlp":
        return {
            "hidden": _dense(keys[0], PIXELS, width),
            "readout": _dense(keys[1], width, CLASSES),
        }
    return {
        "conv1": _convolution(keys[0], 5, 1, 8),
        "conv2": _convolution(keys[1], 5, 8, 16),
        "hidden": _dense(keys[2], PIXELS, width),
        "readout": _dense(keys[3], width, CLASSES),
    }


def _stride_two(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A convolution that halves the sides of (N, H, W, C) images, then ReLU."""
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(y + layer["bias"][None, None, None, :])


def _apply(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"][None, :]


def logits(params: Any, x: jax.Array) -> jax.Array:
    """(N, 10) from (N, 28, 28); which network it is shows in its layers."""
    if "conv1" in params:
        x = _stride_two(params["conv2"], _stride_two(params["conv1"], x[..., None]))
    x = x.reshape(x.shape[0], -1)
    if "hidden" in params:
        x = jax.nn.relu(_apply(params["hidden"], x))
    return _apply(params["readout"], x)


def logits_of(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """The outputs on a batch; the decays do not touch them."""
    return logits(params, batch["x"])


def output_loss(outputs: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()


def penalty(params: Any, hparams: Any) -> jax.Array:
    r""":math:`\tfrac12\sum_j e^{\lambda_j} w_j^2`.

    A decay is one number for each weight, each layer or all: it broadcasts to what it belongs to.
    """
    total = jnp.zeros(())
    for name, layer in params.items():
        decay = hparams["all"] if "all" in hparams else hparams[name]
        for part, weights in layer.items():
            own = decay[part] if isinstance(decay, dict) else decay
            total += 0.5 * jnp.sum(jnp.exp(own) * weights**2)
    return total


def operator(damping: float) -> bilevel.GaussNewton:
    """The curvature of cross-entropy and penalty; ``operator.loss`` is the inner loss."""
    return bilevel.GaussNewton(logits_of, output_loss, damping, penalty)


def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """The validation loss: cross-entropy without penalty."""
    return output_loss(logits(params, batch["x"]), hparams, batch)


def decays(params: Any, value: float, granularity: str) -> Any:
    """Log decays at ``value``: one for each weight, one for each layer, or one in all."""
    if granularity == "one":
        return {"all": jnp.full((), value)}
    if granularity == "per_layer":
        return {name: jnp.full((), value) for name in params}
    return jax.tree.map(lambda w: jnp.full(w.shape, value), params)


def metrics(params: Any, batches: dict[str, Any]) -> dict[str, jax.Array]:
    """The loss and the number of images classified right, of every part."""
    measured = {}
    for name, batch in batches.items():
        outputs = logits(params, batch["x"])
        measured[f"{name}_loss"] = output_loss(outputs, None, batch)
        measured[f"{name}_right"] = jnp.sum(jnp.argmax(outputs, -1) == batch["y"])
    return measured
