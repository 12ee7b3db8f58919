"""Runs `distill`: learned images, against real ones, class means and the whole set."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import budget, data, record
from experiments.distill import problem
from experiments.distill.config import Config

TABLE = ("images", "train_loss", "test_accuracy", "retrained_accuracy", "relative_stationarity")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All sets on one seed; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    for name in config.sets:
        train, test = _parts(name, seed)
        for per_class in config.per_class:
            _baselines(name, per_class, config, seed, train, test, records)
            _distill(name, per_class, config, seed, train, test, records)
        _whole_set(name, config, seed, train, test, records)


def _parts(name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole training part, and the test part, flattened."""
    if name == "digits":
        sets = data.digits(valid=0, seed=seed)
    else:
        sets = getattr(data, name)(valid=0, seed=seed)
    train, test = (
        {"x": jnp.asarray(rows.x.reshape(len(rows.y), -1)), "y": jnp.asarray(rows.y)}
        for rows in (sets.train, sets.test)
    )
    return train, test


@jax.jit
def _measure(params: Any, train: Any, test: Any) -> dict[str, jax.Array]:
    predicted = jnp.argmax(problem.logits(params, test["x"]), -1)
    return {
        "train_loss": problem.outer(params, None, train),
        "test_accuracy": jnp.mean(predicted == test["y"]),
    }


@functools.cache
def _retrain(config: Config) -> Any:
    """Trains a fresh model on given images as anybody would, by Adam from zero."""
    tx = optax.adam(config.retrain_lr)

    @jax.jit
    def train(images: Any, batch: Any, decay: Any) -> Any:
        loss = problem.operator(decay).loss

        def full(params: Any, images: Any, _: None) -> jax.Array:
            return loss(params, images, batch)  # the same batch in every step

        params = problem.zeros(images.shape[1])
        first = bilevel.InnerState(params, tx.init(params))
        return bilevel.descend(full, tx, first, images, None, steps=config.retrain_steps)[0].params

    return train


@functools.cache
def _step(config: Config) -> Any:
    """Back to the inner minimum, one hypergradient there, one step of the pixels."""
    op = problem.operator(config.decay)
    response = bilevel.Implicit(bilevel.CG(max_steps=config.products), op)
    tx = optax.adam(optax.cosine_decay_schedule(config.outer_lr, config.outer_steps))

    @jax.jit
    def step(carry: Any, batch: Any, real: Any) -> Any:
        images, params, warm, opt_state = carry
        params = problem.to_minimum(op, params, images, batch, config)
        solution = bilevel.hypergrad_solve(
            problem.outer,
            op.loss,
            response,
            params,
            images,
            inner_batch=batch,
            outer_batch=real,
            state=warm,
        )
        updates, opt_state = tx.update(solution.grads, opt_state)
        stats = {
            # The curvature is at least the decay: this bounds the distance to the minimum.
            "relative_stationarity": solution.stats["stationarity"]
            / config.decay
            / optax.tree.norm(params),
            "relative_residual": solution.stats["residual_norm"] / solution.stats["rhs_norm"],
            "result": solution.result,
        }
        # The images the parameters belong to, beside those of the next step.
        return (optax.apply_updates(images, updates), params, solution.state, opt_state), stats

    def start(images: Any) -> Any:
        params = problem.zeros(images.shape[1])
        warm = bilevel.hypergrad_init(problem.outer, op.loss, response, params, images)
        return images, params, warm, tx.init(images)

    return start, step, jax.jit(functools.partial(problem.to_minimum, op, config=config))


def step_cost(config: Config, outer: float) -> float:
    """G of the Newton steps and of the hypergradient; `outer` is that of its outer gradient."""
    newton = budget.Cost(config.newton_steps, config.newton_steps * config.products)
    return newton.plus(budget.implicit_hypergradient(config.products, outer)).total


