"""Runs `protocol`: how good a tuned setting looks, and how good it is on another seed."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import budget, data, protocol, record
from experiments.digits import config as digits_config
from experiments.digits import problem
from experiments.protocol.config import Config

METHODS = ("no_tuning", "random_search", "tuned_per_weight")
TABLE = ("validation_loss", "same_seed_test", "other_seed_test")


class Trained(NamedTuple):
    """The best point of a network along its training, by validation."""

    params: Any
    loss: jax.Array


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = METHODS
) -> None:
    """Every method is tuned on a seed of its own, and judged there and on this one."""
    records = record.Records(out, seed)
    tuning = config.first + seed
    for method in methods:
        if records.finished(method, 1):
            continue
        settings = _settings(method, config, tuning)
        found = protocol.tune_and_judge(
            settings,
            lambda setting, at: train(config, problem.initial(_digits(config), at), setting, at),
            lambda model, at: float(model.loss),
            lambda model, at: float(_loss(config, model.params, parts(config, at)["test"])),
            tuning=[tuning],
            judging=[seed],
        )
        told = {
            "validation_loss": found.validation,
            "same_seed_test": found.same_seed_test[0],
            "other_seed_test": found.other_seed_test[0],
        }
        if method == "tuned_per_weight":
            # Of a gradient method the winner is the network that was tuned, not one trained anew.
            model = _tuned(config, tuning)[1]
            told["validation_loss"] = float(model.loss)
            told["same_seed_test"] = float(
                _loss(config, model.params, parts(config, tuning)["test"])
            )
        records.append(method, 0, _cost(method, config, len(settings)), **told)


def _cost(method: str, config: Config, settings: int) -> float:
    """G of finding a setting; measurements of validation losses cost nothing."""
    if method != "tuned_per_weight":
        return budget.training(settings * config.steps).total
    outer = budget.weight(config.valid, config.train)
    step = budget.training(config.inner_steps)
    step = step.plus(budget.implicit_hypergradient(config.products, outer))
    return step.times(config.rounds).total


def _digits(config: Config) -> digits_config.Config:
    return digits_config.Config(
        train=config.train, valid=config.valid, hidden=config.hidden, damping=config.damping
    )


@functools.cache
def _operator(config: Config) -> bilevel.GaussNewton:
    return problem.operator(_digits(config))


@functools.lru_cache(4)
def parts(config: Config, seed: int) -> dict[str, Any]:
    """Training and validation digits drawn by the seed; test digits that no seed trains on."""
    whole = data.digits(valid=0, test=config.test, seed=0)
    rows = np.random.default_rng(seed).permutation(len(whole.train.y))
    cut = {"train": rows[: config.train], "valid": rows[config.train :][: config.valid]}
    chosen = {name: (whole.train.x[at], whole.train.y[at]) for name, at in cut.items()}
    chosen["test"] = (whole.test.x, whole.test.y)
    return {
        name: {"x": jnp.asarray(x.reshape(-1, 64)), "y": jnp.asarray(y)}
        for name, (x, y) in chosen.items()
    }


def _loss(config: Config, params: Any, batch: Any) -> jax.Array:
    return problem.cross_entropy(_operator(config).model(params, None, batch), None, batch)


def train(config: Config, params: Any, hparams: Any, seed: int) -> Trained:
    """A network from scratch with decays that do not move."""
    sets = parts(config, seed)
    return _trainer(config)(params, hparams, sets["train"], sets["valid"])


@functools.cache
def _trainer(config: Config) -> Any:
    operator, tx = _operator(config), optax.adam(config.inner_lr)
    every = config.steps // config.measured

    @jax.jit
    def whole(params: Any, hparams: Any, fitted: Any, valid: Any) -> Trained:
        def full(w: Any, lam: Any, _: None) -> jax.Array:
            return operator.loss(w, lam, fitted)

        def stretch(carry: Any, _: Any) -> Any:
            state, best = carry
            state = bilevel.descend(full, tx, state, hparams, None, steps=every)[0]
            loss = _loss(config, state.params, valid)
            better = loss < best.loss
            kept = jax.tree.map(
                lambda new, old: jnp.where(better, new, old), Trained(state.params, loss), best
            )
            return (state, kept), None

        first = bilevel.InnerState(params, tx.init(params)), Trained(params, jnp.float32(jnp.inf))
        return jax.lax.scan(stretch, first, length=config.measured)[0][1]

    return whole


def _settings(method: str, config: Config, tuning: int) -> list[Any]:
    """The decays that are chosen among, found on a tuning seed alone."""
    params = problem.initial(_digits(config), tuning)
    if method == "no_tuning":
        return [problem.decays(params, config.start, per_weight=False)]
    if method == "tuned_per_weight":
        return [_tuned(config, tuning)[0]]
    leaves, tree = jax.tree.flatten(params)
    drawn = np.random.default_rng(tuning).uniform(
        config.low, config.high, (config.trials, len(leaves))
    )
    return [jax.tree.unflatten(tree, list(map(jnp.float32, row))) for row in drawn]


@functools.lru_cache(2)
def _tuned(config: Config, seed: int) -> tuple[Any, Trained]:
    """A decay per weight, moved while one network trains; both at the best point by validation."""
    (seed,) = protocol.tuning_seeds([seed])
    params = problem.initial(_digits(config), seed)
    start = problem.decays(params, config.start, per_weight=True)
    sets = parts(config, seed)
    best = _tuner(config)(params, start, sets["train"], sets["valid"])
    return best.best.hparams, Trained(best.best_params, best.best_score)


@functools.cache
def _tuner(config: Config) -> Any:
    operator = _operator(config)

    def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return _loss(config, params, batch)

    loop = bilevel.alternate(
        outer,
        operator.loss,
        bilevel.Implicit(bilevel.CG(max_steps=config.products), operator),
        inner_tx=optax.adam(config.inner_lr),
        outer_tx=optax.adam(config.outer_lr),
        inner_steps=config.inner_steps,
    )

    @jax.jit
    def whole(params: Any, hparams: Any, fitted: Any, valid: Any) -> Any:
        stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.inner_steps, *x.shape)), fitted)
        return bilevel.scan_run(
            loop,
            loop.init(params, hparams),
            lambda _: (stack, valid),
            config.rounds,
            key=jax.random.key(0),
            score=lambda state: _loss(config, loop.deploy(state), valid),
        )

    return whole
