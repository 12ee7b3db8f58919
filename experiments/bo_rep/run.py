"""Runs `bo_rep`: loops with and without normalised steps, above and below a recurrent network."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bo_rep import methods, problem, texts
from experiments.bo_rep.config import Config, Setting
from experiments.common import record

TASKS = ("representation", "cleaning")
TABLE = ("validation_loss", "test_loss", "test_error", "outer_rate", "diverged")
Parts = dict[str, dict[str, jax.Array]]


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed; what a resumed run had finished is skipped.

    The step sizes were chosen on other seeds, whose runs are kept in records of their own
    (``tune_...``, of every step size: they are the picture of how much it matters).
    """
    records = record.Records(out, seed)
    for name in TASKS:
        setting: Setting = getattr(config, name)
        task = problem.Task(name, setting.ridge)
        parts, corpus = _parts(config, setting, seed)
        for method in methods.NAMES:
            label = f"{name}_{method}"
            if record.read(out, seed=seed, method=label):
                continue
            rates = _chosen(config, name, method)
            records.rewind(f"{label}_path")
            end = _tune(config, task, method, rates, parts, corpus, seed, records, f"{label}_path")
            records.append(label, 0, config.budget, **end, **_named(rates))
        if not record.read(out, seed=seed, method=f"{name}_plain"):
            for which in ("plain", "clean")[: 1 + (setting.wrong > 0)]:
                end = _plain(config, task, parts, corpus, seed, which)
                records.append(f"{name}_{which}", 0, config.budget, **end)
        if seed == 0 and not record.read(out, seed=seed, method=f"{name}_tune"):
            for i, (method, rates, end) in enumerate(_searched(config, name)):
                records.append(f"{name}_tune", i, 0.0, loop=method, **end, **_named(rates))


def _named(rates: tuple[float, float]) -> dict[str, float]:
    return {"inner_rate": rates[0], "outer_rate": rates[1]}


@functools.cache
def _parts(config: Config, setting: Setting, seed: int) -> tuple[Parts, texts.Corpus]:
    corpus = texts.load(
        setting.data, length=config.length, words=config.words, wrong=setting.wrong,
        held=config.held, seed=seed,
    )  # fmt: skip
    parts = {}
    for name in ("train", "validation", "guard", "test"):
        rows = getattr(corpus, name)
        parts[name] = {
            "ids": jnp.asarray(rows.ids),
            "y": jnp.asarray(rows.y),
            "clean": jnp.asarray(rows.clean),
            "row": jnp.arange(len(rows.y)),
        }
    return parts, corpus


@functools.cache
def _searched(config: Config, name: str) -> tuple[Any, ...]:
    """Every method with every pair of step sizes, on the tuning seeds."""
    setting: Setting = getattr(config, name)
    task = problem.Task(name, setting.ridge)
    results = []
    for method in methods.NAMES:
        for inner in setting.inner_rates:
            for outer in setting.outer_rates:
                ends = []
                for k in range(config.tuning_seeds):
                    seed = config.first_seed + k
                    parts, corpus = _parts(config, setting, seed)
                    ends.append(_tune(config, task, method, (inner, outer), parts, corpus, seed))
                mean = {key: float(np.mean([end[key] for end in ends])) for key in ends[0]}
                results.append((method, (inner, outer), mean))
    return tuple(results)


@functools.cache
def _chosen(config: Config, name: str, method: str) -> tuple[float, float]:
    """The pair of step sizes with the lowest guard loss; a run that diverged is never it."""
    ends = [(end["guard_loss"], rates) for m, rates, end in _searched(config, name) if m == method]
    return min((loss if np.isfinite(loss) else np.inf, rates) for loss, rates in ends)[1]