def _distill(
    name: str,
    per_class: int,
    config: Config,
    seed: int,
    train: Any,
    test: Any,
    records: record.Records,
) -> None:
    method = f"{name}_learned_{per_class}"
    done = record.read(records.out, seed=seed, method=method)
    if done and done[-1].step == config.outer_steps:
        return
    records.rewind(method)
    start, step, to_minimum = _step(config)
    batch = {"y": jnp.asarray(problem.labels(per_class))}
    rng = np.random.default_rng(seed)
    pixels = train["x"].shape[1]
    first = rng.normal(0, config.noise, (len(batch["y"]), pixels)).astype(np.float32)
    carry = start(jnp.asarray(first))
    every = max(1, config.outer_steps // config.points)
    order, place = rng.permutation(len(train["y"])), 0
    size = min(config.outer_batch, len(order))
    cost = step_cost(config, budget.weight(size, len(batch["y"])))
    for k in range(1, config.outer_steps + 1):
        if place + size > len(order):
            order, place = rng.permutation(len(order)), 0
        chosen, place = order[place : place + size], place + size
        whole = size == len(order)
        real = train if whole else jax.tree.map(lambda x, rows=chosen: x[rows], train)
        carry, stats = step(carry, batch, real)
        if k % every and k not in (1, config.outer_steps):
            continue
        images = carry[0]
        at_minimum = to_minimum(carry[1], images, batch)
        fresh = _retrain(config)(images, batch, config.decay)
        measured = {key: float(v) for key, v in _measure(at_minimum, train, test).items()}
        retrained = float(_measure(fresh, train, test)["test_accuracy"])
        records.append(
            method,
            k,
            cost * k,
            images=len(batch["y"]),
            **measured,
            retrained_accuracy=retrained,
            **{key: float(v) for key, v in stats.items()},
        )
    side = int(pixels**0.5)
    record.save_arrays(
        records.out, f"{method}_{seed}", images=np.asarray(carry[0]).reshape(-1, side, side)
    )


def _real(train: Any, per_class: int, seed: int) -> np.ndarray:
    """Real images drawn by the seed, in the order of `labels`."""
    rng, y = np.random.default_rng(seed), np.asarray(train["y"])
    rows = [rng.choice(np.flatnonzero(y == c), per_class, False) for c in range(problem.CLASSES)]
    return np.asarray(train["x"])[np.stack(rows, axis=1).reshape(-1)]


def _means(train: Any) -> np.ndarray:
    x, y = np.asarray(train["x"]), np.asarray(train["y"])
    return np.stack([x[y == c].mean(0) for c in range(problem.CLASSES)])


def _baselines(
    name: str,
    per_class: int,
    config: Config,
    seed: int,
    train: Any,
    test: Any,
    records: record.Records,
) -> None:
    """The same training on real images, and on the mean of each class.

    They may take the best of several decays, by the loss on the whole training set.
    """
    batch = {"y": jnp.asarray(problem.labels(per_class))}
    inputs = {f"{name}_real_{per_class}": _real(train, per_class, seed)}
    if per_class == 1:
        inputs[f"{name}_means"] = _means(train)
    for method, images in inputs.items():
        records.rewind(method)
        tried = []
        for decay in config.baseline_decays:
            fresh = _retrain(config)(jnp.asarray(images), batch, decay)
            tried.append({key: float(v) for key, v in _measure(fresh, train, test).items()})
        best = max(tried, key=lambda measured: -measured["train_loss"])
        records.append(
            method,
            0,
            config.retrain_steps * len(config.baseline_decays),
            images=len(images),
            **best,
            retrained_accuracy=best["test_accuracy"],
        )


def _whole_set(
    name: str, config: Config, seed: int, train: Any, test: Any, records: record.Records
) -> None:
    """The same linear model on all real images: what no distilled set is expected to pass."""
    method, tx = f"{name}_whole_set", optax.adam(config.retrain_lr)
    records.rewind(method)
    params = problem.zeros(train["x"].shape[1])

    rng, size = np.random.default_rng(seed), min(config.outer_batch, len(train["y"]))
    rows = [rng.choice(len(train["y"]), size, False) for _ in range(config.outer_steps)]

    @jax.jit
    def fit(params: Any, train: Any, rows: jax.Array) -> Any:
        def loss(params: Any, train: Any, rows: jax.Array) -> jax.Array:
            return problem.outer(params, None, jax.tree.map(lambda x: x[rows], train))

        first = bilevel.InnerState(params, tx.init(params))
        return bilevel.descend(loss, tx, first, train, rows, steps=config.outer_steps)[0].params

    params = fit(params, train, jnp.asarray(np.stack(rows)))
    measured = {key: float(v) for key, v in _measure(params, train, test).items()}
    records.append(
        method,
        0,
        config.outer_steps,
        images=len(train["y"]),
        **measured,
        retrained_accuracy=measured["test_accuracy"],
    )
