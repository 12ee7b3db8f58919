"""The bilevel problem of `augment`: data, classifier, and what its hyperparameters do."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bilevel
from bilevel.regularizers import cutout
from experiments.augment import networks
from experiments.augment.config import Config
from experiments.common import data


class Parts(NamedTuple):
    """Images (n, side, side, channels) in [0, 1] and labels of the four parts.

    `noisy` trains too: it has mistakes in its labels `y`, and tells which, in `wrong`.
    """

    train: dict[str, jax.Array]
    valid: dict[str, jax.Array]
    test: dict[str, jax.Array]
    noisy: dict[str, jax.Array]


def load(name: str, config: Config, seed: int) -> Parts:
    """The parts of one seed, drawn from the publisher's training images.

    The mistakes of CIFAR-10 are those of CIFAR-10N's worst annotator, of the others labels
    replaced at random by wrong ones.
    """
    sets = getattr(data, name)(valid=0, seed=seed)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(sets.train.y))[: config.valid + config.noisy_train]
    chosen, labels = (np.asarray(a)[rows] for a in sets.train)
    if name == "cifar10":
        people = data.load_npz("cifar10/cifar10n_human_labels.npz")
        mistaken = people["worse_label"][rows].astype(np.int32)
    else:
        wrong = (labels + rng.integers(1, networks.CLASSES, len(labels))) % networks.CLASSES
        mistaken = np.where(rng.random(len(labels)) < config.flipped, wrong, labels)

    def part(x: np.ndarray, y: np.ndarray) -> dict[str, jax.Array]:
        x = x if x.ndim == 4 else x[..., None]
        if config.halved:
            count, side = x.shape[:2]
            x = x.reshape(count, side // 2, 2, side // 2, 2, -1).mean((2, 4))
        return {"x": jnp.asarray(x), "y": jnp.asarray(y, jnp.int32)}

    v, n = config.valid, config.valid + config.train
    noisy = part(chosen[v:], mistaken[v:])
    noisy["wrong"] = jnp.asarray(mistaken[v:] != labels[v:])
    return Parts(
        part(chosen[v:n], labels[v:n]),
        part(chosen[:v], labels[:v]),
        part(sets.test.x, sets.test.y),
        noisy,
    )


class Problem(NamedTuple):
    """Everything that depends on the configuration and the shape of the images alone.

    Attributes:
      operator: Gauss-Newton of the inner loss, which is `operator.loss`. It reads a dictionary
        of hyperparameters: `augment`, the weights of the U-Net, and `weigh`, those of the network
        that weighs examples; a missing one is not used.
      outer: the loss on validation images, as they are.
      logits: `(params, images) -> (B, 10)`.
      augment: `(weights, images, noise) -> images`.
      weigh: `(weights, losses) -> weights of examples`.
    """

    operator: bilevel.GaussNewton
    outer: Any
    logits: Any
    augment: Any
    weigh: Any


def classifier(config: Config, side: int, channels: int, seed: int) -> Any:
    """The static part of the classifier, and fresh parameters."""
    rngs = nnx.Rngs(seed)
    if config.network == "resnet18":
        return networks.pieces(networks.ResNet18(channels, config.widths[0], rngs))
    return networks.pieces(networks.SmallCNN(side, channels, config.widths, config.hidden, rngs))


def augmenter(config: Config, channels: int, seed: int) -> Any:
    """The static part of the U-Net, and fresh weights."""
    unet = networks.UNet(
        channels,
        config.width,
        config.noise,
        config.reach,
        config.strength,
        config.start,
        nnx.Rngs(seed),
    )
    return networks.pieces(unet)


def reweighter(config: Config, seed: int) -> Any:
    """The static part of the network that weighs examples, and fresh weights."""
    return networks.pieces(networks.Reweighter(config.reweighter, nnx.Rngs(seed)))


def build(config: Config, side: int, channels: int) -> Problem:
    """The problem for images of this shape."""
    graph, _ = classifier(config, side, channels, 0)
    unet, _ = augmenter(config, channels, 0)
    weigher, _ = reweighter(config, 0)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return networks.call(graph, params, 2 * (x - 0.5))

    def augment(weights: Any, x: jax.Array, noise: jax.Array) -> jax.Array:
        return networks.call(unet, weights, x, noise)

    def weigh(weights: Any, losses: jax.Array) -> jax.Array:
        return networks.call(weigher, weights, losses)

    def model(params: Any, hparams: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        if "augment" in hparams:
            kept = unchanged(config, len(x))
            made = augment(hparams["augment"], x[kept:], batch["noise"][kept:])
            x = jnp.concatenate([x[:kept], made])
        return logits(params, x)

    def training(outputs: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])
        if "weigh" in hparams:
            # What an example weighs is a constant of the step, or the classifier could lower
            # its loss by making examples weigh less.
            losses = losses * weigh(hparams["weigh"], jax.lax.stop_gradient(losses))
        return losses.mean()

    def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return training(logits(params, batch["x"]), {}, batch)

    def penalty(params: Any, hparams: Any) -> jax.Array:
        squares = [jnp.sum(w**2) for w in jax.tree.leaves(params)]
        return 0.5 * config.decay * jnp.sum(jnp.stack(squares))

    operator = bilevel.GaussNewton(
        model, training, config.damping, penalty if config.decay else None
    )
    return Problem(operator, outer, logits, augment, weigh)


def unchanged(config: Config, size: int) -> int:
    """How many images of a batch, the first, are left as they are."""
    return size - round(config.share * size)


def by_hand(key: jax.Array, x: jax.Array, config: Config, mirror: bool) -> jax.Array:
    """Shifted by up to `shift` pixels, mirrored (if it may be) and with one square cut out."""
    shift_key, mirror_key, hole_key = jax.random.split(key, 3)
    reach, batch = config.shift, len(x)
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = jax.random.randint(shift_key, (batch, 2), 0, 2 * reach + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), x.shape[1:])

    x = jax.vmap(cut)(padded, corners)
    if mirror:
        turned = jax.random.bernoulli(mirror_key, 0.5, (batch, 1, 1, 1))
        x = jnp.where(turned, x[:, :, ::-1], x)
    return cutout(hole_key, x, 1, config.hole, max_holes=1, fill=0.5)