@functools.partial(jax.jit, static_argnums=0)
def _measure(task: problem.Task, params: Any, hparams: Any, part: Any) -> tuple[Any, Any]:
    outputs = task.outputs(params, hparams, part["ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, part["clean"])
    return jnp.mean(losses), jnp.mean(jnp.argmax(outputs, -1) != part["clean"])


def _measured(task: problem.Task, params: Any, hparams: Any, parts: Parts) -> dict[str, float]:
    found = {}
    for name in ("validation", "guard", "test"):
        loss, error = _measure(task, params, hparams, parts[name])
        found |= {f"{name}_loss": float(loss), f"{name}_error": float(error)}
    return found


def _drawn(part: Any, key: jax.Array, shape: tuple[int, ...]) -> Any:
    index = jax.random.randint(key, shape, 0, len(part["y"]))
    return {name: part[name][index] for name in ("ids", "y", "row")}


@functools.lru_cache(maxsize=2)
def _program(config: Config, task: problem.Task, method: str) -> Any:
    """`count` steps of a method from step `first`, as one program for all its step sizes."""

    @functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
    def several(count: int, state: Any, first: Any, rates: Any, parts: Parts, key: Any) -> Any:
        built, _ = methods.build(method, config, task, *rates)

        def step(state: Any, i: Any) -> tuple[Any, Any]:
            keys = jax.random.split(jax.random.fold_in(key, i))
            state, info = built.algorithm.step(
                state,
                inner_batches=_drawn(parts["train"], keys[0], (built.inner_batches, config.batch)),
                outer_batch=_drawn(parts["validation"], keys[1], (config.batch,)),
            )
            return state, info.cost.total

        state, cost = jax.lax.scan(step, state, first + jnp.arange(count))
        return state, jnp.sum(cost)

    return several


def _tune(
    config: Config,
    task: problem.Task,
    method: str,
    rates: tuple[float, float],
    parts: Parts,
    corpus: texts.Corpus,
    seed: int,
    records: record.Records | None = None,
    label: str = "",
) -> dict[str, float]:
    """One run to the end of the budget; what its best point by guard loss measures."""
    built, steps = methods.build(method, config, task, *rates)
    params, hparams = task.start(config, corpus, seed)
    state = built.algorithm.init(params, hparams)
    several, key = _program(config, task, method), jax.random.key(seed)
    count = steps // config.points
    best, spent = _measured(task, params, hparams, parts), 0.0
    for k in range(config.points):
        state, cost = several(count, state, jnp.int32(k * count), rates, parts, key)
        spent += float(cost)
        now = _measured(task, built.algorithm.deploy(state), state.hparams, parts)
        if records is not None:
            records.append(label, k + 1, spent, **now)
        if not np.isfinite(now["guard_loss"]):
            return {**best, "diverged": 1.0, "spent": spent}
        if now["guard_loss"] < best["guard_loss"]:
            best = now
    return {**best, "diverged": 0.0, "spent": spent}


PLAIN_RATE = 3e-3


@functools.lru_cache(maxsize=4)
def _training(config: Config, task: problem.Task, steps: int, clean: bool) -> Any:
    """Adam on encoder and readout at once, on the training and the validation sentences."""
    tx = optax.adam(optax.cosine_decay_schedule(PLAIN_RATE, int(config.budget), config.decay))

    def loss(both: Any, batch: Any) -> jax.Array:
        outputs = problem.logits(both["encoder"], both["readout"], batch["ids"])
        size = sum(jnp.sum(w**2) for w in jax.tree.leaves(both))
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])
        return jnp.mean(losses) + 0.5 * task.ridge * 0.01 * size

    @jax.jit
    def several(both: Any, memory: Any, first: Any, part: Any, key: Any) -> Any:
        def step(carry: Any, i: Any) -> tuple[Any, None]:
            both, memory = carry
            batch = _drawn(part, jax.random.fold_in(key, i), (config.batch,))
            updates, memory = tx.update(jax.grad(loss)(both, batch), memory, both)
            return (optax.apply_updates(both, updates), memory), None

        return jax.lax.scan(step, (both, memory), first + jnp.arange(steps))[0]

    return tx, several


def _plain(
    config: Config, task: problem.Task, parts: Parts, corpus: texts.Corpus, seed: int, which: str
) -> dict[str, float]:
    """The same network trained as a whole, for the same budget, best point by guard loss.

    ``plain``: on the training sentences, wrong labels included, and the validation sentences.
    ``clean``: on the same with the true labels, which no method has.
    """
    body, top = problem.encoder(config, corpus.words, seed), problem.readout(config, corpus.classes)
    both = {"encoder": body, "readout": top}
    used = [parts["train"], parts["validation"]]
    part = {k: jnp.concatenate([p[k] for p in used]) for k in ("ids", "y", "clean", "row")}
    if which == "clean":
        part = {**part, "y": part["clean"]}
    whole = problem.Task("cleaning", task.ridge)  # both networks are its parameters
    steps = int(config.budget // config.points)
    tx, several = _training(config, task, steps, which == "clean")
    memory, key = tx.init(both), jax.random.key(seed)
    best: dict[str, float] = {"guard_loss": np.inf}
    for k in range(config.points):
        both, memory = several(both, memory, jnp.int32(k * steps), part, key)
        now = _measured(whole, both, None, parts)
        best = now if now["guard_loss"] < best["guard_loss"] else best
    return {**best, "diverged": 0.0, "spent": config.budget}
