"""Tuning the schedule online, window by window, by three estimators of its gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import batches, budget
from experiments.pes import problem
from experiments.pes.config import Config

METHODS = ("pes", "truncated_es", "truncated_gradient")


def response(method: str, config: Config) -> Any:
    def inner_tx(schedule: jax.Array) -> optax.GradientTransformation:
        return problem.sgd(schedule, config.steps)

    if method == "truncated_gradient":
        return bilevel.Unroll(inner_tx, steps=config.window)
    persistent = method == "pes"
    return bilevel.Evolution(
        inner_tx,
        steps=config.window,
        particles=config.pairs,
        sigma=config.sigma,
        persistent=persistent,
        horizon=config.steps if persistent else None,
    )


def cost(method: str, config: Config) -> float:
    """Inner gradients of one move; its outer loss reads all training images."""
    outer = budget.weight(config.train, config.batch)
    return budget.hypergradient(response(method, config), outer=outer).total


def updates(method: str, config: Config) -> int:
    """As many moves as cost what those of PES do."""
    return int(config.updates * cost("pes", config) / cost(method, config))


@functools.cache
def tuner(method: str, config: Config) -> Callable[..., Any]:
    """Jitted `(carry, train, key, moves) -> carry`; see `start`.

    The run that is tuned starts again from the same weights every T steps. PES resets its pairs
    by itself, at staggered times.
    """
    one, tx = response(method, config), optimizer(config)
    per_run = config.steps // config.window

    def move(carry: Any, key: jax.Array, train: Any) -> Any:
        schedule, opt_state, params, state, origin, count = carry
        again = count % per_run == 0
        params = jax.tree.map(lambda new, old: jnp.where(again, new, old), origin, params)
        inner_key, key = jax.random.split(key)
        solve = bilevel.hypergrad_solve(
            problem.loss,
            problem.loss,
            one,
            params,
            schedule,
            inner_batch=batches.draw(train, inner_key, (config.window, config.batch)),
            outer_batch=train,
            state=state,
            key=key,
        )
        direction, opt_state = tx.update(solve.grads, opt_state, schedule)
        schedule = optax.apply_updates(schedule, direction)
        return (schedule, opt_state, solve.params, solve.state, origin, count + 1), None

    @functools.partial(jax.jit, static_argnums=3)
    def several(carry: Any, train: Any, key: jax.Array, moves: int) -> Any:
        keys = jax.random.split(key, moves)
        return jax.lax.scan(lambda c, k: move(c, k, train), carry, keys)[0]

    return several


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam; an estimate from a run that blew up moves nothing."""
    return optax.apply_if_finite(optax.adam(config.outer_lr), 10**6)


def start(method: str, config: Config, params: Any) -> Any:
    """Schedule, Adam's state, weights, the response's state, the weights to return to, a count."""
    schedule = jnp.asarray(config.start, jnp.float32)
    state = bilevel.hypergrad_init(
        problem.loss, problem.loss, response(method, config), params, schedule
    )
    return schedule, optimizer(config).init(schedule), params, state, params, jnp.int32(0)


@functools.cache
def replay(config: Config) -> Callable[..., Any]:
    """Jitted `(schedules, train, key) -> losses` at every window's end, (schedules, windows)."""

    def run(schedule: jax.Array, train: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 2)
        tx = problem.sgd(schedule, config.steps)
        params = problem.initial(train[0].shape[1], config.hidden, keys[0])

        def loss(params: Any, hparams: None, key: jax.Array) -> jax.Array:
            return problem.loss(params, hparams, batches.draw(train, key, (config.batch,)))

        def window(state: bilevel.InnerState, keys: jax.Array) -> Any:
            state, _ = bilevel.descend(loss, tx, state, None, keys, steps=config.window)
            return state, problem.loss(state.params, None, train)

        steps = jax.random.split(keys[1], (config.steps // config.window, config.window))
        return jax.lax.scan(window, bilevel.InnerState(params, tx.init(params)), steps)[1]

    return jax.jit(jax.vmap(run, in_axes=(0, None, None)))
