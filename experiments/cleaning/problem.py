"""The bilevel problem of `cleaning`: a linear model, and one weight for every training example."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.cleaning.config import Config
from experiments.common import data

CLASSES = 10
Batch = tuple[jax.Array, jax.Array]


class Parts(NamedTuple):
    """Centred pixels and labels; `train` has mistakes in its labels, and `wrong` tells which."""

    train: Batch
    valid: Batch
    test: Batch
    wrong: np.ndarray
    clean: Batch


def load(name: str, config: Config, seed: int) -> Parts:
    """The parts of one seed, drawn from the publisher's training images.

    The mistakes of CIFAR-10 are those of CIFAR-10N's worst annotator, of the others labels
    replaced at random by wrong ones.
    """
    sets = getattr(data, name)(valid=0, seed=seed)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(sets.train.y))[: config.valid + config.train]
    images, labels = (np.asarray(a)[rows] for a in sets.train)
    if name == "cifar10":
        people = data.load_npz("cifar10/cifar10n_human_labels.npz")
        mistaken = people["worse_label"][rows].astype(np.int32)
    else:
        other = (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES
        mistaken = np.where(rng.random(len(labels)) < config.flipped, other, labels)
    v = config.valid
    x, x_test = (_features(a, config) for a in (images, sets.test.x))
    centre = x[v:].mean(0)  # of the training images, whose labels it does not read
    wrong = mistaken[v:] != labels[v:]

    def part(x: np.ndarray, y: np.ndarray) -> Batch:
        return jnp.asarray(x - centre, jnp.float32), jnp.asarray(y, jnp.int32)

    return Parts(
        part(x[v:], mistaken[v:]),
        part(x[:v], labels[:v]),
        part(x_test, sets.test.y),
        wrong,
        part(x[v:][~wrong], labels[v:][~wrong]),
    )


def _features(images: Any, config: Config) -> np.ndarray:
    x = np.asarray(images, np.float32)
    x = x if x.ndim == 4 else x[..., None]
    if config.pooled:
        count, side, _, colours = x.shape
        square = 2 if colours == 1 else 4
        x = x.reshape(count, side // square, square, side // square, square, -1).mean((2, 4))
    return x.reshape(len(x), -1)


def start(parts: Parts) -> Any:
    """Weights of the linear model, zero."""
    size = parts.train[0].shape[1]
    return {"w": jnp.zeros((size, CLASSES), jnp.float32), "b": jnp.zeros(CLASSES, jnp.float32)}


def losses(params: Any, batch: Batch) -> jax.Array:
    """The cross-entropy of every example."""
    return optax.softmax_cross_entropy_with_integer_labels(
        batch[0] @ params["w"] + params["b"][None], batch[1]
    )


def train_loss(config: Config) -> Any:
    """The inner loss: examples weigh `sigmoid(hparams)`."""

    def loss(params: Any, hparams: jax.Array, batch: Batch) -> jax.Array:
        weighted = jnp.mean(jax.nn.sigmoid(hparams) * losses(params, batch))
        return weighted + 0.5 * config.decay * jnp.sum(params["w"] ** 2)

    return loss


def valid_loss(params: Any, hparams: Any, batch: Batch) -> jax.Array:
    """The outer loss."""
    return jnp.mean(losses(params, batch))


def error_rate(params: Any, batch: Batch) -> float:
    """The share of a part that is classified wrongly."""
    logits = batch[0] @ params["w"] + params["b"][None]
    return float(jnp.mean(jnp.argmax(logits, -1) != batch[1]))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative; ties count half."""
    order = np.sort(scores[~positive])
    below = np.searchsorted(order, scores[positive], "left")
    until = np.searchsorted(order, scores[positive], "right")
    return float(np.mean(below + until) / 2 / len(order))
