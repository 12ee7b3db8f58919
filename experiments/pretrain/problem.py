"""Pre-training tasks on images, and fine-tuning of the encoder on few labels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data
from experiments.pretrain.config import Config


class Task(NamedTuple):
    """Images with their binary targets, labelled images to fine-tune on, and the test."""

    pre: tuple[jax.Array, jax.Array]
    fine: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def task(config: Config, seed: int) -> Task:
    """Draws of one seed; images of fine-tuning are not those of pre-training."""
    full = {"mnist": data.mnist, "digits": data.digits}[config.source](seed=seed)
    draw = np.random.default_rng((seed, 3))
    x, y = _pooled(full.train.x), full.train.y
    patterns = config.amplitude * draw.choice([-1.0, 1.0], (config.useless, x.shape[1]))

    def marked(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coins = draw.integers(0, 2, (len(x), config.useless))
        return (x + (2 * coins - 1) @ patterns).astype(np.float32), coins

    order = draw.permutation(len(y))
    first, rest = order[: config.examples], order[config.examples :]
    kinds = [(y[first] == c).astype(np.float32) for c in range(config.useful)]
    images, coins = marked(x[first])
    targets = np.concatenate([np.stack(kinds, 1), coins], 1).astype(np.float32)
    each = config.labels // config.classes
    few = np.concatenate([rest[y[rest] == c][:each] for c in range(config.classes)])
    there = np.flatnonzero(full.test.y < config.classes)[: config.test]
    tested, _ = marked(_pooled(full.test.x[there]))
    return Task(
        (jnp.asarray(images), jnp.asarray(targets)),
        (jnp.asarray(marked(x[few])[0]), jnp.asarray(y[few])),
        (jnp.asarray(tested), jnp.asarray(full.test.y[there])),
    )


def _pooled(x: np.ndarray) -> np.ndarray:
    b, side, _ = x.shape
    if side > 8:
        x = x.reshape(b, side // 2, 2, side // 2, 2).mean((2, 4))
    return x.reshape(b, -1)


def initial(key: jax.Array, inputs: int, config: Config) -> dict[str, Any]:
    """An encoder of one layer, and a linear output for each task."""
    keys, tasks = jax.random.split(key, 2), config.useful + config.useless
    return {
        "body": _layer(keys[0], inputs, config.hidden),
        "tasks": _layer(keys[1], config.hidden, tasks),
    }


def _layer(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _linear(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"][None]


def weights(log_weights: jax.Array) -> jax.Array:
    """What each task counts; 1 on average."""
    return log_weights.size * jax.nn.softmax(log_weights)


def pre_loss(decay: float) -> Any:
    """The loss of pre-training: weighed tasks, and a decay."""

    def loss(w: Any, log_weights: jax.Array, batch: Any) -> jax.Array:
        x, targets = batch
        logits = _linear(w["tasks"], jnp.tanh(_linear(w["body"], x)))
        each = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets), 0)
        penalty = 0.5 * decay * optax.tree.norm(w, squared=True)
        return jnp.sum(weights(log_weights) * each) + penalty

    return loss


def fine_outputs(w: Any, x: jax.Array) -> jax.Array:
    """Logits of the classes of fine-tuning."""
    return _linear(w["head"], jnp.tanh(_linear(w["body"], x)))


def fine_loss(w: Any, log_weights: Any, batch: Any) -> jax.Array:
    """Cross-entropy of fine-tuning, and of its validation."""
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(fine_outputs(w, x), y))


def copied(classes: int) -> Any:
    """The pre-trained encoder with a new head."""

    def start(w: Any, batch: Any) -> Any:
        width = w["body"]["bias"].size
        head = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
        return {"body": w["body"], "head": head}

    return start
