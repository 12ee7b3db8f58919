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
    state = _tuned(arm, config, w, start, task, jax.random.key(seed + 1))
    return state.hparams, _steps(arm, config) * _price(arm, config), state.params


def _steps(arm: str, config: Config) -> int:
    """Outer steps that the budget of an arm pays for."""
    budget = config.reference if arm == "oracle" else config.budget
    return int(budget / _price(arm, config))


def _price(arm: str, config: Config) -> float:
    """Of one outer step, in gradients of N examples."""
    products = 2.5 * (config.terms + 1)
    if arm == "evidence":
        rows = EVIDENCE_COST * config.outer_batch / config.examples
        return config.inner_steps + 2.5 + rows
    steps = config.inner_steps + products
    if arm == "cross_validation":
        return (config.folds - 1) * steps + 1
    if arm == "holdout":
        return steps * (1 - 1 / config.folds) + 1 / config.folds
    return steps + config.more / config.examples


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tuned(arm: str, config: Config, w: Any, start: Any, task: problem.Task, key: jax.Array) -> Any:
    evidence, valid, n = losses(config, 1, outputs="single"), mean_nll(1), config.examples
    steps, inner, first = config.inner_steps, evidence.inner, w
    held = n // config.folds
    # The reference validates on many further examples.
    outer, train, checked = valid, task.train, task.more
    response = bilevel.Implicit(bilevel.Neumann(config.terms), certify=False)
    if arm == "evidence":
        outer, response = evidence.outer, bilevel.Implicit(bilevel.Identity(1e-3), certify=False)
    elif arm == "cross_validation":
        cv = CrossValidation(k_folds(n, config.folds), valid, inner)
        outer, inner, first = cv.outer, cv.inner, cv.init(w)
        train, checked = cv.inner_batch(task.train), cv.outer_batch(task.train)
    elif arm == "holdout":
        train = jax.tree.map(lambda x: x[held:], task.train)
        checked = jax.tree.map(lambda x: x[:held], task.train)

    def sample(key: jax.Array) -> Any:
        stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), train)
        if arm != "evidence":
            return stack, checked
        rows = jax.random.permutation(key, n)[: config.outer_batch]
        return stack, (jax.tree.map(lambda x: x[rows], task.train), key)

    alg = bilevel.alternate(
        outer, inner, response, optax.adam(config.rate), optax.adam(config.rate_hparams), steps
    )
    start = alg.init(first, start)
    return bilevel.scan_run(alg, start, sample, _steps(arm, config), key=key).state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _retrained(
    config: Config, batch: int | None, w: Any, hparams: Any, train: Any, key: jax.Array
) -> Any:
    """Parameters of a fresh run on all examples with the chosen hyperparameters."""
    draws = config.draws if "rotation" in hparams else 1
    inner, n = losses(config, draws).inner, config.examples
    tx = optax.adam(optax.cosine_decay_schedule(config.rate, config.retrain))

    def body(state: Any, key: jax.Array) -> Any:
        rows = train
        if batch is not None:
            chosen = jax.random.permutation(key, n)[:batch]
            rows = jax.tree.map(lambda x: x[chosen], rows)
        if "rotation" in hparams:
            rows = (*rows, key)
        rows = jax.tree.map(lambda x: x[None], rows)
        return bilevel.descend(inner, tx, state, hparams, rows, steps=1)[0], None

    keys = jax.random.split(key, config.retrain)
    return jax.lax.scan(body, bilevel.InnerState(w, tx.init(w)), keys)[0].params


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
    w = problem.initial(jax.random.key(seed + 2), task.train[0][0].size, config)
    w = _retrained(config, batch, w, hparams, task.train, jax.random.key(seed + 3))
    told: dict[str, Any] = {
        "log_precision": [float(x) for x in jax.tree.leaves(hparams["log_precision"])]
    }
    if "rotation" in hparams:
        angle, move = problem.ranges(hparams, task.train[0].shape[1])
        told |= {"rotation": float(np.degrees(angle)), "shift": float(move)}
    records.append(method, 0, cost, **judged(w, hparams, task.test, config), **told)


