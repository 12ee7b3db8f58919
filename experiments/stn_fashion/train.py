"""Whole runs in one compiled scan: tuned while they train, or at fixed hyperparameters."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import budget, stn, stn_cnn
from experiments.stn_fashion import problem
from experiments.stn_fashion.config import Config

TRAINING = 5  # training steps per cycle


def cycle_cost(config: Config, centred: bool = True) -> float:
    """G of five training steps and a validation step."""
    outer = budget.weight(config.valid_batch, config.batch)
    return budget.self_tuning(problem.task(config).network(centred), TRAINING, outer).total


def cycles(config: Config, centred: bool = True) -> int:
    """As many as the budget pays for, a multiple of the recorded points."""
    return budget.stretches(config.budget, cycle_cost(config, centred), config.points)


class Mode(NamedTuple):
    """What makes a run a control: numbers, so that all runs share one compiled program.

    Attributes:
      scale: width of the perturbations at the start.
      moves: 1, or 0 to hold the widths where they are.
      learns: 1, or 0 to hold the response at zero.
    """

    scale: float
    moves: float = 1.0
    learns: float = 1.0


def algorithm(
    config: Config, centred: bool, mode: Mode, normalized: bool = False
) -> bilevel.Algorithm:
    """The loop of Delta-STN (``centred``), or of STN.

    Hyperparameters are moved by SGD. So is the response, whose steps are then as small as its
    gradients: Adam would make full steps of noise alone, and no perturbation would be too narrow
    for it. ``normalized``: by Adam all the same, as the weights are.
    """
    count = cycles(config, centred)
    network = problem.task(config).network(centred)
    outer, inner = problem.task(config).losses()
    outer_lr = config.outer_lr if centred else config.stn_outer_lr
    decay = functools.partial(optax.cosine_decay_schedule, decay_steps=TRAINING * count)
    outer_tx = optax.sgd(optax.cosine_decay_schedule(outer_lr, count))
    # No momentum can follow one exceptional batch far.
    response_tx = (
        optax.adam(decay(config.lr))
        if normalized
        else optax.chain(
            optax.clip_by_global_norm(1.0), optax.sgd(decay(config.response_lr), momentum=0.9)
        )
    )
    return bilevel.self_tuning(
        outer,
        inner,
        optax.adam(decay(config.lr)),
        outer_tx,
        TRAINING,
        network=network,
        response_tx=optax.chain(response_tx, optax.scale(mode.learns)),
        scale_tx=optax.chain(outer_tx, optax.scale(mode.moves)),
        entropy=config.entropy,
        constrain=stn.space(config),
        warm_up=round(config.warm_up * count),
    )


@functools.cache
def tuned(config: Config, centred: bool = True, normalized: bool = False) -> Any:
    """``(params, start, mode, key, train, held_out) -> records`` of one run.

    ``held_out`` has the parts "validation" and "test".
    """
    every = cycles(config, centred) // config.points
    bounds = stn.space(config)

    def whole(params: Any, start: Any, mode: Mode, key: Any, train: Any, held_out: Any) -> Any:
        loop = algorithm(config, centred, mode, normalized)

        draw = functools.partial(
            stn_cnn.sample, config, TRAINING, config.valid_batch, train, held_out["validation"]
        )

        def some(state: Any, _: None) -> Any:
            result = bilevel.scan_run(loop, state, draw, every, key=key)
            state = result.state
            weights = loop.deploy(state)
            norms = {
                "hypergrad_norm": jnp.mean(result.infos.hypergrad_norm),
                "response_norm": result.infos.stats["response_norm"][-1],
            }
            kept = (bounds.constrain(state.raw), state.scales, norms)
            return state, (*kept, problem.task(config).evaluated(weights, held_out))

        state = loop.init(params, start, key=key)
        state = stn.with_scale(state, mode.scale)
        return jax.lax.scan(some, state, None, length=config.points)[1]

    return jax.jit(whole)


@functools.cache
def trained(config: Config, steps: int, points: int) -> Any:
    """Plain training of so many steps at fixed values, see `stn_cnn.trained`."""
    tx = optax.adam(optax.cosine_decay_schedule(config.lr, steps))
    return stn_cnn.trained(problem.task(config), tx, steps, points)
