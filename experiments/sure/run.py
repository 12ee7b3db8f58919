"""Runs `sure`: denoisers tuned without a clean image, beside those that see it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.objectives import SURE
from experiments.common import expected, record
from experiments.sure import problem
from experiments.sure.config import Config

ARMS = ("sure", "sure_train", "supervised", "oracle")
TABLE = ("mse", "psnr")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All denoisers and ways to tune them, on one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    train, test = problem.images(config, seed)
    records.append("noisy", 0, 0.0, **_quality(test.noisy, test.clean))
    for model in config.models:
        for arm in ARMS:
            seen = train if arm in ("sure_train", "supervised") else test
            path = f"{model}_{arm}_path"
            lam, cost = tune(model, arm, seen, config, seed, records, path)
            u = denoise(model, test.noisy, lam, test.noisy, config).params
            records.append(
                f"{model}_{arm}", config.steps, cost, **_quality(u, test.clean),
                **{name: np.ravel(x)[:4].tolist() for name, x in lam.items()},
            )  # fmt: skip


def _quality(u: jax.Array, clean: jax.Array) -> dict[str, float]:
    mse = float(jnp.mean((u - clean) ** 2))
    return {"mse": mse, "psnr": float(-10 * np.log10(mse))}


def tolerance(noisy: jax.Array, config: Config) -> float:
    """Of the gradient: the loss is 1-strongly convex, so the distance to the minimum is below."""
    return config.tolerance * config.sigma * noisy.size**0.5


def denoise(model: str, start: jax.Array, lam: Any, noisy: jax.Array, config: Config) -> Any:
    """The denoised images, from a start."""
    tol = tolerance(noisy, config)
    return bilevel.minimize(problem.loss(model), start, lam, noisy, tol=tol, max_steps=500)


def objective(model: str, arm: str, config: Config, seed: int) -> Any:
    """The outer loss of an arm: the true risk, or its estimate from the noisy images alone."""
    if arm in ("supervised", "oracle"):
        return problem.true_risk
    response = bilevel.Implicit(bilevel.CG(config.products, rtol=1e-4))
    return SURE(
        config.sigma, problem.predict, problem.loss(model),
        probes=config.probes, seed=seed, response=response,
    ).outer  # fmt: skip


def tune(
    model: str,
    arm: str,
    seen: problem.Images,
    config: Config,
    seed: int,
    records: record.Records,
    path: str,
) -> tuple[Any, float]:
    """The hyperparameters of the least outer value met, and what was paid."""
    inner, outer = problem.loss(model), objective(model, arm, config, seed)
    batch = seen.clean if arm in ("supervised", "oracle") else seen.noisy
    response = bilevel.Implicit(bilevel.CG(config.products, rtol=1e-4), warm_start=False)
    tx = optax.adam(config.rate)

    @jax.jit
    def step(u: jax.Array, lam: Any, state: Any) -> Any:
        found = denoise(model, u, lam, seen.noisy, config)
        solution = bilevel.hypergrad_solve(
            outer, inner, response, found.params, lam, inner_batch=seen.noisy, outer_batch=batch
        )
        updates, state = tx.update(solution.grads, state)
        told = {
            "value": solution.value / seen.noisy.size,
            "risk": jnp.mean((found.params - seen.clean) ** 2),
            "result": jnp.maximum(solution.result, found.result),
            "gradients": found.stats["num_gradients"],
            "products": solution.stats["num_matvecs"],
        }
        return found.params, optax.apply_updates(lam, updates), state, told

    lam = problem.hparams(model, config)
    u, state, cost, best = seen.noisy, tx.init(lam), 0.0, (np.inf, lam)
    # The solve for the trace and, for its derivative, its transpose: at most as long each.
    traces = 2 * config.products * config.probes if arm.startswith("sure") else 0
    for i in range(config.steps):
        now = lam
        u, lam, state, told = step(u, lam, state)
        told = {name: float(x) for name, x in told.items()}
        cost += told["gradients"] + 2.5 * (told["products"] + 1 + traces)
        if told["value"] < best[0]:
            best = told["value"], now
        records.append(path, i, cost, **told)
    return best[1], cost


def summary(records: list[record.Record]) -> dict[str, Any]:
    """The risk of each arm over the oracle's, seed by seed."""
    last = record.final(records)
    told: dict[str, Any] = {}
    models = sorted({name.removesuffix("_oracle") for name, _ in last if name.endswith("_oracle")})
    for model in models:
        for arm in ARMS[:-1]:
            ratios = [
                got.metrics["mse"] / last[f"{model}_oracle", seed].metrics["mse"]
                for (name, seed), got in last.items()
                if name == f"{model}_{arm}"
            ]
            told[f"{model}_{arm}_over_oracle"] = {"mse": expected.statistics(ratios)}
    return told