def judged(w: Any, hparams: Any, test: Any, config: Config) -> dict[str, float]:
    """Loss and error on test examples, in parts."""
    told, size = [], 500
    for i in range(0, len(test[1]), size):
        rows = jax.tree.map(lambda x, i=i: x[i : i + size], test)
        rows = (*rows, jax.random.key(i)) if "rotation" in hparams else rows
        told.append(_judged(config, w, hparams, rows))
    columns = zip(*told, strict=True)
    loss, wrong = (np.concatenate([np.asarray(x) for x in column]) for column in columns)
    return {"test_loss": float(loss.mean()), "test_error": float(wrong.mean())}


@functools.partial(jax.jit, static_argnums=0)
def _judged(config: Config, w: Any, hparams: Any, rows: Any) -> Any:
    f = problem.model(config.draws_judged)(w, hparams, rows)
    return problem.likelihood(f, hparams, rows), jnp.argmax(f, 1) != rows[1]


def _labels(batch: Any) -> jax.Array:
    return batch[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bound(cut: str, config: Config, w: Any, hparams: Any, batch: Any) -> jax.Array:
    """The negative log evidence per example with a kernel that is cut."""
    block = config.bounds // 5
    settings: dict[str, Any] = {
        "full": {},
        "groups": {"groups": _labels},
        "block": {"block": block},
        "independent": {"outputs": "independent"},
        "independent_groups": {"outputs": "independent", "groups": _labels},
        "independent_block": {"outputs": "independent", "block": block},
        "diagonal": {"outputs": "independent", "block": 1},
        "single": {"outputs": "single"},
    }
    return losses(config, 1, **settings[cut]).outer(w, hparams, batch)


def _bounds(
    name: str, w: Any, hparams: Any, task: problem.Task, config: Config, seed: int,
    records: record.Records,
) -> None:  # fmt: skip
    """The negative log evidence per example of a trained network, in float64, cut more and more."""
    rows = jax.tree.map(lambda x: x[: config.bounds], task.train)
    with jax.enable_x64(True):
        w, hparams, rows = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x,
            (w, hparams, rows),
        )
        names = ("full", "groups", "block", "independent", "independent_groups",
                 "independent_block", "diagonal")  # fmt: skip
        values = {cut: float(_bound(cut, config, w, hparams, rows)) for cut in names}
        keys = jax.random.split(jax.random.key(seed), 40)
        drawn = [float(_bound("single", config, w, hparams, (rows, k))) for k in keys]
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


@functools.partial(jax.jit, static_argnums=0)
def _learned(config: Config, w: Any, start: Any, train: Any, key: jax.Array) -> bilevel.WholeRun:
    draws = config.draws if "rotation" in start else 1
    evidence = losses(config, draws, outputs="single")
    k, b, n = config.inner_steps, config.augmented_batch, config.examples

    def taken(key: jax.Array, size: int) -> Any:
        rows = jax.random.permutation(key, n)[:size]
        rows = jax.tree.map(lambda x: x[rows], train)
        return (*rows, key) if "rotation" in start else rows

    def sample(key: jax.Array) -> Any:
        keys = jax.random.split(key, k + 1)
        outer = taken(keys[0], b), key
        return jax.vmap(lambda key: taken(key, b))(keys[1:]), outer

    alg = bilevel.alternate(
        evidence.outer, evidence.inner, bilevel.Implicit(bilevel.Identity(1e-3), certify=False),
        optax.adam(config.rate), optax.adam(config.rate_hparams), k,
    )  # fmt: skip
    return bilevel.scan_run(alg, alg.init(w, start), sample, config.augmented_steps, key=key)


def learned(
    w: Any, start: Any, task: problem.Task, config: Config, seed: int,
    records: record.Records, path: str,
) -> tuple[Any, float]:  # fmt: skip
    """Decays, and ranges if ``start`` has them, by the stochastic evidence."""
    found = _learned(config, w, start, task.train, jax.random.key(seed + 1))
    k, b, n = config.inner_steps, config.augmented_batch, config.examples
    steps = config.augmented_steps
    price = (k + 2.5 + EVIDENCE_COST) * b / n
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
