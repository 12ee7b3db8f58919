"""Runs `stn_ridge`: STN and Delta-STN from several log decays, beside the exact optimum."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import budget, record
from experiments.stn_ridge import problem
from experiments.stn_ridge.config import Config

METHODS = ("delta_stn", "stn")
TRAINING = 5  # training steps per cycle
KEPT = 100  # points of a trajectory that are recorded
TABLE = (
    "relative_error",
    "worst_error",
    "spread",
    "excess_loss",
    "formula_error",
    "steps_to_tenth",
)


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = METHODS
) -> None:
    """Both methods on one data set; a resumed run skips those that had finished."""
    records = record.Records(out, seed)
    train, valid = problem.data(config, seed)
    best, loss = problem.optimum(train, valid)
    lam = np.linspace(-6.0, 3.0, 181)
    record.save_arrays(out, f"exact_{seed}", lam=lam, losses=problem.curve(train, valid, lam))
    for method in methods:
        if len(record.read(out, seed=seed, method=method)) == KEPT:
            continue
        records.rewind(method)
        errors, averaged = _frozen(method, config, seed, train, valid)
        paths = _tuned(method, config)(
            jnp.asarray(config.starts), jax.random.key(seed), train, valid
        )
        paths = np.asarray(paths, np.float64)  # (starts, KEPT)
        every = cycles(method, config) // KEPT
        for i in range(KEPT):
            now = paths[:, i]
            records.append(
                method,
                i,
                cycle_cost(method) * every * (i + 1),
                lam=now,
                optimum=best,
                relative_error=float(np.mean(np.abs(now - best)) / abs(best)),
                worst_error=float(np.max(np.abs(now - best)) / abs(best)),
                spread=float(np.ptp(now) / np.ptp(config.starts)),
                excess_loss=float(np.max(problem.curve(train, valid, now)) / loss - 1),
                response_error=errors[i],
                steps_to_tenth=_first_below(errors, 0.1) * config.response_steps / KEPT,
                formula_error=averaged,
            )


def cycle_cost(method: str) -> float:
    """G of five training steps and a validation step; displaced weights cost no product."""
    return budget.self_tuning(_network(method), TRAINING).total


def cycles(method: str, config: Config) -> int:
    """How many a run has."""
    return config.cycles * (config.slower if method == "stn" else 1)


def _network(method: str) -> bilevel.StructuredResponse:
    if method == "stn":
        return bilevel.StructuredResponse(centred=False, gain_scale=0.01)
    return bilevel.StructuredResponse()


def _whole_set(train: Any, valid: Any) -> Any:
    stack = jax.tree.map(lambda a: jnp.broadcast_to(a, (TRAINING, *a.shape)), train)
    return lambda key: (stack, valid)


def algorithm(method: str, config: Config) -> bilevel.Algorithm:
    """The loop of a run."""
    count = cycles(method, config)
    if method == "stn":
        tx = response_tx = optax.adam(optax.cosine_decay_schedule(config.stn_lr, TRAINING * count))
    else:
        tx = optax.sgd(config.delta_lr[0])
        # The gradient of U is of the size of d: a rate over its variance makes it scale-free.
        response_tx = optax.sgd(config.delta_lr[1] / config.sigma**2)
    return bilevel.self_tuning(
        problem.outer,
        problem.inner,
        tx,
        optax.adam(optax.cosine_decay_schedule(config.outer_lr, count)),
        TRAINING,
        network=_network(method),
        response_tx=response_tx,
        scale=config.sigma,
        tune_scales=False,
        groups=1,
        warm_up=round(config.warm_up * count),
    )


@functools.cache
def _tuned(method: str, config: Config) -> Any:
    """``(starts, key, train, valid) -> (starts, KEPT)`` log decays along each run."""
    loop, count = algorithm(method, config), cycles(method, config)

    def one(lam: jax.Array, key: Any, train: Any, valid: Any) -> jax.Array:
        state = loop.init(jnp.zeros(config.features), lam, key=key)
        sample = _whole_set(train, valid)
        infos = bilevel.scan_run(loop, state, sample, count, key=key).infos
        return infos.hparams[count // KEPT - 1 :: count // KEPT][:KEPT]

    return jax.jit(jax.vmap(one, (0, None, None, None)))


def _first_below(errors: list[float], bound: float) -> int:
    """How many recorded points it took to get below a bound; all of them if it never did."""
    return next((i + 1 for i, error in enumerate(errors) if error < bound), len(errors))


def _frozen(
    method: str, config: Config, seed: int, train: Any, valid: Any
) -> tuple[list[float], float]:
    """Relative errors of the response along training at a fixed log decay.

    Against the closed form of what the method's own objective is minimized by at this sigma. The
    second number is that of the mean over the last half: SGD at a constant rate hovers.
    """
    thetas = np.asarray(_learn(method, config)(jax.random.key(seed), train, valid), np.float64)
    closed_form = {"stn": problem.joint, "delta_stn": problem.jacobian}[method]
    expected = closed_form(train, config.frozen, config.frozen_sigma)
    errors = np.linalg.norm(thetas - expected, axis=1) / np.linalg.norm(expected)
    mean = thetas[KEPT // 2 :].mean(axis=0)
    return errors.tolist(), float(np.linalg.norm(mean - expected) / np.linalg.norm(expected))


@functools.cache
def _learn(method: str, config: Config) -> Any:
    """``(key, train, valid) -> (KEPT, features)``: the response along training, lam held."""
    algorithm = bilevel.self_tuning(
        problem.outer,
        problem.inner,
        optax.sgd(config.rate),
        optax.set_to_zero(),
        TRAINING,
        network=_network(method),
        scale=config.frozen_sigma,
        tune_scales=False,
        groups=1,
    )
    count = config.response_steps // TRAINING

    def one(key: Any, train: Any, valid: Any) -> jax.Array:
        state = algorithm.init(jnp.zeros(config.features), jnp.float32(config.frozen), key=key)
        sample = _whole_set(train, valid)

        def some(state: Any, _: None) -> Any:
            run = bilevel.scan_run(algorithm, state, sample, count // KEPT, key=key)
            return run.state, run.state.network_params.gains[""][0]

        return jax.lax.scan(some, state, None, length=KEPT)[1]

    return jax.jit(one)
