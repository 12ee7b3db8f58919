"""Whole runs in one compiled scan: tuned while they train, or along a schedule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import budget, stn, stn_cnn
from experiments.stn_cifar import problem
from experiments.stn_cifar.config import Config


def cycle_cost(config: Config) -> float:
    """G of the training steps of a cycle and of its validation step."""
    return budget.self_tuning(problem.task(config).network(), config.inner_steps).total


def cycles(config: Config) -> int:
    """As many as the budget pays for, a multiple of the recorded points."""
    return budget.stretches(config.budget, cycle_cost(config), config.points)


def _optimizer(
    config: Config, lr: float, steps: int, eps: float = 1e-8
) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(lr, steps)
    if config.optimizer == "adam":
        return optax.adam(rate, eps=eps)
    return optax.sgd(rate, momentum=0.9)


def algorithm(config: Config) -> bilevel.Algorithm:
    """The loop of a run."""
    count = cycles(config)
    outer, inner = problem.task(config).losses()
    rate = optax.cosine_decay_schedule(config.outer_lr, count)
    return bilevel.self_tuning(
        outer,
        inner,
        _optimizer(config, config.lr, config.inner_steps * count),
        optax.adam(rate, eps=config.outer_eps),
        config.inner_steps,
        network=problem.task(config).network(),
        response_tx=_optimizer(
            config, config.response_lr, config.inner_steps * count, config.response_eps
        ),
        scale=config.scale,
        entropy=config.entropy,
        constrain=stn.space(config),
        warm_up=round(config.warm_up * count),
    )


@functools.cache
def tuned(config: Config) -> Any:
    """``(params, key, train, held_out) -> (hparams, scales, norms, measured, schedule)``.

    ``held_out`` has the parts "validation" and "test". All are stacked over the recorded points;
    the schedule is what training read in every cycle.
    """
    loop, bounds = algorithm(config), stn.space(config)
    every = cycles(config) // config.points

    @jax.jit
    def some(state: Any, key: Any, train: Any, held_out: Any) -> Any:
        draw = functools.partial(
            stn_cnn.sample, config, config.inner_steps, config.batch, train, held_out["validation"]
        )
        result = bilevel.scan_run(loop, state, draw, every, key=key)
        state = result.state
        norms = {
            "hypergrad_norm": jnp.mean(result.infos.hypergrad_norm),
            "response_norm": result.infos.stats["response_norm"][-1],
        }
        weights = loop.deploy(state)
        return state, (
            bounds.constrain(state.raw),
            state.scales,
            norms,
            problem.task(config).evaluated(weights, held_out),
            result.infos.hparams,
        )

    def whole(params: Any, key: Any, train: Any, held_out: Any) -> Any:
        state, rows = loop.init(params, stn.start(config), key=key), []
        for _ in range(config.points):
            state, row = some(state, key, train, held_out)
            rows.append(row)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *(row[:4] for row in rows))
        schedule = jax.tree.map(lambda *a: jnp.concatenate(a), *(row[4] for row in rows))
        return (*stacked, schedule)

    return whole


@functools.cache
def trained(config: Config, steps: int, points: int) -> Any:
    """Plain training of so many steps along a schedule, see `stn_cnn.trained`."""
    tx = _optimizer(config, config.lr, steps)
    return stn_cnn.trained(problem.task(config), tx, steps, points)
