"""Whole runs in one compiled scan: tuned while they train, or along a schedule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import batches, budget
from experiments.stn_cifar import problem
from experiments.stn_cifar.config import Config


def cycle_cost(config: Config) -> float:
    """G of the training steps of a cycle and of its validation step."""
    return budget.self_tuning(problem.network(config), config.inner_steps).total


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


def evaluated(config: Config, params: Any, parts: Any) -> dict[str, jax.Array]:
    """Loss and error of plain weights on the parts, a few hundred examples at a time."""
    measured = {}
    for name, part in parts.items():
        size = len(part["y"])
        blocks = max(1, size // 500)

        def one(block: Any) -> tuple[jax.Array, jax.Array]:
            z = problem.logits(config, params, block)
            loss = optax.softmax_cross_entropy_with_integer_labels(z, block["y"]).mean()
            return loss, jnp.mean(jnp.argmax(z, -1) != block["y"])

        def blocked(a: jax.Array, blocks: int = blocks) -> jax.Array:
            return a[: len(a) // blocks * blocks].reshape(blocks, -1, *a.shape[1:])

        loss, error = jax.lax.map(one, jax.tree.map(blocked, part))
        measured[f"{name}_loss"], measured[f"{name}_error"] = loss.mean(), error.mean()
    return measured


def algorithm(config: Config) -> bilevel.Algorithm:
    """The loop of a run."""
    count = cycles(config)
    outer, inner = problem.losses(config)
    rate = optax.cosine_decay_schedule(config.outer_lr, count)
    return bilevel.self_tuning(
        outer,
        inner,
        _optimizer(config, config.lr, config.inner_steps * count),
        optax.adam(rate, eps=config.outer_eps),
        config.inner_steps,
        network=problem.network(config),
        response_tx=_optimizer(
            config, config.response_lr, config.inner_steps * count, config.response_eps
        ),
        scale=config.scale,
        entropy=config.entropy,
        constrain=problem.space(config),
        warm_up=round(config.warm_up * count),
    )


def sample(config: Config, train: Any, valid: Any, key: Any) -> Any:
    """Batches of a cycle: a stack to train, with keys of dropout, and one to validate."""
    inner_key, outer_key, drop_key = jax.random.split(key, 3)
    inner_batches = batches.draw(train, inner_key, (config.inner_steps, config.batch))
    inner_batches["key"] = jax.random.split(drop_key, config.inner_steps)
    return inner_batches, batches.draw(valid, outer_key, (config.batch,))


@functools.cache
def tuned(config: Config) -> Any:
    """``(params, key, train, held_out) -> (hparams, scales, norms, measured, schedule)``.

    ``held_out`` has the parts "validation" and "test". All are stacked over the recorded points;
    the schedule is what training read in every cycle.
    """
    loop, bounds = algorithm(config), problem.space(config)
    every = cycles(config) // config.points

    @jax.jit
    def some(state: Any, key: Any, train: Any, held_out: Any) -> Any:
        draw = functools.partial(sample, config, train, held_out["validation"])
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
            evaluated(config, weights, held_out),
            result.infos.hparams,
        )

    def whole(params: Any, key: Any, train: Any, held_out: Any) -> Any:
        state, rows = loop.init(params, problem.start(config), key=key), []
        for _ in range(config.points):
            state, row = some(state, key, train, held_out)
            rows.append(row)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *(row[:4] for row in rows))
        schedule = jax.tree.map(lambda *a: jnp.concatenate(a), *(row[4] for row in rows))
        return (*stacked, schedule)

    return whole


@functools.cache
def trained(config: Config, steps: int, points: int) -> Any:
    """``(params, schedule, key, train, held_out) -> measured`` of one plain run.

    ``schedule`` is hyperparameters, leaves ``(k,)``: the run is cut in k equal parts, and each
    reads its own.
    """
    network = problem.network(config)
    _, inner = problem.losses(config)
    tx = _optimizer(config, config.lr, steps)
    every = steps // points

    @jax.jit
    def some(state: Any, first: jax.Array, schedule: Any, key: Any, train: Any, held_out: Any):

        def loss(params: Any, schedule: Any, t: jax.Array) -> jax.Array:
            batch_key, drop_key = jax.random.split(jax.random.fold_in(key, t))
            batch = {**batches.draw(train, batch_key, (config.batch,)), "key": drop_key}
            count = len(jax.tree.leaves(schedule)[0])
            row = jnp.minimum(t * count // steps, count - 1)
            hparams = jax.tree.map(lambda x: x[row], schedule)
            return inner(network.plain(None, params), hparams, batch)

        # A stretch is too long to be straight-line code.
        state, _ = bilevel.descend(
            loss, tx, state, schedule, first + jnp.arange(every), steps=every, unroll=False
        )
        return state, evaluated(config, network.plain(None, state.params), held_out)

    def whole(params: Any, schedule: Any, key: Any, train: Any, held_out: Any) -> Any:
        state, rows = bilevel.InnerState(params, tx.init(params)), []
        for i in range(points):
            state, row = some(state, i * every, schedule, key, train, held_out)
            rows.append(row)
        return jax.tree.map(lambda *a: jnp.stack(a), *rows)

    return whole
