"""Runs `attribution`: scores of training examples, held against retrained models."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.tools.datamodels import spearman
from experiments.attribution import problem
from experiments.attribution.config import Config, Setting
from experiments.common import record


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """Both parts of one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    for name in config.sets:
        _attribute(name, config, seed, records)
    for place, setting in enumerate(config.settings):
        _smoothness(place, setting, config, seed, records)
    _ordering(config, seed, records)


def trained(setting: Setting) -> bilevel.Unroll:
    """The training run of a setting, which its scores differentiate."""
    return bilevel.Unroll(optax.sgd(setting.rate, 0.9), setting.steps, remat="sqrt")


def scored(
    name: str, config: Config, setting: Setting, seed: int, subsets: int
) -> tuple[bilevel.DatamodelScore, bilevel.Influence, problem.Task]:
    """Whole-run scores of every query and example, and how well they predict retraining."""
    task = problem.task(name, config, setting, seed)
    each, how = problem.losses(setting.activation), trained(setting)
    query = problem.asked(setting.activation)

    def penalty(w):
        return 0.5 * config.decay * optax.tree.norm(w, squared=True)

    found = bilevel.influence(
        each, how, task.params, task.train, task.queries, query=query, penalty=penalty,
        batches=task.batches, per_query=True,
    )  # fmt: skip
    train = bilevel.retraining(
        each, how, task.params, task.train, penalty=penalty, batches=task.batches
    )
    score = bilevel.datamodel_score(
        found, train, query, task.queries, subsets=subsets, removed=config.removed,
        key=jax.random.key(seed + 100),
    )  # fmt: skip
    return score, found, task


def of_squared_errors(score: bilevel.DatamodelScore, value: jax.Array, target: jax.Array) -> float:
    """The score of the same scores for half the squared error of each query in place of its
    predicted ``value``: the derivative of the error is that of the value times the error."""
    error = np.asarray(value - target)
    predicted = error * score.predicted
    actual = 0.5 * (score.actual - np.asarray(target)) ** 2
    return float(np.mean([spearman(a, b) for a, b in zip(predicted.T, actual.T, strict=True)]))


def _attribute(name: str, config: Config, seed: int, records: record.Records) -> None:
    begun = time.perf_counter()
    score, found, task = scored(name, config, config.setting, seed, config.subsets)
    steps, target = config.setting.steps, task.queries[1]
    more = {}
    if jnp.issubdtype(target.dtype, jnp.floating):
        more["lds_of_squared_errors"] = of_squared_errors(score, found.value, target)
    records.append(
        name,
        0,
        float(steps * (1 + 3 * config.queries) + steps * config.subsets),
        lds=score.score,
        worst_query=float(score.per_query.min()),
        seconds=time.perf_counter() - begun,
        query_mean=float(found.value.mean()),
        predicted=score.predicted[:, 0],
        actual=score.actual[:, 0],
        **more,
    )


def _smoothness(
    place: int, setting: Setting, config: Config, seed: int, records: record.Records
) -> None:
    score, _, task = scored("digits", config, setting, seed, config.few)
    train = bilevel.retraining(
        problem.losses(setting.activation), trained(setting), task.params, task.train,
        batches=task.batches,
    )  # fmt: skip
    smooth = bilevel.metasmoothness(
        train, jnp.ones(config.train), step=config.step, key=jax.random.key(seed)
    )
    records.append(
        f"setting_{place}",
        0,
        float(setting.steps * (config.few + 3 * config.queries + 4)),
        lds=score.score,
        metasmoothness=float(smooth.score),
    )


def _ordering(config: Config, seed: int, records: record.Records) -> None:
    """The rank correlation, over settings, of smoothness and of what scores are worth there."""
    rows = record.read(records.out, seed=seed)
    last = {r.method: r.metrics for r in rows if r.method.startswith("setting_")}
    names = sorted(last)
    ranks = [[last[n][m] for n in names] for m in ("metasmoothness", "lds")]
    records.append("ordering", 0, 0.0, spearman=spearman(*ranks))
