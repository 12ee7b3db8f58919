r"""An LSTM language model whose regularization has a derivative.

Dropout is multiplicative Gaussian noise, :math:`x (1 + s\varepsilon)` with
:math:`s^2 = r / (1 - r)`, which has the mean and variance of dropout of rate r (Srivastava et
al. 2014; Kingma, Salimans and Welling 2015) but, unlike it, a derivative in r. All strengths
broadcast: one for all, one for a unit, a word, or a weight.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from bilevel.inner.recurrence import lstm_step
from bilevel.regularizers import (
    activation_penalty,
    l2_penalty,
    penalty_init,
    temporal_activation_penalty,
)
from experiments.lstm.config import Config

DECAYED = ("embedding", "inputs", "recurrent")  # biases are left alone
Carry = tuple[tuple[jax.Array, jax.Array], ...]


def initial(config: Config, words: int, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters; kernels and embeddings are uniform, the forget gate starts open."""
    n, keys = config.units, jax.random.split(key, 2 * config.layers + 1)
    draw = lambda k, *shape: jax.random.uniform(k, shape, minval=-(n**-0.5), maxval=n**-0.5)  # noqa: E731
    params: dict[str, Any] = {
        "embedding": jax.random.uniform(keys[0], (words, n), minval=-0.1, maxval=0.1),
        "decoder_bias": jnp.zeros(words),
    }
    for i in range(config.layers):
        params[f"lstm_{i}"] = {
            "inputs": draw(keys[2 * i + 1], n, 4 * n),
            "recurrent": draw(keys[2 * i + 2], n, 4 * n),
            "bias": jnp.zeros(4 * n).at[n : 2 * n].set(1.0),
        }
    return params


def hparams(config: Config, params: dict[str, Any], many: bool) -> dict[str, Any]:
    """The start of tuning: one number for each kind; with ``many`` also an offset for each unit,
    word and weight, at zero. All are raw: see `strengths`."""
    words, n = params["embedding"].shape
    places = ["input", "output", "recurrent"] + ["between"] * (config.layers > 1)
    shapes = {name: (n,) for name in places} | {"words": (words,)}
    rate, decay = (
        bilevel.Interval(*ends).unconstrain(jnp.float32(value))
        for value, ends in ((config.rate, config.rates), (config.decay, config.decays))
    )
    start = {
        "rates": dict.fromkeys(shapes, rate),
        "decays": dict.fromkeys(penalty_init(params, 1.0, leaves=DECAYED), decay),
        "ar": jnp.float32(config.penalty),
        "tar": jnp.float32(config.penalty),
    }
    if not many:
        return {"shared": start}
    own = {
        "rates": {name: jnp.zeros(shape) for name, shape in shapes.items()},
        "decays": penalty_init(params, 1.0, "weight", leaves=DECAYED),
        "ar": jnp.zeros(n),
        "tar": jnp.zeros(n),
    }
    return {"shared": start, "own": own}


def strengths(config: Config, hparams: dict[str, Any]) -> dict[str, Any]:
    """What the loss reads: rates and log decays in their ranges, and log penalties."""
    raw = hparams["shared"]
    if "own" in hparams:
        # Offsets of mean zero: the shared number stays what it is without them.
        raw = jax.tree.map(lambda x, own: x + own - own.mean(), raw, hparams["own"])
    bounded = {
        name: jax.tree.map(bilevel.Interval(*ends).constrain, raw[name])
        for name, ends in (("rates", config.rates), ("decays", config.decays))
    }
    return raw | bounded


def zero_carry(config: Config, batch: int) -> Carry:
    """States ``(c, h)`` of every layer before the first word."""
    zero = jnp.zeros((batch, config.units))
    return ((zero, zero),) * config.layers


def factors(key: jax.Array, shape: tuple[int, ...], rate: jax.Array) -> jax.Array:
    """Noise of mean one and the variance of dropout; the second half of the batch mirrors the
    first, which cancels the part of a hypergradient that is odd in the noise."""
    half = jax.random.normal(key, (shape[0] // 2, *shape[1:]))
    return 1 + jnp.sqrt(rate / (1 - rate)) * jnp.concatenate([half, -half])


def _layer(
    weights: Any, carry: Any, xs: jax.Array, held: jax.Array | None
) -> tuple[Any, jax.Array]:
    """All steps of ``xs``, (B, T, n); ``held`` (B, n) multiplies what the recurrence reads."""
    projected = jnp.swapaxes(xs @ weights["inputs"] + weights["bias"], 0, 1)
    kernel = weights["recurrent"]

    def step(carry: Any, x: jax.Array) -> Any:
        h = carry[1]
        return lstm_step(carry, x + (h if held is None else h * held) @ kernel)

    carry, outputs = jax.lax.scan(step, carry, projected)
    return carry, jnp.swapaxes(outputs, 0, 1)


def forward(
    params: Any, tokens: jax.Array, carry: Carry, rates: Any = None, key: Any = None
) -> tuple[jax.Array, Carry, jax.Array, jax.Array]:
    """Logits (B, T, V), the new carry, and the last layer's output dropped and raw.

    Without ``rates`` nothing is noisy. Word noise is held for a window, recurrent noise too.
    """
    x = params["embedding"][tokens]
    words, n = params["embedding"].shape
    layers = len(carry)
    keys: Any = None if rates is None else jax.random.split(key, 2 * layers + 2)
    if rates is not None:
        of_words = factors(keys[0], (tokens.shape[0], words), rates["words"])
        x = x * jnp.take_along_axis(of_words, tokens, axis=1)[..., None]
    new = []
    for i in range(layers):
        held = None
        if rates is not None:
            x = x * factors(keys[2 * i + 1], x.shape, rates["between" if i else "input"])
            held = factors(keys[2 * i + 2], (x.shape[0], n), rates["recurrent"])
        state, x = _layer(params[f"lstm_{i}"], carry[i], x, held)
        new.append(state)
    raw = x
    if rates is not None:
        x = x * factors(keys[-1], x.shape, rates["output"])
    return x @ params["embedding"].T + params["decoder_bias"], tuple(new), x, raw


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over all positions, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def inner(
    config: Config, params: Any, hparams: Any, batch: Any, carry: Carry
) -> tuple[jax.Array, Carry]:
    """Training loss of a window: noise, decays, activation penalties; the state goes on."""
    mine = jax.tree.map(lambda leaf: leaf[batch["rows"]], carry)
    strength = strengths(config, hparams)
    logits, new, dropped, raw = forward(params, batch["x"], mine, strength["rates"], batch["key"])
    loss = cross_entropy(logits, batch["y"])
    # A strength per unit: the activations take its square root along.
    loss += activation_penalty(dropped * jnp.exp(0.5 * strength["ar"]), 1.0)
    loss += temporal_activation_penalty(raw * jnp.exp(0.5 * strength["tar"]), 1.0)
    return loss + l2_penalty(params, strength["decays"]), new


def outer(params: Any, hparams: Any, batch: Any, carry: Carry) -> tuple[jax.Array, Carry]:
    """Validation loss of a window without any regularization, from a zero state."""
    skip = batch["x"].shape[1] - batch["y"].shape[1]
    zero = jax.tree.map(lambda s: jnp.zeros((batch["x"].shape[0], s.shape[1])), carry)
    logits = forward(params, batch["x"], zero)[0]
    return cross_entropy(logits[:, skip:], batch["y"]), carry
