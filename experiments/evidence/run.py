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
# An evidence gradient, in gradients: ten rows of the Jacobian per example; with transformations
# one, and about three times as much to differentiate it.
FULL_COST, SINGLE_COST = 10.0, 4.0


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All parts of one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    for name in config.decays:
        _decays(name, config, seed, records)
    for name in config.ranges:
        _ranges(name, config, seed, records)


def losses(count: int, draws: int, **cuts: Any) -> LaplaceEvidence:
    """The evidence of the network; its `inner` is the training loss of every method."""
    return LaplaceEvidence(
        problem.model(draws), problem.likelihood, count, frozen_curvature=True, **cuts
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
    _finish(f"{name}_none", w, start, 0.0, task, config, seed, records)
    for arm in ("evidence", "holdout", "cross_validation", "oracle"):
        hparams, cost, fitted = tuned(arm, w, start, task, config, seed)
        _finish(f"{name}_{arm}", fitted, hparams, cost, task, config, seed, records)
        if arm == "evidence":
            _bounds(name, fitted, hparams, task, config, seed, records)


def tuned(
    arm: str, w: Any, start: Any, task: problem.Task, config: Config, seed: int
) -> tuple[Any, float, Any]:
    """Decays by one way to choose them, at the same cost; what was paid, and the parameters."""
    state = _tuned(arm, config, w, start, task)
    # Of cross-validation the first fold's.
    one = arm != "cross_validation"
    fitted = state.params if one else jax.tree.map(lambda x: x[0], state.params)
    return state.hparams, _steps(arm, config) * _price(arm, config), fitted


def _steps(arm: str, config: Config) -> int:
    """Outer steps that the budget of an arm pays for."""
    budget = config.reference if arm == "oracle" else config.budget
    return int(budget / _price(arm, config))


def _price(arm: str, config: Config) -> float:
    """Of one outer step, in gradients of N examples."""
    products = 2.5 * (config.terms + 1)
    if arm == "evidence":
        return config.inner_steps + 2.5 + FULL_COST
    steps = config.inner_steps + products
    if arm == "cross_validation":
        return (config.folds - 1) * steps + 1
    if arm == "holdout":
        return steps * (1 - 1 / config.folds) + 1 / config.folds
    return steps + config.more / config.examples


def _trained(inner: Any, tx: Any, w: Any, hparams: Any, sample: Any, keys: jax.Array) -> Any:
    """Parameters after as many steps as there are keys."""

    def body(state: Any, key: jax.Array) -> Any:
        rows = jax.tree.map(lambda x: x[None], sample(key))
        return bilevel.descend(inner, tx, state, hparams, rows, steps=1)[0], None

    return jax.lax.scan(body, bilevel.InnerState(w, tx.init(w)), keys)[0].params


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tuned(arm: str, config: Config, w: Any, start: Any, task: problem.Task) -> Any:
    n, steps = config.examples, config.inner_steps
    evidence, valid = losses(n, 1), mean_nll(1)
    inner, first, held = evidence.inner, w, n // config.folds
    # The reference validates on many further examples.
    outer, train, checked = valid, task.train, task.more
    response = bilevel.Implicit(bilevel.Neumann(config.terms), certify=False)
    if arm == "evidence":
        outer, checked = evidence.outer, task.train
        response = bilevel.Implicit(bilevel.Identity(1e-3), certify=False)
    elif arm == "cross_validation":
        cv = CrossValidation(k_folds(n, config.folds), valid, inner)
        outer, inner, first = cv.outer, cv.inner, cv.init(w)
        train, checked = cv.inner_batch(task.train), cv.outer_batch(task.train)
    elif arm == "holdout":
        train = jax.tree.map(lambda x: x[held:], task.train)
        checked = jax.tree.map(lambda x: x[:held], task.train)

    keys = jax.random.split(jax.random.key(0), config.burn_in)
    first = _trained(inner, optax.adam(config.rate), first, start, lambda _: train, keys)

    def sample(_: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), train), checked

    alg = bilevel.alternate(
        outer, inner, response, optax.adam(config.rate), optax.adam(config.rate_hparams), steps
    )
    state = alg.init(first, start)
    return bilevel.scan_run(alg, state, sample, _steps(arm, config), key=keys[0]).state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finished(
    config: Config, batch: int | None, w: Any, hparams: Any, train: Any, key: jax.Array
) -> Any:
    """Parameters trained on with the chosen hyperparameters, on all examples.

    Not anew: precisions of layers drift along the scale symmetry of a network, which the
    parameters beside them follow and a fresh start does not find.
    """
    draws, n = config.draws if "rotation" in hparams else 1, len(train[1])

    def sample(key: jax.Array) -> Any:
        rows = train if batch is None else _drawn(train, key, batch)
        return (*rows, key) if "rotation" in hparams else rows

    tx = optax.adam(optax.cosine_decay_schedule(config.rate, config.finish))
    keys = jax.random.split(key, config.finish)
    return _trained(losses(n, draws).inner, tx, w, hparams, sample, keys)


