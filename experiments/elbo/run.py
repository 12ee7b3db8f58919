"""Runs `elbo`: one variational run against a grid of decays, on few examples."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.objectives import DataEmphasizedELBO, Variational, k_folds
from experiments.common import expected, record
from experiments.elbo import problem
from experiments.elbo.config import Config

TABLE = ("test_loss", "test_error")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All sources and arms on one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    for name in config.sources:
        w, full = problem.source(name, config, seed)
        for arm in config.arms:
            task = problem.task(arm, w, full, config, seed)
            for method, call in (("grid", grid), ("elbo", variational)):
                found, cost, told = call(arm, task, config, seed)
                records.append(
                    f"{name}_{arm}_{method}", 0, cost, **judged(found, task.test), **told
                )
            found, cost, told = variational(arm, task, config, seed, kappa=1.0)
            records.append(f"{name}_{arm}_plain", 0, cost, **judged(found, task.test), **told)


@jax.jit
def _judged(w: Any, test: Any) -> tuple[jax.Array, jax.Array]:
    wrong = jnp.argmax(problem.outputs(w, test[0]), 1) != test[1]
    return problem.nll(w, (), test), jnp.mean(wrong)


def judged(w: Any, test: Any) -> dict[str, float]:
    """Loss and error on test examples."""
    loss, wrong = _judged(w, test)
    return {"test_loss": float(loss), "test_error": float(wrong)}


def optimizer(arm: str, config: Config, rate: float | None = None) -> Any:
    """Adam, the same for both methods."""
    if rate is None:
        rate = config.rate_head if arm == "head" else config.rate_whole
    return optax.adam(optax.cosine_decay_schedule(rate, config.steps))


def trained(loss: Any, tx: Any, start: Any, hparams: Any, batch: Any, config: Config) -> Any:
    """The last parameters of a run that reads all of the batch in each step.

    A pair (data, key) draws another key per step.
    """

    def body(state: Any, step: jax.Array) -> Any:
        now = batch if not _drawn(batch) else (batch[0], jax.random.fold_in(batch[1], step))
        now = jax.tree.map(lambda leaf: leaf[None], now)
        return bilevel.descend(loss, tx, state, hparams, now, steps=1)[0], None

    first = bilevel.InnerState(start, tx.init(start))
    return jax.lax.scan(body, first, jnp.arange(config.steps))[0].params


def _drawn(batch: Any) -> bool:
    last = batch[-1]
    return jnp.issubdtype(last.dtype, jax.dtypes.prng_key)


def grid(
    arm: str, task: problem.Task, config: Config, seed: int
) -> tuple[Any, float, dict[str, Any]]:
    """Maximum a posteriori with the decays of least validation loss, refitted on all examples."""
    loss, tx = problem.penalized(task.center), optimizer(arm, config)
    x, y = task.train
    count = len(y)
    folds = k_folds(count, config.folds, seed=seed)
    folds = folds if arm == "head" else folds[:1]
    kept = np.ones((len(folds), count), np.float32)
    for row, (_, held) in zip(kept, folds, strict=True):
        row[np.asarray(held)] = 0
    several = config.decays if arm == "whole" else (0.0,)
    points = jnp.asarray([(h, b) for h in config.decays for b in several], jnp.float32)

    def fit(point: jax.Array, weights: jax.Array) -> Any:
        decays = {"head": point[0], "body": point[1]}
        return trained(loss, tx, task.start, decays, (x, y, weights), config)

    @jax.jit
    def score(point: jax.Array) -> jax.Array:
        def one(weights: jax.Array) -> jax.Array:
            return problem.nll(fit(point, weights), (), (x, y, 1 - weights))

        return jnp.mean(jax.vmap(one)(jnp.asarray(kept)))

    scores = jax.lax.map(score, points) if arm == "whole" else jax.vmap(score)(points)
    best = points[jnp.argmin(scores)]
    w = jax.jit(fit)(best, jnp.ones(count))
    runs = len(points) * len(folds) + 1
    return w, float(runs * config.steps), {"decay": float(best[0]), "body": float(best[1])}


def variational(
    arm: str, task: problem.Task, config: Config, seed: int, kappa: float | None = None
) -> tuple[Any, float, dict[str, Any]]:
    """The mean of one variational run on all examples."""
    separate = "head" if arm == "whole" else ()
    elbo = DataEmphasizedELBO(
        problem.nll, len(task.train[1]), kappa, separate, task.center, samples=config.samples
    )
    tx = optax.multi_transform(
        {"mean": optimizer(arm, config), "scale": optimizer(arm, config, config.scale_rate)},
        lambda q: Variational(jax.tree.map(lambda _: "mean", q.mean), "scale"),
    )
    fit = jax.jit(lambda q, key: trained(elbo.inner, tx, q, (), (task.train, key), config))
    q = fit(elbo.init(task.start, config.scale), jax.random.key(seed))
    variances = np.asarray(elbo.prior_variances(q)) * len(task.train[1])
    told = {"decay": float(1 / variances[0]), "scale": float(q.scale)}
    return q.mean, float(config.steps * config.samples), told


def summary(records: list[record.Record]) -> dict[str, Any]:
    """The variational run less the search, seed by seed, and the ratio of costs."""
    told: dict[str, Any] = {}
    names = sorted({r.method.removesuffix("_elbo") for r in records if r.method.endswith("_elbo")})
    compare = functools.partial(expected.paired, records)
    for name in names:
        for other in ("grid", "plain"):
            told[f"{name}_over_{other}"] = {
                metric: compare(metric, f"{name}_elbo", f"{name}_{other}")
                for metric in ("test_loss", "test_error")
            }
    return told
