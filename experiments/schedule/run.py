"""Runs `schedule`: a learning rate schedule by metagradients, beside a grid of cosines."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optuna.distributions import FloatDistribution

import bilevel
from experiments.common import baselines, budget, expected, record
from experiments.schedule import problem
from experiments.schedule.config import Config

TABLE = ("test_loss", "test_error", "runs")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """The grid, the learned schedule and the search of one seed; resumed, it is measured again."""
    records = record.Records(out, seed)
    records.rewind()
    images = problem.images(config, seed)
    judge = judged(config, images, jax.random.split(_key(seed, 0), config.fresh))
    for place, peak in enumerate(np.geomspace(config.low, config.high, config.points)):
        cost = float((place + 1) * config.steps)
        records.append("grid", place, cost, peak=float(peak), **judge(flat(config, peak)))
    learned, spent = tune(config, images, seed, records)
    records.append(
        "learned", 0, spent, runs=spent / config.steps, log_rates=learned, **judge(learned)
    )
    peak = search(config, images, seed)
    cost = float(config.trials * config.steps)
    records.append("tpe", 0, cost, peak=peak, **judge(flat(config, peak)))


def _key(seed: int, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 1_000_000 + stream)


def flat(config: Config, peak: Any) -> jax.Array:
    """Knots that leave the cosine as it is."""
    return jnp.full(config.knots, np.log(peak), jnp.float32)


def search(config: Config, images: problem.Images, seed: int) -> float:
    """The peak of a cosine by TPE: as many whole runs as the learned schedule may cost."""
    trial = judged(config, images, _key(seed, 1)[None])
    trials = baselines.search(
        lambda setting: trial(flat(config, setting["peak"]))["valid_loss"],
        {"peak": FloatDistribution(config.low, config.high, log=True)},
        budget=config.trials,
        cost=1,
        sampler="tpe",
        seed=seed,
        startup=config.startup,
    )
    return baselines.best(trials).hparams["peak"]


def judged(
    config: Config, images: problem.Images, keys: jax.Array
) -> Callable[[jax.Array], dict[str, float]]:
    """What a schedule gives in new runs, means over them: one run for each key."""

    def one(log_rates: jax.Array, train: Any, key: jax.Array) -> problem.Params:
        rows = jax.random.randint(
            jax.random.fold_in(key, 1), (config.steps, config.batch), 0, config.train
        )
        tx = problem.sgd(config, config.steps)({"log_rates": log_rates})
        w = problem.initial(config, train[0].shape[1], key)

        def step(carry: Any, rows: jax.Array) -> Any:
            w, state = carry
            grads = jax.grad(problem.loss)(w, None, (train[0][rows], train[1][rows]))
            updates, state = tx.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), rows)[0][0]

    @jax.jit
    def ends(log_rates: jax.Array, images: problem.Images) -> Any:
        def told(key: jax.Array) -> Any:
            w = one(log_rates, images.train, key)
            wrong = problem.logits(w, images.test[0]).argmax(-1) != images.test[1]
            losses = [problem.loss(w, None, part) for part in (images.valid, images.test)]
            return jnp.stack([*losses, wrong.mean()])

        return jax.lax.map(told, keys).mean(0)

    def judge(log_rates: jax.Array) -> dict[str, float]:
        means = map(float, ends(log_rates, images))
        return dict(zip(("valid_loss", "test_loss", "test_error"), means, strict=True))

    return judge


def batch_of(config: Config, images: problem.Images, key: tuple[int, ...], step: int) -> Any:
    """The images that a step reads."""
    rows = np.random.default_rng((*key, step)).integers(0, config.train, config.batch)
    return images.train[0][rows], images.train[1][rows]


def tune(
    config: Config, images: problem.Images, seed: int, records: record.Records
) -> tuple[jax.Array, float]:
    """The learned knots, and what they cost in gradients on a batch."""
    hparams = {"log_rates": jnp.full(config.knots, np.log(config.start), jnp.float32)}
    tx = optax.adam(optax.linear_schedule(config.move, 0.0, config.updates), b1=0.5, b2=0.9)
    state, inner_tx, spent = tx.init(hparams), problem.sgd(config, config.short), 0.0
    outer = budget.weight(config.valid, config.batch)
    paid = budget.hypergradient(bilevel.Unroll(inner_tx, config.short), hparams, outer=outer)
    for update in range(config.updates):
        found = bilevel.metagradient(
            problem.loss,
            problem.loss,
            inner_tx,
            problem.initial(
                config,
                images.train[0].shape[1],
                jax.random.fold_in(jax.random.key(seed), update),
            ),
            hparams,
            functools.partial(batch_of, config, images, (seed, update)),
            steps=config.short,
            outer_batch=images.valid,
            progress=False,
        )
        spent += paid.total
        records.append(
            "tuning", update, spent, value=float(found.value),
            log_rates=hparams["log_rates"], grads=found.grads["log_rates"],
        )  # fmt: skip
        updates, state = tx.update(found.grads, state)
        hparams = jax.tree.map(jnp.add, hparams, updates)
    return hparams["log_rates"], spent


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Test loss over the best of the grid, by the test loss and by the validation loss."""
    best: dict[int, float] = {}
    chosen: dict[int, float] = {}
    mine = {
        s: r.metrics["test_loss"] for (m, s), r in record.final(records).items() if m == "learned"
    }
    for seed in mine:
        grid = [r.metrics for r in records if r.seed == seed and r.method == "grid"]
        best[seed] = min(row["test_loss"] for row in grid)
        chosen[seed] = min(grid, key=lambda row: row["valid_loss"])["test_loss"]
    told = {}
    for name, theirs in (("best", best), ("chosen", chosen)):
        told[f"{name}_cosine"] = {"test_loss": expected.interval(theirs)}
        ratios = {seed: mine[seed] / theirs[seed] for seed in mine}
        told[f"over_{name}"] = {"test_loss": expected.interval(ratios)}
    return told
