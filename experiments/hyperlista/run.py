"""Runs `hyperlista`: a few scalars of a sparse coder, tuned through its own iteration."""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import expected, record
from experiments.hyperlista import problem
from experiments.hyperlista.config import Config

SCALARS = ("ista", "fista", "hyperlista", "hyperlista_layers")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All solvers on one dictionary; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    d = problem.dictionary(config, seed)
    for method in SCALARS:
        lam = tuned(method, d, config, seed, config.density, records)
        _judge(method, lam, d, config, seed, records, config.steps)
    lam = tuned("hyperlista", d, config, seed, config.shifted, None)
    _judge("hyperlista_retuned", lam, d, config, seed, records, config.steps)
    lam, calls = grid(d, config, seed)
    _judge("hyperlista_grid", lam, d, config, seed, records, calls / 3)
    lam = tuned("lista", d, config, seed, config.density, records)
    _judge("lista", lam, d, config, seed, records, config.network_steps)


def solver(method: str, d: problem.Dictionary, config: Config, soft: bool) -> tuple[Any, Any]:
    """The step of a method and its first hyperparameters."""
    sharpness = config.sharpness if soft else None
    if method == "lista":
        return problem.lista(d, config.layers)
    if method.startswith("hyperlista"):
        each = config.layers if method == "hyperlista_layers" else 0
        return problem.hyperlista(d, sharpness, each)
    return {"ista": problem.ista, "fista": problem.fista}[method](d)


def response(step: Any, config: Config) -> bilevel.UnrollMap:
    """As many steps of it, from zero."""
    return bilevel.UnrollMap(step, config.layers, initial=problem.start)


def blank(config: Config, count: int) -> problem.State:
    """The shapes of an iteration's state."""
    zeros = jnp.zeros((count, config.codes))
    return problem.State(zeros, zeros)


def tuned(
    method: str,
    d: problem.Dictionary,
    config: Config,
    seed: int,
    density: float,
    records: record.Records | None,
) -> Any:
    """Hyperparameters after Adam on hypergradients, each on codes drawn anew."""
    lam, values = _learned(method, config, density)(d, jax.random.key(seed))
    steps = len(values)
    if records is not None:
        for i, part in enumerate(np.array_split(np.asarray(values), 10)):
            at = (i + 1) * steps // 10
            records.append(f"{method}_path", at, at, nmse_db=10 * part.mean() / np.log(10))
    return lam


@functools.cache
def _learned(method: str, config: Config, density: float) -> Any:
    """Jitted ``(dictionary, key) -> (hyperparameters, losses)``, for all seeds."""
    network = method == "lista"
    steps = config.network_steps if network else config.steps
    rate = config.network_rate if network else config.rate
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = blank(config, config.batch)

    @jax.jit
    def learn(d: problem.Dictionary, key: Any) -> Any:
        step, lam = solver(method, d, config, soft=True)
        gradient = bilevel.value_and_hypergrad(problem.error, None, response(step, config))

        def advance(carry: Any, key: Any) -> Any:
            lam, opt = carry
            codes, seen = problem.draw(key, d.a, config.batch, density)
            value, grads = gradient(state, lam, inner_batch=seen, outer_batch=codes)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(lam, updates), opt), value

        (lam, _), values = jax.lax.scan(advance, (lam, tx.init(lam)), jax.random.split(key, steps))
        return lam, values

    return learn


@functools.partial(jax.jit, static_argnames=("method", "config", "density", "soft"))
def nmse(
    lam: Any, d: Any, key: Any, *, method: str, config: Config, density: float, soft: bool
) -> jax.Array:
    """In dB, on codes that no tuning saw; of the iteration as it is, or with relaxed selection."""
    step, _ = solver(method, d, config, soft=soft)
    codes, seen = problem.draw(key, d.a, config.test, density)
    state = response(step, config).run(blank(config, config.test), lam, seen)
    return 10 / jnp.log(10.0) * problem.error(state, lam, codes)


def _judge(
    method: str, lam: Any, d: Any, config: Config, seed: int, records: record.Records, calls: float
) -> None:
    base = method.removesuffix("_retuned").removesuffix("_grid")
    keys = jax.random.split(jax.random.key(seed + 10_000))
    looks = {
        "nmse_db": (keys[0], config.density, False),
        "shifted_db": (keys[1], config.shifted, False),
        "relaxed_db": (keys[0], config.density, True),
    }
    told = {}
    for name, (key, density, soft) in looks.items():
        if soft and not base.startswith("hyperlista"):
            continue
        where = dict(method=base, config=config, density=density, soft=soft)
        told[name] = float(nmse(lam, d, key, **where))
    if base == "hyperlista":
        told |= {name: float(jnp.exp(x)) for name, x in lam.items()}
    records.append(method, config.layers, calls, **told)


def grid(d: problem.Dictionary, config: Config, seed: int) -> tuple[Any, int]:
    """The best of a grid of the three scalars on one batch, and how many were tried."""
    lows, highs = (0.004, 0.004, 0.01), (0.1, 0.1, 0.16)
    axes = [np.geomspace(a, b, n) for a, b, n in zip(lows, highs, config.grid, strict=True)]
    points = np.log(np.array(list(itertools.product(*axes)), np.float32))
    table = dict(zip(problem.FIRST, jnp.asarray(points).T, strict=True))
    values = _searched(config)(table, d, jax.random.key(seed))
    best = int(jnp.argmin(values))
    return jax.tree.map(lambda x: x[best], table), len(points)


@functools.cache
def _searched(config: Config) -> Any:
    """Jitted ``(table, dictionary, key) -> losses`` of all points of a grid, on one batch."""

    @jax.jit
    def values(table: Any, d: problem.Dictionary, key: Any) -> jax.Array:
        step, _ = solver("hyperlista", d, config, soft=False)
        codes, seen = problem.draw(key, d.a, config.batch, config.density)

        def value(lam: Any) -> jax.Array:
            state = response(step, config).run(blank(config, config.batch), lam, seen)
            return problem.error(state, lam, codes)

        return jax.lax.map(value, table)

    return values


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Differences in dB of pairs of solvers on the same dictionary, with their intervals."""
    pairs = {
        "hyperlista_less_ista": ("hyperlista", "ista"),
        "hyperlista_less_fista": ("hyperlista", "fista"),
        "hyperlista_less_lista": ("hyperlista", "lista"),
        "hyperlista_less_grid": ("hyperlista", "hyperlista_grid"),
        "layers_less_hyperlista": ("hyperlista_layers", "hyperlista"),
    }
    told = {name: expected.paired(records, "nmse_db", a, b) for name, (a, b) in pairs.items()}
    told["relaxed_less_selected"] = expected.interval(
        {
            r.seed: r.metrics["relaxed_db"] - r.metrics["nmse_db"]
            for (method, _), r in record.final(records).items()
            if method == "hyperlista"
        }
    )
    shift = {
        "hyperlista_less_retuned": ("hyperlista", "hyperlista_retuned"),
        "hyperlista_less_lista_shifted": ("hyperlista", "lista"),
    }
    return told | {
        name: expected.paired(records, "shifted_db", a, b) for name, (a, b) in shift.items()
    }
