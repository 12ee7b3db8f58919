"""Global and local hypernetworks of the first part."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from bilevel.inner.hypernetwork import clipped_normal
from experiments.common import budget
from experiments.hypernet import problem
from experiments.hypernet.config import Curve

FIRST = 0.01  # standard deviation of all first weights, as in the paper's code


def centred(config: Curve) -> Any:
    """The log decay, standardized: training is sensitive to the size of inputs."""
    middle, half = (config.low + config.high) / 2, (config.high - config.low) / 2
    return lambda lam: (lam - middle) / half


def network(method: str, config: Curve) -> bilevel.Hypernetwork:
    """One hidden layer of ReLU units for the whole range, or a straight line."""
    hidden = (config.hidden,) if method == "global" else ()
    return bilevel.Hypernetwork(
        hidden,
        residual=False,
        to_unit=centred(config),
        activation=jax.nn.relu,
        init_scale=FIRST,
    )


def algorithm(method: str, config: Curve) -> bilevel.Algorithm:
    """The global one only trains; the local one moves the log decay along."""
    if method == "global":
        draw = clipped_normal(config.mean, config.std, -100.0, config.high)
        outer_tx = optax.set_to_zero()

        def sample(key: jax.Array, lam: jax.Array) -> jax.Array:
            return draw(key, ())
    else:
        outer_tx = optax.adam(optax.cosine_decay_schedule(config.outer_rate, config.steps))

        def sample(key: jax.Array, lam: jax.Array) -> jax.Array:
            return lam + config.sigma * jax.random.normal(key, ())

    return bilevel.global_response(
        problem.outer,
        problem.inner,
        network(method, config),
        sample,
        optax.adam(optax.cosine_decay_schedule(config.rate, config.steps)),
        outer_tx,
        draws=config.draws,
    )


def step_cost(method: str, config: Curve, valid: int) -> float:
    """G of a step; ten images are trained on, and the global one reads one of the `valid`."""
    outer = 1 if method == "global" else config.outer_batch or valid
    return budget.global_response(config.draws, budget.weight(outer, problem.CLASSES)).total


@functools.cache
def train(method: str, config: Curve, points: int) -> Any:
    """``(key, train, valid) -> (path of the log decay, learnt curves, phi)``, at ``points``."""
    made = algorithm(method, config)
    grid = jnp.linspace(config.low, config.high, config.grid)

    def whole(key: jax.Array, train: Any, valid: Any) -> Any:
        first = problem.initial(train[0].shape[1])
        state = made.init(first, jnp.float32(config.start), key=key)
        full = jax.tree.map(lambda a: a[None], train)

        def sample(key: jax.Array) -> Any:
            # The global one uses no validation image while it trains: one is enough.
            count = 1 if method == "global" else config.outer_batch
            if not count:
                return full, valid
            index = jax.random.randint(key, (count,), 0, len(valid[1]))
            return full, jax.tree.map(lambda a: a[index], valid)

        def stretch(state: Any, key: jax.Array) -> Any:
            state = bilevel.scan_run(made, state, sample, config.steps // points, key=key).state

            def loss(lam: jax.Array) -> jax.Array:
                return problem.outer(made.deploy(state, lam), lam, valid)

            return state, (state.hparams, jax.lax.map(loss, grid))

        state, (path, curves) = jax.lax.scan(stretch, state, jax.random.split(key, points))
        return path, curves, state.network_params

    return jax.jit(whole)


@functools.cache
def search(config: Curve) -> Any:
    """``(phi, valid) -> log decay``: Adam on the validation loss of the network's weights."""
    net = network("global", config)
    tx = optax.adam(optax.cosine_decay_schedule(config.search_rate, config.search_steps))

    def whole(phi: Any, valid: Any) -> jax.Array:
        first = problem.initial(valid[0].shape[1])

        def move(carry: Any, _: None) -> Any:
            lam, opt_state = carry
            slope = jax.grad(lambda lam: problem.outer(net.apply(phi, first, lam), lam, valid))(lam)
            updates, opt_state = tx.update(slope, opt_state)
            return (lam + updates, opt_state), None

        start = jnp.float32(config.start)
        (lam, _), _ = jax.lax.scan(move, (start, tx.init(start)), None, config.search_steps)
        return lam

    return jax.jit(whole)
