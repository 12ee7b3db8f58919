"""Transfer to few examples: the pre-trained network, the data, and the losses of a run."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import data
from experiments.elbo.config import Config

CLASSES = 5


class Task(NamedTuple):
    """What one run starts from.

    Attributes:
      train, test: examples of the five new classes, `(x, labels)`.
      start: parameters that training starts from: the pre-trained layers and a head of zeros.
      center: what a prior is centred at; zero for the head.
    """

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    start: Any
    center: Any


def _flat(part: data.Split) -> tuple[np.ndarray, np.ndarray]:
    return part.x.reshape(len(part.x), -1), part.y


def initial(key: jax.Array, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Layers of a network, by name."""
    keys = jax.random.split(key, len(sizes) - 1)
    names = [f"layer{i}" for i in range(len(sizes) - 2)] + ["head"]
    return {
        name: {
            "kernel": jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m),
            "bias": jnp.zeros(n),
        }
        for name, k, m, n in zip(names, keys, sizes[:-1], sizes[1:], strict=True)
    }


def outputs(w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Logits; a tree of a head alone is a linear model of features."""
    for name in sorted(set(w) - {"head"}):
        x = jax.nn.relu(x @ w[name]["kernel"] + w[name]["bias"][None])
    return x @ w["head"]["kernel"] + w["head"]["bias"][None]


def nll(w: Any, hparams: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy; a third entry of the batch weighs its examples."""
    x, y, *weights = batch
    each = optax.softmax_cross_entropy_with_integer_labels(outputs(w, x), y)
    if not weights:
        return jnp.mean(each)
    return jnp.sum(weights[0] * each) / jnp.sum(weights[0])


def source(name: str, config: Config, seed: int) -> tuple[Any, data.Dataset]:
    """A network trained on the first five classes, and the data set."""
    kinds = {"digits": data.digits, "mnist": data.mnist, "fashion_mnist": data.fashion_mnist}
    full = kinds[name](seed=seed)
    x, y = _flat(full.train)
    chosen = np.flatnonzero(y < CLASSES)[: config.pretrain]
    x, y = jnp.asarray(x[chosen]), jnp.asarray(y[chosen])
    keys = jax.random.split(jax.random.key(seed), 2)
    w = initial(keys[0], (x.shape[1], *config.hidden, CLASSES))
    shape = (config.source_steps, config.source_batch)
    rows = jax.random.randint(keys[1], shape, 0, len(y))
    return _pretrained(w, (x, y), rows), full


@jax.jit
def _pretrained(w: Any, data: Any, rows: jax.Array) -> Any:
    tx = optax.adam(1e-3)

    def body(state: Any, rows: jax.Array) -> Any:
        batch = jax.tree.map(lambda leaf: leaf[rows][None], data)
        return bilevel.descend(nll, tx, state, (), batch, steps=1)[0], None

    return jax.lax.scan(body, bilevel.InnerState(w, tx.init(w)), rows)[0].params


def task(arm: str, w: Any, full: data.Dataset, config: Config, seed: int) -> Task:
    """The new classes, a balanced draw of few examples, for one arm."""
    draw = np.random.default_rng(seed)
    x, y = _flat(full.train)
    each = config.examples // CLASSES
    rows = np.concatenate(
        [draw.permutation(np.flatnonzero(y == c))[:each] for c in range(CLASSES, 2 * CLASSES)]
    )
    rows = draw.permutation(rows)
    tested, aim = _flat(full.test)
    there = np.flatnonzero(aim >= CLASSES)[: config.test]
    train = jnp.asarray(x[rows]), jnp.asarray(y[rows] - CLASSES)
    test = jnp.asarray(tested[there]), jnp.asarray(aim[there] - CLASSES)
    body = {name: layer for name, layer in w.items() if name != "head"}
    zero = {"head": jax.tree.map(jnp.zeros_like, w["head"])}
    kernel = jnp.asarray(draw.normal(size=w["head"]["kernel"].shape) * config.head_std, jnp.float32)
    head = {"head": {**zero["head"], "kernel": kernel}}
    if arm == "whole":
        return Task(train, test, {**body, **head}, {**body, **zero})
    train, test = ((features(body, x), y) for x, y in (train, test))
    return Task(train, test, head, zero)


@functools.partial(jax.jit)
def features(body: Any, x: jax.Array) -> jax.Array:
    """What the head of the pre-trained network reads."""
    eye = jnp.eye(body[max(body)]["bias"].size)
    return jax.nn.relu(outputs({**body, "head": {"kernel": eye, "bias": jnp.zeros(len(eye))}}, x))


def penalized(center: Any) -> Any:
    """The loss of maximum a posteriori: decays toward the centre, one for the head, one below."""

    def loss(w: Any, decays: dict[str, jax.Array], batch: Any) -> jax.Array:
        moved = jax.tree.map(jnp.subtract, w, center)
        total = nll(w, (), batch)
        for name, layer in moved.items():
            strength = decays["head" if name == "head" else "body"]
            total = total + 0.5 * strength * optax.tree.norm(layer, squared=True)
        return total

    return loss
