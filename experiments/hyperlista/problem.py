"""Sparse codes, and the iterations that recover them: every solver is a step of an `UnrollMap`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.hyperlista.config import Config

TINY = 1e-6


class Dictionary(NamedTuple):
    """A, its columns of length one; W, as incoherent to A as can be; the pseudo-inverse of A; and
    the largest eigenvalue of ``A'A``."""

    a: jax.Array
    w: jax.Array
    inverse: jax.Array
    largest: jax.Array


def dictionary(config: Config, seed: int) -> Dictionary:
    """A Gaussian dictionary. W minimizes ``|W'A|`` with ``w_i'a_i = 1``, in closed form."""
    a = np.random.default_rng(seed).normal(size=(config.measured, config.codes))
    a /= np.linalg.norm(a, axis=0)
    w = np.linalg.solve(a @ a.T, a)
    w /= np.sum(w * a, 0)
    largest = np.linalg.norm(a, 2) ** 2
    return Dictionary(*(jnp.asarray(x, jnp.float32) for x in (a, w, np.linalg.pinv(a), largest)))


def draw(key: Any, a: jax.Array, count: int, density: float) -> tuple[jax.Array, jax.Array]:
    """Codes, Bernoulli times normal, and what is measured of them."""
    on, size = jax.random.split(key)
    shape = (count, a.shape[1])
    codes = jax.random.bernoulli(on, density, shape) * jax.random.normal(size, shape)
    return codes, codes @ a.T


def shrink(v: jax.Array, threshold: jax.Array) -> jax.Array:
    """Soft thresholding."""
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


class State(NamedTuple):
    """What an iteration carries: its iterate, and the one before."""

    now: jax.Array
    before: jax.Array


def start(state: State, lam: Any, seen: jax.Array) -> State:
    """Codes of zero."""
    return State(*jax.tree.map(jnp.zeros_like, tuple(state)))


def error(state: State, lam: Any, codes: jax.Array) -> jax.Array:
    """The outer loss: the logarithm of the normalized squared error."""
    return jnp.log(jnp.sum((state.now - codes) ** 2) / jnp.sum(codes**2))


Step = Callable[[State, Any, jax.Array, Any], State]


def ista(d: Dictionary) -> tuple[Step, Any]:
    """Proximal gradient steps; the rate and the penalty are tuned."""

    def step(state: State, lam: Any, seen: jax.Array, t: Any) -> State:
        rate = jnp.exp(lam["rate"]) / d.largest
        moved = state.now - rate * (state.now @ d.a.T - seen) @ d.a
        return State(shrink(moved, rate * jnp.exp(lam["penalty"])), state.now)

    return step, {"rate": jnp.zeros(()), "penalty": jnp.log(0.1)}


def fista(d: Dictionary) -> tuple[Step, Any]:
    """The same with Nesterov's momentum."""

    def step(state: State, lam: Any, seen: jax.Array, t: Any) -> State:
        rate = jnp.exp(lam["rate"]) / d.largest
        ahead = state.now + t / (t + 3.0) * (state.now - state.before)
        moved = ahead - rate * (ahead @ d.a.T - seen) @ d.a
        return State(shrink(moved, rate * jnp.exp(lam["penalty"])), state.now)

    return step, {"rate": jnp.zeros(()), "penalty": jnp.log(0.1)}


FIRST = {"threshold": np.log(0.02), "momentum": np.log(0.02), "selected": np.log(0.03)}
"""Logarithms of the three scalars to begin with."""


def hyperlista(d: Dictionary, sharpness: float | None, layers: int = 0) -> tuple[Step, Any]:
    """HyperLISTA: three scalars; thresholds, momenta and selections follow from each instance.

    The number of entries that pass unshrunk is a comparison, through which no derivative goes. With
    ``sharpness`` it is a sigmoid; without, the comparison itself, for judging. With ``layers`` each
    step has scalars of its own.
    """
    n = d.a.shape[1]

    def step(state: State, lam: Any, seen: jax.Array, t: Any) -> State:
        c = {name: jnp.exp(x[t] if layers else x) for name, x in lam.items()}
        x, residual = state.now, state.now @ d.a.T - seen
        left = jnp.sum(jnp.abs(residual @ d.inverse.T), 1, keepdims=True) + TINY
        whole = jnp.sum(jnp.abs(seen @ d.inverse.T), 1, keepdims=True) + TINY
        size = jnp.abs(x)
        active = jnp.sum(size > 1e-3 * jnp.max(size, 1, keepdims=True), 1, keepdims=True)
        momentum = jnp.minimum(c["momentum"] * active, 1.0)
        v = x - residual @ d.w + momentum * (x - state.before)
        part = jnp.clip(c["selected"] * jnp.log(whole / left), 0, 1)
        order = jnp.argsort(jnp.argsort(-jnp.abs(v), 1), 1)
        free = part - (order + 0.5) / n
        free = (free > 0) * 1.0 if sharpness is None else jax.nn.sigmoid(free / sharpness)
        shrunk = shrink(v, c["threshold"] * left)
        return State(shrunk + free * (v - shrunk), x)

    def first(x: float) -> jax.Array:
        return jnp.full(layers, x, jnp.float32) if layers else jnp.float32(x)

    return step, {name: first(x) for name, x in FIRST.items()}


def lista(d: Dictionary, layers: int) -> tuple[Step, Any]:
    """LISTA: two matrices, shared by the steps, and a threshold for each; ISTA to begin with."""

    def step(state: State, lam: Any, seen: jax.Array, t: Any) -> State:
        moved = seen @ lam["in"] + state.now @ lam["again"]
        return State(shrink(moved, lam["threshold"][t]), state.now)

    rate = 1 / d.largest
    return step, {
        "in": rate * d.a,
        "again": jnp.eye(d.a.shape[1]) - rate * d.a.T @ d.a,
        "threshold": jnp.broadcast_to(0.1 * rate, (layers,)),
    }
