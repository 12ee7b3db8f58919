"""Runs `evidence`: decays and augmentations from the training data alone."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.objectives import CrossValidation, LaplaceEvidence, k_folds
from experiments.common import expected, record
from experiments.evidence import problem
from experiments.evidence.config import Config

TABLE = ("test_loss", "test_error", "rotation", "shift")
# A stochastic evidence gradient: rows of the Jacobian, and about three times as much to
# differentiate them.
EVIDENCE_COST = 4.0


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All parts of one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    for name in config.decays:
        _decays(name, config, seed, records)
    for name in config.ranges:
        _ranges(name, config, seed, records)


def losses(config: Config, draws: int, frozen: bool = True, **cuts: Any) -> LaplaceEvidence:
    """The evidence of the network; its `inner` is the training loss of every method."""
    return LaplaceEvidence(
        problem.model(draws), problem.likelihood, config.examples, frozen_curvature=frozen, **cuts
    )


def mean_nll(draws: int) -> Any:
    """The validation loss."""
    model = problem.model(draws)

    def loss(w: Any, hparams: Any, batch: Any) -> jax.Array:
        return jnp.mean(problem.likelihood(model(w, hparams, batch), hparams, batch))

    return loss


def _decays(name: str, config: Config, seed: int, records: record.Records) -> None:
    task = problem.task(name, config, seed)
    w = problem.initial(jax.random.key(seed), task.train[0][0].size, config)
    start = problem.first_hparams(w, transforms=False)
    _finish(f"{name}_none", start, 0.0, task, config, seed, records)
    for arm in ("evidence", "holdout", "cross_validation", "oracle"):
        hparams, cost, fitted = tuned(arm, w, start, task, config, seed)
        _finish(f"{name}_{arm}", hparams, cost, task, config, seed, records)
        if arm == "evidence":
            _bounds(name, fitted, hparams, task, config, seed, records)


def tuned(
    arm: str, w: Any, start: Any, task: problem.Task, config: Config, seed: int
) -> tuple[Any, float, Any]:
    """Decays by one way to choose them, at the same cost; what was paid, and the parameters."""
    evidence, valid, n = losses(config, 1, outputs="single"), mean_nll(1), config.examples
    steps, inner, first = config.inner_steps, evidence.inner, w
    held = task.train[1].size // config.folds
    series = bilevel.Implicit(bilevel.Neumann(config.terms), certify=False)
    products = 2.5 * (config.terms + 1)
    if arm == "evidence":
        outer, response = evidence.outer, bilevel.Implicit(bilevel.Identity(1e-3), certify=False)
        train, price = task.train, steps + 2.5 + EVIDENCE_COST * config.outer_batch / n
    elif arm == "cross_validation":
        cv = CrossValidation(k_folds(n, config.folds, seed=seed), valid, inner)
        outer, inner, response, first = cv.outer, cv.inner, series, cv.init(w)
        train, checked = cv.inner_batch(task.train), cv.outer_batch(task.train)
        price = (config.folds - 1) * (steps + products) + 1
    elif arm == "holdout":
        train, checked = (
            jax.tree.map(lambda x: x[held:], task.train),
            jax.tree.map(lambda x: x[:held], task.train),
        )
        outer, response = valid, series
        price = (steps + products) * (1 - 1 / config.folds) + 1 / config.folds
    else:  # the reference: many further examples to validate on
        outer, response, train, checked = valid, series, task.train, task.more
        price = steps + products + len(task.more[1]) / n

    def sample(key: jax.Array) -> Any:
        stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), train)
        if arm != "evidence":
            return stack, checked
        rows = jax.random.permutation(key, n)[: config.outer_batch]
        return stack, (jax.tree.map(lambda x: x[rows], task.train), key)

    count = int(config.budget / price)
    alg = bilevel.alternate(
        outer, inner, response, optax.adam(config.rate), optax.adam(config.rate_hparams), steps
    )
    go = jax.jit(lambda state, key: bilevel.scan_run(alg, state, sample, count, key=key).state)
    state = go(alg.init(first, start), jax.random.key(seed + 1))
    return state.hparams, count * price, state.params


def retrained(
    hparams: Any, task: problem.Task, config: Config, seed: int, batch: int | None = None
) -> Any:
    """Parameters of a fresh run on all examples with the chosen hyperparameters."""
    draws = config.draws if "rotation" in hparams else 1
    inner, n = losses(config, draws).inner, config.examples
    w = problem.initial(jax.random.key(seed + 2), task.train[0][0].size, config)
    tx = optax.adam(optax.cosine_decay_schedule(config.rate, config.retrain))

    @jax.jit
    def train(w: Any, hparams: Any) -> Any:
        def body(state: Any, key: jax.Array) -> Any:
            rows = task.train
            if batch is not None:
                chosen = jax.random.permutation(key, n)[:batch]
                rows = jax.tree.map(lambda x: x[chosen], rows)
            if "rotation" in hparams:
                rows = (*rows, key)
            rows = jax.tree.map(lambda x: x[None], rows)
            return bilevel.descend(inner, tx, state, hparams, rows, steps=1)[0], None

        keys = jax.random.split(jax.random.key(seed + 3), config.retrain)
        return jax.lax.scan(body, bilevel.InnerState(w, tx.init(w)), keys)[0].params

    return train(w, hparams)


def _finish(
    method: str,
    hparams: Any,
    cost: float,
    task: problem.Task,
    config: Config,
    seed: int,
    records: record.Records,
    batch: int | None = None,
) -> None:
    w = retrained(hparams, task, config, seed, batch)
    told: dict[str, Any] = {
        "log_precision": [float(x) for x in jax.tree.leaves(hparams["log_precision"])]
    }
    if "rotation" in hparams:
        angle, move = problem.ranges(hparams, task.train[0].shape[1])
        told |= {"rotation": float(np.degrees(angle)), "shift": float(move)}
    records.append(method, 0, cost, **judged(w, hparams, task.test, config), **told)


def judged(w: Any, hparams: Any, test: Any, config: Config) -> dict[str, float]:
    """Loss and error on test examples, in parts."""
    model = problem.model(config.draws_judged)

    @jax.jit
    def part(rows: Any) -> Any:
        f = model(w, hparams, rows)
        return problem.likelihood(f, hparams, rows), jnp.argmax(f, 1) != rows[1]

    told, size = [], 500
    for i in range(0, len(test[1]), size):
        rows = jax.tree.map(lambda x, i=i: x[i : i + size], test)
        told.append(part((*rows, jax.random.key(i)) if "rotation" in hparams else rows))
    columns = zip(*told, strict=True)
    loss, wrong = (np.concatenate([np.asarray(x) for x in column]) for column in columns)
    return {"test_loss": float(loss.mean()), "test_error": float(wrong.mean())}


def _bounds(
    name: str, w: Any, hparams: Any, task: problem.Task, config: Config, seed: int,
    records: record.Records,
) -> None:  # fmt: skip
    """The negative log evidence per example of a trained network, in float64, cut more and more."""
    rows = jax.tree.map(lambda x: x[: config.bounds], task.train)
    block = config.bounds // 5
    cuts = {
        "full": {},
        "groups": {"groups": lambda batch: batch[1]},
        "block": {"block": block},
        "independent": {"outputs": "independent"},
        "independent_groups": {"outputs": "independent", "groups": lambda batch: batch[1]},
        "independent_block": {"outputs": "independent", "block": block},
        "diagonal": {"outputs": "independent", "block": 1},
    }
    with jax.enable_x64(True):
        w, hparams, rows = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x,
            (w, hparams, rows),
        )
        values = {
            key: float(jax.jit(losses(config, 1, **cut).outer)(w, hparams, rows))
            for key, cut in cuts.items()
        }
        single = jax.jit(losses(config, 1, outputs="single").outer)
        drawn = [
            float(single(w, hparams, (rows, k))) for k in jax.random.split(jax.random.key(seed), 40)
        ]
    gaps = {
        "full_to_groups": values["groups"] - values["full"],
        "full_to_block": values["block"] - values["full"],
        "full_to_independent": values["independent"] - values["full"],
        "groups_to_independent": values["independent_groups"] - values["groups"],
        "independent_to_groups": values["independent_groups"] - values["independent"],
        "independent_to_block": values["independent_block"] - values["independent"],
        "block_to_diagonal": values["diagonal"] - values["independent_block"],
        "groups_to_diagonal": values["diagonal"] - values["independent_groups"],
    }
    records.append(
        f"{name}_bounds", 0, 0.0, **values, single=float(np.mean(drawn)),
        single_error=float(np.std(drawn) / np.sqrt(len(drawn))), least_gap=min(gaps.values()),
    )  # fmt: skip


def _ranges(name: str, config: Config, seed: int, records: record.Records) -> None:
    task = problem.task(name, config, seed)
    w = problem.initial(jax.random.key(seed), task.train[0][0].size, config)
    arms = (("ranges", True), ("no_ranges", False))
    for arm, transforms in arms:
        start = problem.first_hparams(w, transforms)
        hparams, cost = learned(w, start, task, config, seed, records, f"{name}_{arm}_path")
        batch = config.augmented_batch
        _finish(f"{name}_{arm}", hparams, cost, task, config, seed, records, batch)


def learned(
    w: Any, start: Any, task: problem.Task, config: Config, seed: int,
    records: record.Records, path: str,
) -> tuple[Any, float]:  # fmt: skip
    """Decays, and ranges if ``start`` has them, by the stochastic evidence."""
    draws = config.draws if "rotation" in start else 1
    evidence = losses(config, draws, outputs="single")
    k, b, n = config.inner_steps, config.augmented_batch, config.examples

    def taken(key: jax.Array, size: int) -> Any:
        rows = jax.random.permutation(key, n)[:size]
        rows = jax.tree.map(lambda x: x[rows], task.train)
        return (*rows, key) if "rotation" in start else rows

    def sample(key: jax.Array) -> Any:
        keys = jax.random.split(key, k + 1)
        return jax.vmap(lambda key: taken(key, b))(keys[1:]), (
            taken(keys[0], config.outer_batch),
            key,
        )

    alg = bilevel.alternate(
        evidence.outer, evidence.inner, bilevel.Implicit(bilevel.Identity(1e-3), certify=False),
        optax.adam(config.rate), optax.adam(config.rate_hparams), k,
    )  # fmt: skip
    steps = config.augmented_steps
    go = jax.jit(lambda state, key: bilevel.scan_run(alg, state, sample, steps, key=key))
    found = go(alg.init(w, start), jax.random.key(seed + 1))
    price = (k + 2.5) * b / n + EVIDENCE_COST * config.outer_batch / n
    side = task.train[0].shape[1]
    for i in range(0, steps, max(1, steps // 25)):
        now = jax.tree.map(lambda x, i=i: x[i], found.infos.hparams)
        told = {"value": float(found.infos.value[i])}
        if "rotation" in start:
            angle, move = problem.ranges(now, side)
            told |= {"rotation": float(np.degrees(angle)), "shift": float(move)}
        records.append(path, i, i * price, **told)
    return found.state.hparams, steps * price


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Ratios of test losses, seed by seed, and the learned ranges side by side."""
    compare = functools.partial(expected.paired, records, "test_loss")
    told: dict[str, Any] = {}
    methods = {r.method for r in records}
    for method in sorted(methods):
        if method.endswith("_evidence"):
            name = method.removesuffix("_evidence")
            for other in ("none", "holdout", "cross_validation", "oracle"):
                told[f"{method}_over_{other}"] = {
                    "test_loss": compare(method, f"{name}_{other}", ratio=True)
                }
        if method.endswith("_no_ranges"):
            name = method.removesuffix("_no_ranges")
            told[f"{name}_ranges_over_none"] = {
                "test_loss": compare(f"{name}_ranges", method, ratio=True)
            }
    return told
