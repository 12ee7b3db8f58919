"""Runs `overfit`: one decay per weight, per layer or in all, driven to fit 50 validation images."""

import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import budget, data, record
from experiments.overfit import problem
from experiments.overfit.config import Config

TABLE = (
    "hyperparameters",
    "train_accuracy",
    "validation_accuracy",
    "test_accuracy",
    "validation_loss",
    "time_ratio",
    "memory_ratio",
)


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All networks on one seed; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    for name in config.sets:
        batches = _batches(name, config, seed)
        for index, model in enumerate(config.models):
            for granularity in problem.GRANULARITY:
                _tune(name, index, granularity, config, seed, batches, records)
            if name == config.sets[0]:
                _cost(model, config, seed, batches, records)


def _batches(name: str, config: Config, seed: int) -> dict[str, Any]:
    if name == "digits":
        sets = data.digits(valid=config.valid, test=config.test, seed=seed)
    else:
        sets = getattr(data, name)(seed=seed)
    sizes = {"train": config.train, "validation": config.valid, "test": config.test}
    batches = {}
    for (part, size), rows in zip(sizes.items(), sets, strict=True):
        chosen = np.random.default_rng(seed).permutation(len(rows.y))[:size]
        x = rows.x[chosen]
        if x.shape[1] < 28:  # digits of 8 x 8 pixels: each becomes a square of three
            x = np.pad(np.kron(x, np.ones((1, 3, 3), np.float32)), ((0, 0), (2, 2), (2, 2)))
        batches[part] = {"x": jnp.asarray(x), "y": jnp.asarray(rows.y[chosen])}
    return batches


def _adam(config: Config, steps: int) -> optax.GradientTransformation:
    """The optimizer of the network; its step size falls to zero with that of the decays."""
    schedule = optax.cosine_decay_schedule(config.inner_lr, steps * config.inner_steps)
    return optax.adam(schedule)


@functools.cache
def _algorithm(config: Config, steps: int) -> tuple[Any, Any, Any]:
    """The outer loop, its jitted step and the jitted measurement."""
    operator = problem.operator(config.damping)
    algorithm = bilevel.alternate(
        problem.outer,
        operator.loss,
        bilevel.Implicit(bilevel.CG(max_steps=config.products), operator),
        inner_tx=_adam(config, steps),
        outer_tx=optax.adam(optax.cosine_decay_schedule(config.outer_lr, steps)),
        inner_steps=config.inner_steps,
    )

    def step(state: Any, **batches: Any) -> tuple[Any, jax.Array]:
        # Statistics that nobody reads are not computed: the compiler removes them.
        state, info = algorithm.step(state, **batches)
        return state, info.result

    return algorithm, jax.jit(step, donate_argnums=0), jax.jit(problem.metrics)


def step_cost(config: Config) -> float:
    """G of one outer step: the training steps and the hypergradient, CG from a warm start."""
    outer = budget.weight(config.valid, config.train)
    hypergradient = budget.implicit_hypergradient(config.products, outer)
    return budget.training(config.inner_steps).plus(hypergradient).total


def _start(model: str, granularity: str, config: Config, seed: int) -> tuple[Any, Any]:
    params = problem.initial(model, config.width[model == "cnn"], seed)
    return params, problem.decays(params, config.start, granularity)


def _stack(batch: Any, copies: int) -> Any:
    """Full-batch training: the same batch for every step."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), batch)


def _tune(
    name: str,
    index: int,
    granularity: str,
    config: Config,
    seed: int,
    batches: Any,
    records: record.Records,
) -> None:
    """One network, trained once, and its decays moved by hypergradients while it trains."""
    model, steps = config.models[index], config.outer_steps[index]
    method = f"{name}_{model}_{granularity}"
    done = record.read(records.out, seed=seed, method=method)
    if done and done[-1].step == steps:
        return
    records.rewind(method)
    algorithm, step, measure = _algorithm(config, steps)
    params, hparams = _start(model, granularity, config, seed)
    state = algorithm.init(params, hparams)
    stack = _stack(batches["train"], config.inner_steps)
    cost = step_cost(config)
    count = sum(x.size for x in jax.tree.leaves(hparams))
    best = np.inf
    every = max(1, steps // config.points)
    for k in range(1, steps + 1):
        state, result = step(state, inner_batches=stack, outer_batch=batches["validation"])
        if k % every and k not in (1, steps):
            continue
        measured = {key: v.item() for key, v in measure(state.params, batches).items()}
        for part, batch in batches.items():
            # Divided here: in float32, 49 of 50 is less than 0.98.
            measured[f"{part}_accuracy"] = measured.pop(f"{part}_right") / len(batch["y"])
        best = min(best, measured["validation_loss"])
        records.append(
            method,
            k,
            cost * k,
            **measured,
            best_validation_loss=best,
            hyperparameters=count,
            result=int(result),
        )


def _cost(model: str, config: Config, seed: int, batches: Any, records: record.Records) -> None:
    """Seconds and bytes of a tuning step over those of as many steps of ordinary training.

    Ordinary training has one fixed decay. Bytes are what XLA reserves: arguments, results that
    do not replace them, and temporaries. Times are paired, so that both programs meet the same
    load of the machine, and their ratio is the median over the pairs.
    """
    method = f"cost_{model}"
    if record.read(records.out, seed=seed, method=method):
        return
    steps = config.outer_steps[config.models.index(model)]
    algorithm, step, _ = _algorithm(config, steps)
    train, tx = _ordinary(config, steps)
    params, hparams = _start(model, "per_weight", config, seed)
    _, one = _start(model, "one", config, seed)
    stack = _stack(batches["train"], config.inner_steps)
    state = algorithm.init(params, hparams)
    carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
    read = {"inner_batches": stack, "outer_batch": batches["validation"]}
    tuning, training = step.lower(state, **read).compile(), train.lower(carry, one, stack).compile()
    tuning_bytes, training_bytes = (_bytes(p.memory_analysis()) for p in (tuning, training))
    seconds = []
    for _ in range(config.rounds + 1):
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(tuning(state, **read))
        between = time.perf_counter()
        carry = jax.block_until_ready(training(carry, one, stack))
        seconds.append((between - begun, time.perf_counter() - between))
    del seconds[0]  # the first pair warms up
    records.append(
        method,
        0,
        0.0,
        time_ratio=statistics.median(a / b for a, b in seconds),
        memory_ratio=tuning_bytes / training_bytes,
        tuning_seconds=statistics.median(a for a, _ in seconds),
        training_seconds=statistics.median(b for _, b in seconds),
        tuning_bytes=tuning_bytes,
        training_bytes=training_bytes,
    )


@functools.cache
def _ordinary(config: Config, steps: int) -> tuple[Any, optax.GradientTransformation]:
    """`inner_steps` steps of Adam at a fixed decay, as straight as the tuning step has them."""
    tx, loss = _adam(config, steps), problem.operator(config.damping).loss

    def train(carry: Any, hparams: Any, stack: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, opt_state = carry
            grads = jax.grad(loss)(params, hparams, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        # Convolutions are slow inside loops on the CPU, for both programs alike.
        straight = "conv1" in carry[0] and jax.default_backend() == "cpu"
        return jax.lax.scan(step, carry, stack, unroll=straight)[0]

    return jax.jit(train, donate_argnums=0), tx


def _bytes(analysis: Any) -> int:
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
