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
    names = dict.fromkeys(name for name, _ in config.tasks)
    sources = {name: problem.source(name, config, seed) for name in names}
    for name, arm in config.tasks:
        task = problem.task(arm, *sources[name], config, seed)
        plain = functools.partial(variational, kappa=1.0)
        for method, call in (("grid", grid), ("elbo", variational), ("plain", plain)):
            found, cost, told = call(arm, task, config, seed)
            records.append(f"{name}_{arm}_{method}", 0, cost, **judged(found, task.test), **told)


@jax.jit
def _judged(several: Any, test: Any) -> tuple[jax.Array, jax.Array]:
    def one(w: Any) -> jax.Array:
        return jax.nn.log_softmax(problem.outputs(w, test[0]))

    count = jax.tree.leaves(several)[0].shape[0]
    logs = jax.nn.logsumexp(jax.lax.map(one, several), axis=0) - jnp.log(count)
    loss = -jnp.mean(jnp.take_along_axis(logs, test[1][:, None], 1))
    return loss, jnp.mean(jnp.argmax(logs, 1) != test[1])


def judged(several: Any, test: Any) -> dict[str, float]:
    """Loss and error on test examples of the mean prediction of several parameters, stacked."""
    loss, wrong = _judged(several, test)
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
    count = len(task.train[1])
    folds = k_folds(count, config.folds, seed=seed)
    folds = folds if arm == "head" else folds[:1]
    kept = np.ones((len(folds), count), np.float32)
    for row, (_, held) in zip(kept, folds, strict=True):
        row[np.asarray(held)] = 0
    several = config.decays if arm == "whole" else (0.0,)
    points = jnp.asarray([(h, b) for h in config.decays for b in several], jnp.float32)
    score, fit = _searched(arm, config)
    best = points[jnp.argmin(score(points, kept, task))]
    w = fit(best, jnp.ones(count), task)
    runs = len(points) * len(folds) + 1
    told = {"decay": float(best[0]), "body": float(best[1])}
    return _alone(w), float(runs * config.steps), told


@functools.cache
def _searched(arm: str, config: Config) -> tuple[Any, Any]:
    """The validation losses of many decays, and the fit of one; compiled once for all seeds."""
    tx = optimizer(arm, config)

    def fit(point: jax.Array, weights: jax.Array, task: problem.Task) -> Any:
        decays = {"head": point[0], "body": point[1]}
        batch = (*task.train, weights)
        return trained(problem.penalized(task.center), tx, task.start, decays, batch, config)

    def score(points: jax.Array, kept: jax.Array, task: problem.Task) -> jax.Array:
        def one(point: jax.Array) -> jax.Array:
            losses = jax.vmap(
                lambda weights: problem.nll(
                    fit(point, weights, task), (), (*task.train, 1 - weights)
                )
            )(kept)
            return jnp.mean(losses)

        return jax.lax.map(one, points) if arm == "whole" else jax.vmap(one)(points)

    return jax.jit(score), jax.jit(fit)


def variational(
    arm: str, task: problem.Task, config: Config, seed: int, kappa: float | None = None
) -> tuple[Any, float, dict[str, Any]]:
    """Draws from the Gaussian of one variational run on all examples."""
    if kappa is None and arm == "head":
        kappa = config.kappa_head
    q, variances = _fitted(arm, config, kappa)(task, jax.random.key(seed))
    precision = float(1 / (variances[0] * len(task.train[1])))
    told = {"decay": precision, "scale": float(q.scale)}
    told |= {f"mean_{name}": x for name, x in judged(_alone(q.mean), task.test).items()}
    return drawn(q, config.draws, seed), float(config.steps * config.samples), told


@functools.cache
def _fitted(arm: str, config: Config, kappa: float | None) -> Any:
    """The variational run, compiled once for all seeds."""
    rates: dict[Any, Any] = {
        "mean": optimizer(arm, config),
        "scale": optimizer(arm, config, config.scale_rate),
    }

    def labels(q: Any) -> Any:
        names: Any = q._replace(raw_scale="scale")
        return names._replace(mean=jax.tree.map(lambda _: "mean", q.mean))

    tx = optax.multi_transform(rates, labels)

    def fit(task: problem.Task, key: jax.Array) -> tuple[Variational, jax.Array]:
        separate = "head" if arm == "whole" else ()
        elbo = DataEmphasizedELBO(
            problem.nll, len(task.train[1]), kappa, separate, task.center, samples=config.samples
        )
        start = elbo.init(task.start, config.scale)
        q = trained(elbo.inner, tx, start, (), (task.train, key), config)
        return q, elbo.prior_variances(q)

    return jax.jit(fit)


def _alone(w: Any) -> Any:
    return jax.tree.map(lambda x: x[None], w)


def drawn(q: Variational, count: int, seed: int) -> Any:
    """Parameters drawn from a Gaussian, stacked."""
    keys = jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(q.mean)))
    keys = jax.tree.unflatten(jax.tree.structure(q.mean), list(keys))
    return jax.tree.map(
        lambda m, key: m[None] + q.scale * jax.random.normal(key, (count, *m.shape)), q.mean, keys
    )


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
