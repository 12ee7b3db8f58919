"""Whole runs in one compiled scan: tuned while they train, or at fixed hyperparameters."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import batches, budget, stn
from experiments.stn_fashion import problem
from experiments.stn_fashion.config import Config

TRAINING = 5  # training steps per cycle


def cycle_cost(config: Config, centred: bool = True) -> float:
    """G of five training steps and a validation step."""
    outer = budget.weight(config.valid_batch, config.batch)
    return budget.self_tuning(problem.network(config, centred), TRAINING, outer).total


def cycles(config: Config, centred: bool = True) -> int:
    """As many as the budget pays for, a multiple of the recorded points."""
    return budget.stretches(config.budget, cycle_cost(config, centred), config.points)


def evaluated(config: Config, params: Any, parts: Any) -> dict[str, jax.Array]:
    """Loss and error of plain weights on the validation and the test part.

    A thousand examples at a time: the neighbourhoods of all would not fit.
    """
    measured = {}
    for name, part in parts.items():
        size = len(part["y"])
        blocks = max(1, size // 1000)
        cut = size // blocks * blocks
        blocked = jax.tree.map(lambda a: a[:cut].reshape(blocks, -1, *a.shape[1:]), part)  # noqa: B023

        def one(block: Any) -> tuple[jax.Array, jax.Array]:
            z = problem.logits(config, params, block)
            loss = optax.softmax_cross_entropy_with_integer_labels(z, block["y"]).mean()
            return loss, jnp.mean(jnp.argmax(z, -1) != block["y"])

        loss, error = jax.lax.map(one, blocked)
        measured[f"{name}_loss"], measured[f"{name}_error"] = loss.mean(), error.mean()
    return measured


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
    config: Config, centred: bool, mode: Mode, normalised: bool = False
) -> bilevel.Algorithm:
    """The loop of Delta-STN (``centred``), or of STN.

    Hyperparameters are moved by SGD. So is the response, whose steps are then as small as its
    gradients: Adam would make full steps of noise alone, and no perturbation would be too narrow
    for it. ``normalised``: by Adam all the same, as the weights are.
    """
    count = cycles(config, centred)
    network = problem.network(config, centred)
    outer, inner = problem.losses(config)
    outer_lr = config.outer_lr if centred else config.stn_outer_lr
    decay = functools.partial(optax.cosine_decay_schedule, decay_steps=TRAINING * count)
    outer_tx = optax.sgd(optax.cosine_decay_schedule(outer_lr, count))
    # No momentum can follow one exceptional batch far.
    response_tx = (
        optax.adam(decay(config.lr))
        if normalised
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
        constrain=problem.space(config),
        warm_up=round(config.warm_up * count),
    )


def sample(config: Config, train: Any, valid: Any, key: Any) -> Any:
    """Batches of a cycle: ``(5, batch, ...)`` to train, with keys of dropout, one to validate."""
    inner_key, outer_key, drop_key = jax.random.split(key, 3)
    inner_batches = batches.draw(train, inner_key, (TRAINING, config.batch))
    inner_batches["key"] = jax.random.split(drop_key, TRAINING)
    return inner_batches, batches.draw(valid, outer_key, (config.valid_batch,))


@functools.cache
def tuned(config: Config, centred: bool = True, normalised: bool = False) -> Any:
    """``(params, start, mode, key, train, held_out) -> records`` of one run.

    ``held_out`` has the parts "validation" and "test".
    """
    every = cycles(config, centred) // config.points
    bounds = problem.space(config)

    def whole(params: Any, start: Any, mode: Mode, key: Any, train: Any, held_out: Any) -> Any:
        loop = algorithm(config, centred, mode, normalised)

        draw = functools.partial(sample, config, train, held_out["validation"])

        def some(state: Any, _: None) -> Any:
            result = bilevel.scan_run(loop, state, draw, every, key=key)
            state = result.state
            weights = loop.deploy(state)
            norms = {
                "hypergrad_norm": jnp.mean(result.infos.hypergrad_norm),
                "response_norm": result.infos.stats["response_norm"][-1],
            }
            kept = (bounds.constrain(state.raw), state.scales, norms)
            return state, (*kept, evaluated(config, weights, held_out))

        state = loop.init(params, start, key=key)
        state = stn.with_scale(state, mode.scale)
        return jax.lax.scan(some, state, None, length=config.points)[1]

    return jax.jit(whole)


@functools.cache
def trained(config: Config) -> Any:
    """``(params, opt_state, hparams, key, train, first, count, total)``: plain training.

    Steps ``first`` to ``first + count`` of ``total``, over which the rate falls to zero. The
    numbers are traced: trials of any length share one program.
    """
    network = problem.network(config)
    _, inner = problem.losses(config)

    def some(
        params: Any, opt_state: Any, hparams: Any, key: Any, train: Any, first: Any, count: Any,
        total: Any,
    ) -> Any:  # fmt: skip

        def step(t: Any, carry: Any) -> Any:
            params, opt_state = carry
            batch_key, drop_key = jax.random.split(jax.random.fold_in(key, t))
            batch = {**batches.draw(train, batch_key, (config.batch,)), "key": drop_key}
            grads = jax.grad(lambda p: inner(network.plain(None, p), hparams, batch))(params)
            rate = config.lr * 0.5 * (1 + jnp.cos(jnp.pi * t / total))
            updates, opt_state = optax.adam(rate).update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return jax.lax.fori_loop(first, first + count, step, (params, opt_state))

    return jax.jit(some)


@functools.cache
def evaluator(config: Config) -> Any:
    """``(params, held_out) -> metrics`` of plain weights."""
    network = problem.network(config)

    def evaluate(params: Any, held_out: Any) -> dict[str, jax.Array]:
        return evaluated(config, network.plain(None, params), held_out)

    return jax.jit(evaluate)
