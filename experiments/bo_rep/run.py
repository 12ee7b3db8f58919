"""Runs `bo_rep`: loops with and without normalized steps, above a recurrent encoder."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bo_rep import methods, problem, texts
from experiments.bo_rep.config import Config
from experiments.common import expected, record

TABLE = ("guard_loss", "test_loss", "test_error", "inner_rate", "outer_rate", "diverged")
Parts = dict[str, dict[str, jax.Array]]


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed; what a resumed run had finished is skipped.

    The step sizes were chosen on other seeds. The first seed keeps the records of that choice
    (``DATA_tried``), which show how much they matter.
    """
    records = record.Records(out, seed)
    for data in config.data:
        parts, corpus = _parts(config, data, seed)
        for method in (*methods.NAMES, "plain"):
            label = f"{data}_{method}"
            if record.read(out, seed=seed, method=label):
                continue
            rates = _chosen(config, data, method)
            records.rewind(f"{label}_path")
            end = _finish(config, method, rates, parts, corpus, seed, records, f"{label}_path")
            records.append(label, 0, config.budget, **end, **_named(rates))
        if seed == 0 and not records.finished(f"{data}_tried", len(_searched(config, data))):
            for i, (method, rates, end) in enumerate(_searched(config, data)):
                records.append(f"{data}_tried", i, 0.0, loop=method, **end, **_named(rates))


def _named(rates: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(("inner_rate", "outer_rate"), rates, strict=False))


@functools.cache
def _parts(config: Config, data: str, seed: int) -> tuple[Parts, texts.Corpus]:
    corpus = texts.load(data, length=config.length, words=config.words, held=config.held, seed=seed)
    names = ("train", "validation", "guard", "test")
    return {n: jax.tree.map(jnp.asarray, getattr(corpus, n)._asdict()) for n in names}, corpus


@functools.cache
def _searched(config: Config, data: str) -> tuple[Any, ...]:
    """Every method with all its step sizes, on the tuning seeds; nothing of the test part."""
    pairs = [(inner, outer) for inner in config.inner_rates for outer in config.outer_rates]
    tried = [(m, pair) for m in methods.NAMES for pair in pairs]
    tried += [("plain", (rate,)) for rate in config.plain_rates]
    results = []
    for method, rates in tried:
        ends = []
        for seed in range(config.first_seed, config.first_seed + config.tuning_seeds):
            end = _finish(config, method, rates, *_parts(config, data, seed), seed)
            ends.append({k: v for k, v in end.items() if not k.startswith("test")})
        mean = {key: float(np.mean([end[key] for end in ends])) for key in ends[0]}
        results.append((method, rates, mean))
    return tuple(results)


@functools.cache
def _chosen(config: Config, data: str, method: str) -> tuple[float, ...]:
    """The step sizes with the lowest guard loss."""
    ends = [(end["guard_loss"], rates) for m, rates, end in _searched(config, data) if m == method]
    return min(ends)[1]


