"""The bilevel problem of `decay`: an MLP whose weight decays are the hyperparameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel

GRANULARITY = ("one", "per_layer", "per_unit", "per_weight")
CLASSES = 10


def initial(inputs: int, hidden: int, seed: int) -> Any:
    """Fresh parameters: two layers, each a kernel (inputs, outputs) and a bias."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "hidden": _dense(keys[0], inputs, hidden),
        "readout": _dense(keys[1], hidden, CLASSES),
    }


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def logits(params: Any, x: jax.Array) -> jax.Array:
    """(N, 10) from (N, inputs)."""
    first, second = params["hidden"], params["readout"]
    x = jnp.tanh(x @ first["kernel"] + first["bias"][None, :])
    return x @ second["kernel"] + second["bias"][None, :]


def logits_of(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """The outputs on a batch; the decays do not touch them."""
    return logits(params, batch["x"])


def cross_entropy(outputs: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()


def penalty(params: Any, hparams: Any) -> jax.Array:
    r""":math:`\tfrac12\sum_j e^{\lambda_j} w_j^2`.

    A decay broadcasts against what it belongs to: a weight, the weights that leave a unit, or a
    kernel.
    """
    decays = hparams["all"] if "all" in hparams else hparams
    total = jnp.zeros(())
    for name, layer in params.items():
        for part, weights in layer.items():
            own = decays[name][part] if "all" not in hparams else decays
            total += 0.5 * jnp.sum(jnp.exp(own) * weights**2)
    return total


def decays(params: Any, value: float, granularity: str) -> Any:
    """Log decays at ``value``.

    ``one``: a single number. ``per_layer``: one for each kernel and each bias. ``per_unit``: one
    for the weights that leave a unit (a pixel or a hidden unit), and one for each bias.
    ``per_weight``: one for every weight.
    """
    if granularity == "one":
        return {"all": jnp.full((), value)}
    shapes = {
        "per_layer": lambda w: (),
        "per_unit": lambda w: (w.shape[0], 1) if w.ndim == 2 else (),
        "per_weight": lambda w: w.shape,
    }
    shape = shapes[granularity]
    return jax.tree.map(lambda w: jnp.full(shape(w), value, w.dtype), params)


def operator(damping: float) -> bilevel.GaussNewton:
    """The curvature of cross-entropy and penalty; ``operator.loss`` is the training loss."""
    return bilevel.GaussNewton(logits_of, cross_entropy, damping, penalty)


def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """The validation loss: cross-entropy without penalty."""
    return cross_entropy(logits(params, batch["x"]), hparams, batch)


def metrics(params: Any, batches: dict[str, Any]) -> dict[str, jax.Array]:
    """Loss and error on every part."""
    measured = {}
    for name, batch in batches.items():
        outputs = logits(params, batch["x"])
        measured[f"{name}_loss"] = cross_entropy(outputs, None, batch)
        measured[f"{name}_error"] = jnp.mean(jnp.argmax(outputs, -1) != batch["y"])
    return measured
