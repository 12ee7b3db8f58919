"""Runs `decay`: weight decays of four granularities by hypergradients, and by search."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import baselines, budget, data, record
from experiments.decay import problem
from experiments.decay.config import Config

SEARCHES = ("grid", "random_search", "tpe")
# Every granularity, and the two finest once more with a part of the validation images held back.
TUNED = (*problem.GRANULARITY, "per_unit_stopped", "per_weight_stopped")
METHODS = ("no_tuning", *SEARCHES, *(f"tuned_{name}" for name in TUNED))
TABLE = (
    "hyperparameters",
    "validation_loss",
    "test_loss",
    "test_error",
    "both_test_loss",
    "both_test_error",
)
Batches = dict[str, dict[str, jax.Array]]


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = METHODS
) -> None:
    """All methods on one seed; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    batches = _batches(config, seed)
    params = problem.initial(batches["train"]["x"].shape[1], config.hidden, seed)
    todo = {"no_tuning": _no_tuning, **dict.fromkeys(SEARCHES, _search)}
    todo |= {f"tuned_{name}": _tune for name in TUNED}
    for method, work in todo.items():
        if method not in methods or record.read(out, seed=seed, method=method):
            continue
        # The points along the way have a name of their own: a method's one record is its result.
        records.rewind(f"{method}_path")
        hparams = work(method, config, params, batches, records)
        _judge(method, config, params, hparams, batches, records)


def _batches(config: Config, seed: int) -> Batches:
    """Train, validation and test, and the training and validation images together."""
    if config.data == "digits":
        sets = data.digits(valid=config.valid, test=config.test, seed=seed)
    else:
        sets = getattr(data, config.data)(seed=seed)
    sizes = {"train": config.train, "validation": config.valid, "test": config.test}
    batches = {}
    for (part, size), rows in zip(sizes.items(), sets, strict=True):
        chosen = np.random.default_rng(seed).permutation(len(rows.y))[:size]
        x = rows.x[chosen]
        if x.shape[1] == 28:
            x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4))
        batches[part] = {"x": jnp.asarray(x.reshape(len(x), -1)), "y": jnp.asarray(rows.y[chosen])}
    both = [batches["train"], batches["validation"]]
    batches["both"] = jax.tree.map(lambda *xs: jnp.concatenate(xs), *both)
    return batches


@functools.cache
def _train(config: Config) -> Any:
    """Training for `trial_steps` steps of Adam, jitted."""
    tx = optax.adam(optax.cosine_decay_schedule(config.inner_lr, config.trial_steps))
    loss = problem.operator(config.damping).loss

    @jax.jit
    def train(params: Any, hparams: Any, batch: Any) -> Any:
        def full(params: Any, hparams: Any, _: None) -> jax.Array:
            return loss(params, hparams, batch)  # the same batch in every step

        first = bilevel.InnerState(params, tx.init(params))
        return bilevel.descend(full, tx, first, hparams, None, steps=config.trial_steps)[0].params

    return train


_measure = jax.jit(problem.metrics)


def _measured(params: Any, batches: Batches, *parts: str) -> dict[str, float]:
    return {k: float(v) for k, v in _measure(params, {p: batches[p] for p in parts}).items()}


def _judge(
    method: str, config: Config, params: Any, hparams: Any, batches: Batches, records: Any
) -> None:
    """Networks trained from scratch with the decays that a method found, seen by the test part.

    One is trained on the training images, another (``both``) on these and the validation images.
    The loss is a mean over images and the penalty is not: with n times the images the same prior
    has the n-th part of the decay.
    """
    train = _train(config)
    found = _measured(train(params, hparams, batches["train"]), batches, "validation", "test")
    shift = np.log(config.train / (config.train + config.valid))
    weaker = jax.tree.map(lambda decay: decay + jnp.asarray(shift, decay.dtype), hparams)
    both = _measured(train(params, weaker, batches["both"]), batches, "test")
    count = sum(x.size for x in jax.tree.leaves(hparams)) if method != "no_tuning" else 0
    records.append(
        method,
        0,
        0.0 if method == "no_tuning" else config.budget,
        **found,
        **{f"both_{name}": value for name, value in both.items()},
        hyperparameters=count,
    )


def _no_tuning(method: str, config: Config, params: Any, batches: Any, records: Any) -> Any:
    """Nothing is spent: the starting decay is what it is."""
    return problem.decays(params, config.start, "per_layer")