@jax.jit
def _measure(params: Any, hparams: Any, part: Any) -> tuple[Any, Any]:
    outputs = problem.logits(hparams, params, part["ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, part["y"])
    return jnp.mean(losses), jnp.mean(jnp.argmax(outputs, -1) != part["y"])


def _measured(params: Any, hparams: Any, parts: Parts) -> dict[str, float]:
    found = {}
    for name in ("validation", "guard", "test"):
        loss, error = _measure(params, hparams, parts[name])
        found |= {f"{name}_loss": float(loss), f"{name}_error": float(error)}
    return found


def _drawn(part: Any, key: jax.Array, shape: tuple[int, ...]) -> Any:
    index = jax.random.randint(key, shape, 0, len(part["y"]))
    return {name: rows[index] for name, rows in part.items()}


@functools.lru_cache(maxsize=8)
def _program(config: Config, method: str, classes: int) -> Any:
    """``(first state, several steps)`` of a method, as programs for all its step sizes."""
    task = problem.Task(config.ridge)

    def adam(rate: Any) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(rate, int(config.budget), methods.END))

    def begin(rates: Any, params: Any, hparams: Any) -> Any:
        if method == "plain":
            both = params, hparams
            return both, adam(rates[0]).init(both)
        return methods.build(method, config, task, *rates)[0].algorithm.init(params, hparams)

    def tuning(state: Any, key: Any, rates: Any, parts: Parts) -> tuple[Any, Any]:
        built, _ = methods.build(method, config, task, *rates)
        keys = jax.random.split(key)
        state, info = built.algorithm.step(
            state,
            inner_batches=_drawn(parts["train"], keys[0], (built.inner_batches, config.batch)),
            outer_batch=_drawn(parts["validation"], keys[1], (config.batch,)),
        )
        return state, info.cost.total

    def training(state: Any, key: Any, rates: Any, parts: Parts) -> tuple[Any, Any]:
        (params, hparams), memory = state
        used = jax.tree.map(lambda *x: jnp.concatenate(x), parts["train"], parts["validation"])
        batch = _drawn(used, key, (config.batch,))
        grads = jax.grad(lambda both: task.inner(both[0], both[1], batch))((params, hparams))
        updates, memory = adam(rates[0]).update(grads, memory)
        return (optax.apply_updates((params, hparams), updates), memory), jnp.float32(1)

    step = training if method == "plain" else tuning

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def several(count: int, state: Any, first: Any, rates: Any, parts: Parts, key: Any) -> Any:
        def one(state: Any, i: Any) -> tuple[Any, Any]:
            return step(state, jax.random.fold_in(key, i), rates, parts)

        state, cost = jax.lax.scan(one, state, first + jnp.arange(count))
        return state, jnp.sum(cost)

    return begin, several


def _finish(
    config: Config,
    method: str,
    rates: tuple[float, ...],
    parts: Parts,
    corpus: texts.Corpus,
    seed: int,
    records: record.Records | None = None,
    label: str = "",
) -> dict[str, float]:
    """One run to the end of the budget; what its best point by guard loss measures."""
    begin, several = _program(config, method, corpus.classes)
    params, hparams = problem.start(config, corpus, seed)
    # Adam on the whole network sees the validation sentences too; they cost it nothing more.
    steps = int(config.budget // methods.COSTS.get(method, 1.0))
    state, key, count = begin(rates, params, hparams), jax.random.key(seed), steps // config.points
    best, spent = _measured(params, hparams, parts), 0.0
    for k in range(config.points):
        state, cost = several(count, state, jnp.int32(k * count), rates, parts, key)
        spent += float(cost)
        point = state[0] if method == "plain" else (state.params, state.hparams)
        now = _measured(point[0], point[1], parts)
        if records is not None:
            records.append(label, k + 1, spent, **now)
        if not np.isfinite(now["guard_loss"]):
            return {**best, "diverged": 1.0, "spent": spent}
        if now["guard_loss"] < best["guard_loss"]:
            best = now
    return {**best, "diverged": 0.0, "spent": spent}


def summary(records: list[record.Record]) -> dict[str, Any]:
    """BO-REP over the best of the other loops and over plain training, paired, with intervals.

    The best of the other loops is that with the lowest mean test loss.
    """
    means = expected.summarise(records)
    told = {}
    for data in sorted(
        {r.method.removesuffix("_bo_rep") for r in records if "_bo_rep" in r.method}
    ):
        others = [f"{data}_{name}" for name in methods.NAMES if name != "bo_rep"]
        known = [name for name in others if name in means]
        if data.endswith("_path") or not known:
            continue
        rivals = {
            "best": min(known, key=lambda name: means[name]["test_loss"]["mean"]),
            "plain": f"{data}_plain",
        }
        for name, rival in rivals.items():
            told[f"{data}_over_{name}"] = {
                metric: expected.paired(records, metric, f"{data}_bo_rep", rival, ratio=True)
                for metric in ("test_loss", "test_error")
            }
    return told
