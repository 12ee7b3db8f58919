"""Moving a schedule: by hypergradients of whole runs, or by those of short windows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import batches, budget
from experiments.learning_rate import fresh, problem, schedules
from experiments.learning_rate.config import Config


def cost(config: Config, length: int) -> float:
    """Inner gradients of one move: T differentiated steps, an outer gradient a window."""
    outer = budget.weight(config.outer_batch, config.batch)
    one = budget.hypergradient(response(config, length), outer=outer)
    return one.times(config.steps // length).total


def response(config: Config, length: int) -> bilevel.Unroll:
    """`length` differentiated steps of momentum SGD at a schedule."""
    every = config.steps // config.windows
    remat = "sqrt" if length >= 25 else "none"
    return bilevel.Unroll(lambda lam: schedules.sgd(lam, every), steps=length, remat=remat)


def hypergradient(config: Config, model: str, length: int) -> Callable[..., Any]:
    """`(schedule, train, outer, key) -> (mean outer loss, gradient)` of one fresh run.

    ``train`` is trained on, and batches of ``outer`` are what the schedule is tuned for.

    With `length = T` the derivative of the loss at the end. With less, the sum over windows of
    `length` steps of the derivative of the loss at the window's end in the schedule of that
    window alone: what happened before is taken as given, what comes after is ignored.
    """
    one = response(config, length)

    def run(schedule: Any, train: Any, outer: Any, key: jax.Array) -> Any:
        keys = jax.random.split(key, 2)
        params = problem.initial(model, keys[0])
        state = bilevel.hypergrad_init(problem.loss, problem.loss, one, params, schedule)

        def window(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            inner_key, outer_key = jax.random.split(key)
            solve = bilevel.hypergrad_solve(
                problem.loss,
                problem.loss,
                one,
                params,
                schedule,
                inner_batch=batches.draw(train, inner_key, (length, config.batch)),
                outer_batch=batches.draw(outer, outer_key, (config.outer_batch,)),
                state=state,
            )
            return (solve.params, solve.state), (solve.value, solve.grads)

        windows = jax.random.split(keys[1], config.steps // length)
        _, (values, grads) = jax.lax.scan(window, (params, state), windows)
        return values[-1], jax.tree.map(lambda g: jnp.sum(g, 0), grads)

    return run


def updates(config: Config, length: int) -> int:
    """As many moves as cost what `config.updates` full-horizon ones do."""
    return int(config.updates * cost(config, config.steps) // cost(config, length))


def outer_tx(config: Config, length: int) -> optax.GradientTransformation:
    """Adam on clipped gradients: those of a whole run explode where its rates are too high, and
    one of them must not outweigh all others. A run that blew up moves nothing."""
    rate = optax.cosine_decay_schedule(config.outer_lr, updates(config, length))
    tx = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate))
    return optax.apply_if_finite(tx, 1000)


@functools.cache
def move(config: Config, model: str, length: int) -> Callable[..., Any]:
    """Jitted `(schedule, opt_state, train, outer, key) -> (schedule, opt_state, loss)`."""
    gradient, tx = hypergradient(config, model, length), outer_tx(config, length)

    @jax.jit
    def update(schedule: Any, opt_state: Any, train: Any, outer: Any, key: jax.Array) -> Any:
        value, grads = gradient(schedule, train, outer, key)
        moves, opt_state = tx.update(grads, opt_state, schedule)
        return optax.apply_updates(schedule, moves), opt_state, value

    return update


@functools.cache
def replay(config: Config, model: str) -> Callable[..., Any]:
    """Jitted `(schedule, images, key) -> metrics` of one fresh run at a schedule.

    A schedule may have any number of windows that divides the run.
    """

    @jax.jit
    def run(schedule: Any, images: Any, key: jax.Array) -> Any:
        every = config.steps // schedule["log_rate"].shape[1]
        return fresh.run(config, model, schedules.sgd(schedule, every), images, key)

    return run