def _search(method: str, config: Config, params: Any, batches: Batches, records: Any) -> Any:
    """A grid over one log decay; random search and TPE over one of each layer.

    Each trial is a network trained from scratch.
    """
    train = _train(config)
    leaves, structure = jax.tree.flatten(problem.decays(params, 0.0, "per_layer"))
    names = [f"decay_{i}" for i in range(len(leaves))]
    trials = int(config.budget // config.trial_steps)

    def hparams(setting: dict[str, Any]) -> Any:
        return jax.tree.unflatten(structure, [jnp.float32(setting[name]) for name in names])

    def objective(setting: dict[str, Any]) -> float:
        fitted = train(params, hparams(setting), batches["train"])
        return _measured(fitted, batches, "validation")["validation_loss"]

    def log(trial: baselines.Trial) -> None:
        records.append(f"{method}_path", trial.number, trial.cost, validation_loss=trial.best)

    if method == "grid":
        done: list[baselines.Trial] = []
        for i, value in enumerate(np.linspace(config.low, config.high, trials)):
            setting = dict.fromkeys(names, float(value))
            loss = objective(setting)
            lowest = min([loss, *(trial.value for trial in done)])
            done.append(baselines.Trial(i, setting, loss, (i + 1) * config.trial_steps, lowest))
            log(done[-1])
    else:
        done = baselines.search(
            objective,
            {name: (config.low, config.high) for name in names},
            budget=config.budget,
            cost=config.trial_steps,
            sampler={"random_search": "random", "tpe": "tpe"}[method],
            seed=records.seed,
            log=log,
        )
    best = hparams(baselines.best(done).hparams)
    return {"all": best["hidden"]["kernel"]} if method == "grid" else best


def step_cost(config: Config, held: int = 0) -> float:
    """G of one outer step, `held` validation images held back."""
    outer = budget.weight(config.valid - held, config.train)
    hypergradient = budget.implicit_hypergradient(config.products, outer)
    return budget.training(config.inner_steps).plus(hypergradient).total


def outer_steps(config: Config, held: int = 0) -> int:
    """What the budget pays for, less the training before the tuning and that with its result."""
    return int((config.budget - 2 * config.trial_steps) // step_cost(config, held))


@functools.cache
def _algorithm(config: Config, held: int) -> tuple[Any, Any]:
    op, steps = problem.operator(config.damping), outer_steps(config, held)
    inner = optax.cosine_decay_schedule(config.inner_lr, steps * config.inner_steps)
    algorithm = bilevel.alternate(
        problem.outer,
        op.loss,
        bilevel.Implicit(bilevel.CG(max_steps=config.products), op),
        inner_tx=optax.adam(inner),
        outer_tx=optax.adam(optax.cosine_decay_schedule(config.outer_lr, steps)),
        inner_steps=config.inner_steps,
    )
    return algorithm, jax.jit(algorithm.step)


def _tune(method: str, config: Config, params: Any, batches: Batches, records: Any) -> Any:
    """The network is trained, then trains on while its decays move along hypergradients.

    Trained first, so that what the held-out images see is the decays and not that the network
    has hardly begun. The last decays are returned, or, of a method that stops early, those with
    the lowest loss on the images held back.
    """
    name = method.removeprefix("tuned_")
    stopped = name.endswith("_stopped")
    hparams = problem.decays(params, config.start, name.removesuffix("_stopped"))
    held = config.guard if stopped else 0
    parts = {
        "fitted": jax.tree.map(lambda x: x[held:], batches["validation"]),
        "test": batches["test"],
    }
    if stopped:
        parts["guard"] = jax.tree.map(lambda x: x[:held], batches["validation"])
    algorithm, step = _algorithm(config, held)
    state = algorithm.init(_train(config)(params, hparams, batches["train"]), hparams)
    # Full-batch training: the same batch for every step.
    stack = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (config.inner_steps, *x.shape)), batches["train"]
    )
    steps = outer_steps(config, held)
    every, lowest, best = max(1, steps // config.points), np.inf, hparams
    for k in range(1, steps + 1):
        used = state.hparams  # those that the parameters below were trained with
        state, _ = step(state, inner_batches=stack, outer_batch=parts["fitted"])
        if k % every and k not in (1, steps):
            continue
        measured = _measured(state.params, parts, *parts)
        if stopped and measured["guard_loss"] < lowest:
            lowest, best = measured["guard_loss"], used
        spent = config.trial_steps + k * step_cost(config, held)
        records.append(f"{method}_path", k, spent, **measured)
    return best if stopped else state.hparams
