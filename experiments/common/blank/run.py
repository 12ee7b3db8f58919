"""Runs `NAME`: a log decay by hypergradients, against the decay it started at."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bilevel
from experiments.common import record
from experiments.common.blank.config import Config

METHODS = ("untuned", "tuned")


def error(w: Any, lam: Any, batch: Any) -> Any:
    """Mean squared error."""
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def train(w: Any, lam: Any, batch: Any) -> Any:
    """What training minimizes."""
    return error(w, lam, batch) + jnp.exp(lam) * jnp.sum(w**2)


def run(config: Config, seed: int, out: Path, resume: bool, methods: Any = METHODS) -> None:
    """All methods on one seed; each is stopped by validation, and reads the test part once."""
    records = record.Records(out, seed)
    records.rewind()
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (3, config.rows, config.columns))
    y = x[..., 0] + jax.random.normal(keys[1], x.shape[:2])
    fitted, valid, test = ((x[i], y[i]) for i in range(3))
    response = bilevel.Implicit(bilevel.CG())
    slope = jax.jit(bilevel.hypergrad(error, train, response))
    minimum = jax.jit(lambda lam: bilevel.minimize(train, x[0, 0] * 0, lam, fitted).params)
    for method in methods:
        lam, seen = jnp.float32(-6.0), []
        for step in range(config.steps):
            w = minimum(lam)
            seen.append((float(error(w, lam, valid)), w))
            records.append(method, step, step + 1, validation_loss=seen[-1][0])
            if method == "tuned":
                lam -= config.rate * slope(w, lam, inner_batch=fitted, outer_batch=valid)
        loss, w = min(seen, key=lambda point: point[0])
        told = {"validation_loss": loss, "test_loss": float(error(w, lam, test))}
        records.append(method, config.steps, config.steps, **told)