def _drawn(rows: Any, key: jax.Array, count: int) -> Any:
    chosen = jax.random.permutation(key, len(rows[1]))[:count]
    return jax.tree.map(lambda x: x[chosen], rows)


def _finish(
    method: str,
    w: Any,
    hparams: Any,
    cost: float,
    task: problem.Task,
    config: Config,
    seed: int,
    records: record.Records,
    batch: int | None = None,
) -> None:
    w = _finished(config, batch, w, hparams, task.train, jax.random.key(seed + 3))
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
    return losses(config.examples, 1, **settings[cut]).outer(w, hparams, batch)


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
    task = problem.task(name, config, seed, augmented=True)
    w = problem.initial(jax.random.key(seed), task.train[0][0].size, config)
    batch = config.augmented_batch
    for arm, transforms in (("ranges", True), ("no_ranges", False)):
        start, path = problem.first_hparams(w, transforms), f"{name}_{arm}_path"
        state, cost = learned(w, start, task, config, seed, records, path)
        method, fitted = f"{name}_{arm}", state.params
        _finish(method, fitted, state.hparams, cost, task, config, seed, records, batch)


@functools.partial(jax.jit, static_argnums=0)
def _learned(config: Config, w: Any, start: Any, train: Any, key: jax.Array) -> bilevel.WholeRun:
    draws, n = config.draws if "rotation" in start else 1, len(train[1])
    evidence = losses(n, draws, outputs="single")
    k, b = config.augmented_inner, config.augmented_batch

    def taken(key: jax.Array) -> Any:
        rows = _drawn(train, key, b)
        return (*rows, key) if "rotation" in start else rows

    def sample(key: jax.Array) -> Any:
        keys = jax.random.split(key, k + 1)
        return jax.vmap(taken)(keys[1:]), (taken(keys[0]), key)

    tx = optax.adam(config.rate)
    keys = jax.random.split(jax.random.fold_in(key, 1), 20 * k)
    w = _trained(evidence.inner, tx, w, start, taken, keys)
    response = bilevel.Implicit(bilevel.Identity(1e-3), certify=False)
    alg = bilevel.alternate(
        evidence.outer, evidence.inner, response, tx, optax.adam(config.rate_ranges), k
    )
    return bilevel.scan_run(alg, alg.init(w, start), sample, config.augmented_steps, key=key)


def learned(
    w: Any, start: Any, task: problem.Task, config: Config, seed: int,
    records: record.Records, path: str,
) -> tuple[Any, float]:  # fmt: skip
    """Decays, and ranges if ``start`` has them, by the stochastic evidence; the last state."""
    found = _learned(config, w, start, task.train, jax.random.key(seed + 1))
    steps, share = config.augmented_steps, config.augmented_batch / len(task.train[1])
    price = (config.augmented_inner + 2.5 + SINGLE_COST) * share
    side = task.train[0].shape[1]
    for i in range(0, steps, max(1, steps // 25)):
        now = jax.tree.map(lambda x, i=i: x[i], found.infos.hparams)
        told = {"value": float(found.infos.value[i])}
        if "rotation" in start:
            angle, move = problem.ranges(now, side)
            told |= {"rotation": float(np.degrees(angle)), "shift": float(move)}
        records.append(path, i, i * price, **told)
    return found.state, steps * price


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
