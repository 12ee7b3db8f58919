"""Whole runs in one compiled scan: tuned while they train, or at rates that are given."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import batches, budget, stn
from experiments.stn_digits import problem
from experiments.stn_digits.config import Config

TRAINING = 5  # training steps per cycle
LINEARIZED = "delta_stn_low"  # its response is learned on linearized outputs


def centred(method: str) -> bool:
    """Whether it is Delta-STN."""
    return method.startswith("delta_stn")


def cycle_cost(method: str, config: Config) -> float:
    """G of five training steps and a validation step."""
    network = problem.network(config.hidden, centred(method))
    outer = budget.weight(config.valid_batch, config.batch)
    return budget.self_tuning(network, TRAINING, outer, linearized=method == LINEARIZED).total


def cycles(method: str, config: Config) -> int:
    """As many as the budget pays for, a multiple of the recorded points."""
    return budget.stretches(config.budget, cycle_cost(method, config), config.points)


def optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Of the weights, for every method, and of the response: SGD, whose rate falls to zero."""
    descent = optax.sgd(optax.cosine_decay_schedule(config.lr, steps), momentum=0.9)
    return optax.chain(optax.clip_by_global_norm(1.0), descent)


def evaluated(config: Config, params: Any, sets: Any) -> dict[str, jax.Array]:
    """Loss and error of deployed weights on the validation and the test part."""
    measured = {}
    for name, part in (("validation", "valid"), ("test", "test")):
        z = problem.logits(config.hidden, params, None, sets[part])
        loss = optax.softmax_cross_entropy_with_integer_labels(z, sets[part]["y"]).mean()
        measured[f"{name}_loss"] = loss
        measured[f"{name}_error"] = jnp.mean(jnp.argmax(z, -1) != sets[part]["y"])
    return measured


def sample(config: Config, sets: Any, key: Any) -> Any:
    """Batches of a cycle: ``(5, batch, ...)`` to train, with keys of dropout, one to validate."""
    inner_key, outer_key, drop_key = jax.random.split(key, 3)
    inner_batches = batches.draw(sets["train"], inner_key, (TRAINING, config.batch))
    inner_batches["key"] = jax.random.split(drop_key, TRAINING)
    return inner_batches, batches.draw(sets["valid"], outer_key, (config.valid_batch,))


class Mode(NamedTuple):
    """What makes a run a control: numbers, one for each of the runs side by side.

    Attributes:
      scale: width of the perturbations at the start.
      moves: 1, or 0 to hold the widths where they are.
      learns: 1, or 0 to hold the response as it was made.
    """

    scale: Any
    moves: Any
    learns: Any


def algorithm(
    method: str, config: Config, mode: Mode, normalised: bool = True
) -> bilevel.Algorithm:
    """The loop of a run.

    ``normalised``: the rates are moved by Adam. Otherwise by SGD, whose steps are as small as
    their gradients: Adam makes full steps of noise alone.
    """
    count = cycles(method, config)
    network = problem.network(config.hidden, centred(method))
    outer, inner = problem.losses(config.hidden)
    rate = optax.cosine_decay_schedule(config.outer_lr, count, exponent=config.outer_power)
    weights_tx = optimizer(config, TRAINING * count)
    outer_tx = optax.adam(rate) if normalised else optax.sgd(config.sgd_outer_lr)
    return bilevel.self_tuning(
        outer,
        inner,
        weights_tx,
        outer_tx,
        TRAINING,
        network=network,
        response_tx=optax.chain(weights_tx, optax.scale(mode.learns)),
        scale_tx=optax.chain(outer_tx, optax.scale(mode.moves)),
        entropy=config.entropy,
        linearize=problem.split(config.hidden) if method == LINEARIZED else None,
        constrain=problem.space(config),
        warm_up=round(config.warm_up * count),
    )


@functools.cache
def tuned(method: str, config: Config, normalised: bool = True) -> Any:
    """``(params, starts, modes, keys, sets) -> records`` of a run from each start."""
    every = cycles(method, config) // config.points

    def one(params: Any, start: jax.Array, mode: Mode, key: Any, sets: Any) -> Any:
        loop = algorithm(method, config, mode, normalised)
        draw = functools.partial(sample, config, sets)

        def some(state: Any, _: None) -> Any:
            result = bilevel.scan_run(loop, state, draw, every, key=key)
            weights = loop.deploy(result.state)
            infos = result.infos
            kept = (
                infos.hparams,
                infos.aux["scales"],
                infos.hypergrad_norm,
                infos.stats["response_norm"],
            )
            return result.state, (kept, evaluated(config, weights, sets))

        state = loop.init(params, problem.rates(start), key=key)
        state = stn.with_scale(state, mode.scale)
        return jax.lax.scan(some, state, None, length=config.points)[1]

    return jax.jit(jax.vmap(one, (None, 0, 0, 0, None)))


@functools.cache
def trained(config: Config, steps: int, points: int) -> Any:
    """``(params, schedules, keys, sets) -> records`` of plain runs, rates given for every cycle."""
    network = problem.network(config.hidden)
    _, inner = problem.losses(config.hidden)
    tx = optimizer(config, steps)
    every = steps // points

    def one(params: Any, schedule: bilevel.HyperSchedule, key: Any, sets: Any) -> Any:

        def loss(params: Any, schedule: bilevel.HyperSchedule, t: jax.Array) -> jax.Array:
            batch_key, drop_key = jax.random.split(jax.random.fold_in(key, t))
            batch = batches.draw(sets["train"], batch_key, (config.batch,))
            weights = network.plain(None, params)
            return inner(weights, schedule(t), {**batch, "key": drop_key})

        def some(state: bilevel.InnerState, i: jax.Array) -> Any:
            steps = i * every + jnp.arange(every)
            state, _ = bilevel.descend(loss, tx, state, schedule, steps, steps=every)
            return state, evaluated(config, network.plain(None, state.params), sets)

        first = bilevel.InnerState(params, tx.init(params))
        return jax.lax.scan(some, first, jnp.arange(points))[1]

    return jax.jit(jax.vmap(one, (None, 0, 0, None)))
