"""Whole runs as one program each: tuned while they train, or at rates that are given."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.stn_ptb import starts_problem as problem
from experiments.stn_ptb.config import Starts


def _side_by_side(one: Callable[..., Any], axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """Runs from several arguments: mapped over, but on a CPU one after the other.

    XLA has no fast product of a batch of small matrices there, and any number of runs is one
    program.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(jax.vmap(one, axes))
    single = jax.jit(one)

    def runs(*arguments: Any) -> Any:
        pairs = list(zip(arguments, axes, strict=True))
        count = next(len(jax.tree.leaves(x)[0]) for x, axis in pairs if axis == 0)
        each = [
            single(*(jax.tree.map(lambda leaf, i=i: leaf[i], x) if axis == 0 else x
                     for x, axis in pairs))
            for i in range(count)
        ]  # fmt: skip
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    return runs


def _optimizer(config: Starts, steps: Any) -> optax.GradientTransformation:
    """Of weights and response, for every method: Adam, whose rate falls to zero."""

    def rate(step: Any) -> Any:
        return config.lr * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))

    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate))


def _outer_optimizer(config: Starts, cycles: int) -> optax.GradientTransformation:
    """Of the logit: SGD, which a signal of noise moves little, and does not carry away."""
    rate = optax.cosine_decay_schedule(config.outer_lr, cycles)
    return optax.chain(optax.clip_by_global_norm(config.outer_clip), optax.sgd(rate, 0.9))


def _keep(best: Any, loss: jax.Array, weights: Any) -> Any:
    """The lower loss and its weights."""
    better = loss < best[0]
    return jax.tree.map(lambda new, old: jnp.where(better, new, old), (loss, weights), best)


def algorithm(method: str, config: Starts, words: int) -> bilevel.Algorithm:
    """The loop of a run."""
    network, _ = problem.build(config, words, method == "delta_stn", jax.random.key(0))
    outer, inner = problem.losses(network)
    count = problem.cycles(config, method)
    return bilevel.self_tuning(
        outer,
        inner,
        _optimizer(config, config.inner_steps * count),
        _outer_optimizer(config, count),
        config.inner_steps,
        network=network,
        scale=config.scale,
        tune_scales=False,
        constrain=problem.space(config),
        warm_up=round(config.warm_up * count),
    )


@functools.cache
def tuned(method: str, config: Starts, words: int) -> Any:
    """``(params, starts, keys, sets) -> (rates, losses, test)`` of a run from each start.

    Rates (n, cycles), validation losses (n, points), test losses (n,) at the best point.
    """
    network, _ = problem.build(config, words, method == "delta_stn", jax.random.key(0))
    loop, count = algorithm(method, config, words), problem.cycles(config, method)

    def one(params: Any, start: jax.Array, key: jax.Array, sets: Any) -> Any:
        def cycle(state: Any, _: None) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, state.step), 3)
            shape = (config.inner_steps, config.batch)
            state, info = loop.step(
                state,
                inner_batches=problem.windows(config, sets["train"], keys[0], shape),
                outer_batch=problem.windows(config, sets["valid"], keys[1], (config.valid_batch,)),
                key=keys[2],
            )
            return state, info.hparams["rate"]

        def some(carry: Any, _: None) -> Any:
            state, rates = jax.lax.scan(cycle, carry[0], None, length=count // config.points)
            weights = loop.deploy(state)
            loss = problem.measure(config, network, weights, sets["valid_streams"])
            return (state, _keep(carry[1], loss, weights)), (rates, loss)

        state = loop.init(params, problem.hparams(start), key=key)
        first = (state, (jnp.inf, loop.deploy(state)))
        (_, best), (rates, losses) = jax.lax.scan(some, first, None, length=config.points)
        test = problem.measure(config, network, best[1], sets["test_streams"])
        return rates.reshape(-1), losses, test

    return _side_by_side(one, (None, 0, 0, None))


@functools.cache
def trained(config: Starts, words: int) -> Any:
    """``(params, schedules, every, keys, sets) -> (losses, test)`` of plain runs.

    A run makes ``every`` steps between measurements, a traced number: runs of all lengths are
    one program.
    """
    network, _ = problem.build(config, words, True, jax.random.key(0))
    _, inner = problem.losses(network)

    def one(params: Any, schedule: bilevel.HyperSchedule, every: Any, key: Any, sets: Any) -> Any:
        tx = _optimizer(config, every * config.points)

        def step(t: Any, carry: Any) -> Any:
            params, opt_state = carry
            key_now = jax.random.fold_in(key, t)
            batch = problem.windows(config, sets["train"], key_now, (config.batch,))
            grads = jax.grad(lambda p: inner(problem.plain(network, p), schedule(t), batch))(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def some(carry: Any, i: jax.Array) -> Any:
            state = jax.lax.fori_loop(i * every, (i + 1) * every, step, carry[0])
            weights = problem.plain(network, state[0])
            loss = problem.measure(config, network, weights, sets["valid_streams"])
            return (state, _keep(carry[1], loss, weights)), loss

        first = ((params, tx.init(params)), (jnp.inf, problem.plain(network, params)))
        (_, best), losses = jax.lax.scan(some, first, jnp.arange(config.points))
        return losses, problem.measure(config, network, best[1], sets["test_streams"])

    return _side_by_side(one, (None, 0, None, 0, None))
