"""Episodes of few-shot clustering, and the iteration whose coefficients are tuned."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data
from experiments.unem.config import Config

FLOOR = 1e-6


class Episodes(NamedTuple):
    """``support``, (episodes, classes, d), are means of the shots; ``queries`` (episodes, q, d)."""

    support: jax.Array
    queries: jax.Array
    labels: jax.Array


def episodes(name: str, config: Config, seed: int) -> tuple[Episodes, Episodes]:
    """Episodes to tune on and to judge on, of different classes."""
    draw = np.random.default_rng(seed)
    first, last = (None, None) if name == "mixture" else characters(config.features)
    return _episodes(first, config.valid, config, draw), _episodes(last, config.test, config, draw)


def _episodes(pool: np.ndarray | None, count: int, config: Config, draw: Any) -> Episodes:
    made = [_episode(pool, config, draw) for _ in range(count)]
    support, queries, labels = (np.stack(x) for x in zip(*made, strict=True))
    return Episodes(*(jnp.asarray(x) for x in (support, queries, labels)))


def _episode(pool: np.ndarray | None, config: Config, draw: Any) -> tuple[np.ndarray, ...]:
    """``pool`` is (classes, examples, d); without one, classes are drawn Gaussians."""
    each = config.shots + -(-config.queries // config.effective)
    if pool is None:
        means = config.spread * draw.normal(size=(config.classes, 1, config.features))
        x = means + draw.normal(size=(config.classes, each, config.features))
    else:
        chosen = draw.permutation(len(pool))[: config.classes]
        x = np.stack([pool[c][draw.permutation(pool.shape[1])[:each]] for c in chosen])
    active = draw.permutation(config.classes)[: config.effective]
    queries = x[active, config.shots :].reshape(-1, x.shape[-1])
    labels = np.repeat(active, each - config.shots)
    order = draw.permutation(len(labels))[: config.queries]
    support = x[:, : config.shots].mean(1)
    return support.astype(np.float32), queries[order].astype(np.float32), labels[order]


@functools.cache
def characters(features: int) -> tuple[np.ndarray, np.ndarray]:
    """Omniglot in linear features that the background alphabets teach: unit noise within a class.

    Returns two pools, (classes, 20, features), of the first and the last ten evaluation alphabets.
    """
    background = data.load_npz("omniglot/omniglot_background.npz")
    held_out = data.load_npz("omniglot/omniglot_evaluation.npz")
    x = _pixels(background)
    mean = x.mean((0, 1))
    within = np.concatenate(x - x.mean(1, keepdims=True))
    between = x.mean(1) - mean
    values, vectors = np.linalg.eigh(np.cov(within.T) + 0.02 * np.eye(x.shape[-1]))
    white = vectors / np.sqrt(values)
    _, directions = np.linalg.eigh(np.cov((between @ white).T))
    basis = white @ directions[:, ::-1][:, :features]
    z = (_pixels(held_out) - mean) @ basis
    first = held_out["alphabet"][::20] < 10
    return z[first], z[~first]


def _pixels(stored: dict[str, np.ndarray]) -> np.ndarray:
    """(characters, 20, 26 x 26), gray by averaging; rows are ordered by character."""
    ink = np.unpackbits(stored["packed"], axis=1)[:, : 105 * 105].reshape(-1, 105, 105)
    gray = ink[:, :104, :104].reshape(-1, 26, 4, 26, 4).mean((2, 4), dtype=np.float32)
    # A blur of one pixel forgives small shifts.
    for axis in (1, 2):
        gray = (np.roll(gray, 1, axis) + 2 * gray + np.roll(gray, -1, axis)) / 4
    order = np.argsort(stored["character"], kind="stable")
    return gray.reshape(len(gray), -1)[order].reshape(-1, 20, 26 * 26)


class State(NamedTuple):
    """Class means, the terms of their sizes, and what the last step said of each query."""

    means: jax.Array
    sizes: jax.Array
    logits: jax.Array


def start(state: State, lam: Any, batch: Episodes) -> State:
    """Means of the support; all classes count the same."""
    shape = batch.support.shape[:2]
    logits = jnp.zeros((*batch.queries.shape[:2], shape[1]))
    return State(batch.support, jnp.ones(shape), logits)


def blank(batch: Episodes) -> State:
    """The shapes of a state."""
    return jax.tree.map(jnp.zeros_like, start(State(0, 0, 0), None, batch))  # type: ignore


def step(shots: int) -> Any:
    r"""One step, with a coefficient :math:`\gamma_t` and a temperature of its own.

    .. math:: u = \mathrm{softmax}_k(e^{\tau_t} \ell_k + \gamma_t V_k),\qquad
        V_k = \log(\mathrm{mean}_q u_{qk}) + 1

    with the Gaussian log-likelihoods :math:`\ell_k`, and means of support and weighted queries.
    """

    def advance(state: State, lam: Any, batch: Episodes, t: Any) -> State:
        each = (lam["gamma"], lam["temperature"])
        gamma, tau = (x[t] if jnp.ndim(x) else x for x in each)
        far = jnp.sum((batch.queries[:, :, None] - state.means[:, None]) ** 2, -1)
        logits = -0.5 * jnp.exp(tau) * far + gamma * state.sizes[:, None]
        u = jax.nn.softmax(logits)
        sizes = jnp.log(u.mean(1) + FLOOR) + 1
        pulled = jnp.einsum("eqk,eqd->ekd", u, batch.queries)
        means = (pulled + shots * batch.support) / (u.sum(1) + shots)[..., None]
        return State(means, sizes, logits)

    return advance


def cross_entropy(state: State, lam: Any, batch: Episodes) -> jax.Array:
    """The outer loss, of the queries of validation episodes; in logits, not twice a softmax.

    It may have a scale of its own, which moves no assignment: where no temperature is learned, a
    coefficient would also have to make the probabilities right.
    """
    told = jax.nn.log_softmax(jnp.exp(lam.get("scale", 0.0)) * state.logits)
    return -jnp.mean(jnp.take_along_axis(told, batch.labels[..., None], -1))


def accuracy(state: State, batch: Episodes) -> jax.Array:
    """In percent."""
    return 100 * jnp.mean(jnp.argmax(state.logits, -1) == batch.labels)
