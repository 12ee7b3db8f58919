"""Runs `lstm`: a language model untuned, with a few tuned strengths, and with one per weight."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import baselines, budget, record
from experiments.lstm import corpus, problem
from experiments.lstm.config import Config

METHODS = ("untuned", "tpe", "few", "many")
TABLE = (
    "hyperparameters",
    "validation_perplexity",
    "test_perplexity",
    "train_perplexity",
    "best_cost",
)


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = METHODS
) -> None:
    """All methods on all corpora; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    for name in config.sets:
        text = corpus.load(name, config.words, config.sizes)
        parts = {
            part: jnp.asarray(corpus.streams(getattr(text, part), batch))
            for part, batch in (
                ("train", config.batch),
                ("validation", config.eval_batch),
                ("test", config.eval_batch),
            )
        }
        parts["ids"] = jnp.asarray(text.validation)
        for method in methods:
            if method == "tpe":
                _search(f"{name}_tpe", config, seed, text.words, parts, records)
            else:
                _one(f"{name}_{method}", method, config, seed, text.words, parts, records)


def outer_cost(config: Config) -> float:
    """G of one outer step: its training steps and its hypergradient."""
    hypergradient = budget.implicit_hypergradient(config.products)
    return budget.training(config.inner_steps).plus(hypergradient).total


def stretches(config: Config, tuned: bool, part: float = 1.0) -> list[tuple[bool, int]]:
    """``(tuned, outer steps)`` between two measurements, at about equal costs, in the budget.

    `part` of the budget has that part of the measurements.
    """
    points = max(1, round(part * config.points))
    each = part * config.budget / points
    plan, spent = [], 0.0
    for i in range(points):
        now = tuned and (i + 0.5) / points > config.warm_up
        cost = outer_cost(config) if now else float(config.inner_steps)
        # What a stretch leaves of its share is the next one's.
        steps = int(((i + 1) * each - spent) // cost)
        plan.append((now, steps))
        spent += steps * cost
    return plan


class Point(NamedTuple):
    """Where a run is after a stretch, and the best it has been."""

    state: Any
    cost: float
    loss: float
    lr: float
    best: Any
    best_loss: float
    best_cost: float


def follow(
    config: Config, state: Any, plan: list[tuple[bool, int]], parts: Any, key: jax.Array
) -> Iterator[Point]:
    """Stretches of one compiled scan; the step size falls whenever the validation loss stalls."""
    evaluate = pieces(config)[1]
    best, best_loss, best_cost, losses = state, np.inf, 0.0, []
    lr, cost = config.lr, 0.0
    for tuned, count in plan:
        state = stretch(config, tuned)(state, parts, key, count)
        cost += count * (outer_cost(config) if tuned else config.inner_steps)
        losses.append(float(evaluate(state.params, parts["validation"])))
        if losses[-1] < best_loss:
            best, best_loss, best_cost = state, losses[-1], cost
        elif losses.index(min(losses)) < len(losses) - config.patience:
            # Fall, and wait as long again before the next fall.
            lr, losses = lr * config.shrink, losses[-1:]
            state = with_rate(state, lr)
        yield Point(state, cost, losses[-1], lr, best, best_loss, best_cost)


def _start(config: Config, seed: int, words: int, many: bool) -> tuple[Any, Any, jax.Array]:
    key = jax.random.key(seed)
    params = problem.initial(config, words, jax.random.fold_in(key, 1))
    return params, problem.hparams(config, params, many), key


def _ends(config: Config, point: Point, parts: Any, hparams: Any) -> dict[str, float]:
    """What is measured once a run is over, at its best validation point."""
    evaluate = pieces(config)[1]
    return {
        **{
            f"{part}_perplexity": float(np.exp(float(evaluate(point.best.params, parts[part]))))
            for part in ("validation", "test", "train")
        },
        "hyperparameters": sum(x.size for x in jax.tree.leaves(hparams)),
        "best_cost": point.best_cost,
    }


def _one(
    name: str,
    method: str,
    config: Config,
    seed: int,
    words: int,
    parts: dict[str, jax.Array],
    records: record.Records,
) -> None:
    """One run of one method, a measurement after each stretch."""
    plan = stretches(config, method != "untuned")
    last = sum(count for _, count in plan)
    done = record.read(records.out, seed=seed, method=name)
    if done and done[-1].step == last:
        return
    records.rewind(name)
    params, hparams, key = _start(config, seed, words, method == "many")
    state = pieces(config)[0].init(params, hparams, problem.zero_carry(config, config.batch))
    point = None
    for point in follow(config, state, plan, parts, key):
        ended = int(point.state.step) == last
        records.append(
            name,
            int(point.state.step),
            point.cost,
            now_perplexity=float(np.exp(point.loss)),
            best_perplexity=float(np.exp(point.best_loss)),
            lr=point.lr,
            **_kinds(problem.strengths(config, point.state.hparams)),
            **(_ends(config, point, parts, hparams) if ended else {}),
        )
    if point is not None:
        found = problem.strengths(config, point.best.hparams)
        arrays = {_plain(path): np.asarray(x) for path, x in _paths(found)}
        record.save_arrays(records.out, f"{name}_{seed}", **arrays)


def _search(
    name: str, config: Config, seed: int, words: int, parts: Any, records: record.Records
) -> None:
    """TPE over the numbers of `few`, each trial a model from scratch held to its strengths.

    A trial is worth its best validation point; the test part is read for the best trial only.
    """
    if not config.trials:
        return
    params, hparams, key = _start(config, seed, words, many=False)
    algorithm = pieces(config)[0]
    plan = stretches(config, False, config.trial_budget / config.budget)
    paths = dict(_paths(hparams))
    rates, penalties = config.searched
    space = {
        _plain(path): rates
        if "rates" in path
        else (config.decays[0] + 0.1, config.decays[1] - 0.1)
        if "decays" in path
        else penalties
        for path in paths
    }

    def objective(setting: dict[str, float], number: int) -> baselines.Tried:
        raw = [_raw(config, path, jnp.float32(setting[_plain(path)])) for path in paths]
        chosen = jax.tree.unflatten(jax.tree.structure(hparams), raw)
        state = algorithm.init(params, chosen, problem.zero_carry(config, config.batch))
        *_, point = follow(config, state, plan, parts, key)
        perplexity = float(np.exp(point.best_loss))
        return baselines.Tried(
            point.best_loss,
            lambda: {"best_perplexity": perplexity, **_ends(config, point, parts, hparams)},
        )

    baselines.recorded(
        objective,
        space,
        records=records,
        method=name,
        trials=config.trials,
        cost=config.trial_budget,
        sampler="tpe",
        startup=config.startup,
    )


def _raw(config: Config, path: str, value: jax.Array) -> jax.Array:
    """A strength in the variable that is tuned."""
    for name, ends in (("rates", config.rates), ("decays", config.decays)):
        if name in path:
            return bilevel.Interval(*ends).unconstrain(value)
    return value


def with_rate(state: Any, lr: float) -> Any:
    """The state with another step size of the training optimizer."""
    opt_state = state.trained.opt_state
    rate = opt_state.hyperparams["learning_rate"]
    changed = opt_state._replace(hyperparams={"learning_rate": jnp.full_like(rate, lr)})
    return state._replace(trained=state.trained._replace(opt_state=changed))


def _paths(hparams: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(p), x) for p, x in jax.tree.leaves_with_path(hparams)]


def _plain(path: str) -> str:
    """``['rates']['input']`` as ``rates_input``."""
    return "_".join(
        word
        for word in path.replace("[", " ")
        .replace("]", " ")
        .replace("'", " ")
        .replace('"', " ")
        .split()
    )


def _kinds(hparams: Any) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile of every kind."""
    return {
        _plain(path): np.quantile(np.asarray(x), [0.25, 0.5, 0.75]).tolist()
        for path, x in _paths(hparams)
    }


@functools.cache
def pieces(config: Config) -> tuple[Any, Any]:
    """Algorithm and compiled measurement."""
    algorithm = bilevel.alternate(
        problem.outer,
        _inner(config),
        bilevel.Implicit(solver(config)),
        inner_tx=_inner_tx(config),
        outer_tx=_outer_tx(config),
        inner_steps=config.inner_steps,
        has_state=True,
    )
    return algorithm, jax.jit(functools.partial(measure, config))


@functools.cache
def stretch(config: Config, tuned: bool) -> Any:
    """Compiled outer steps, or their training steps alone: ``(state, parts, key, length)``."""
    step = pieces(config)[0].step if tuned else functools.partial(_train, config)

    @jax.jit
    def many(state: Any, parts: Any, key: Any, length: Any) -> Any:
        def body(_: Any, state: Any) -> Any:
            batches = sample(config, parts, jax.random.fold_in(key, state.step), state.step)
            return step(state, **batches)[0]

        # A traced length: stretches of all lengths are one program.
        return jax.lax.fori_loop(0, length, body, state)

    return many


def _inner(config: Config) -> Any:
    return functools.partial(problem.inner, config)


def _inner_tx(config: Config) -> Any:
    return optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.clip_by_global_norm(config.clip), optax.adam(learning_rate)
        )
    )(learning_rate=config.lr)


def _outer_tx(config: Config) -> Any:
    """Adam for what is shared, and a slower one for the noisier offsets; both come to rest."""
    total = int((1 - config.warm_up) * config.budget // outer_cost(config))
    rates = {"shared": config.outer_lr, "own": config.own_lr}
    return optax.multi_transform(
        {name: optax.adam(optax.cosine_decay_schedule(lr, total)) for name, lr in rates.items()},
        lambda hparams: {name: name for name in hparams},
    )


def solver(config: Config) -> Any:
    """The identity, as the paper has it for this model, or a Neumann series."""
    if config.products == 0:
        return bilevel.Identity()
    return bilevel.Neumann(config.products, step_size=1.0)


def sample(config: Config, parts: Any, key: Any, step: Any) -> dict[str, Any]:
    """The windows of an outer step: K to train on, the next one for the response, one to validate.

    The response reads half of the streams, each twice with mirrored noise.
    """
    k, t, batch = config.inner_steps, config.steps, config.batch
    keys = jax.random.split(key, 3)
    stream = parts["train"]
    count = (stream.shape[1] - 1) // t
    starts = (step * k + jnp.arange(k + 1)) % count * t

    def window(start: jax.Array) -> dict[str, jax.Array]:
        cut = jax.lax.dynamic_slice_in_dim(stream, start, t + 1, axis=1)
        return {"x": cut[:, :-1], "y": cut[:, 1:]}

    windows = jax.vmap(window)(starts)
    noise = jax.random.split(keys[0], k + 1)
    rows = jnp.arange(batch)
    inner = {name: x[:k] for name, x in windows.items()}
    inner |= {"rows": jnp.broadcast_to(rows, (k, batch)), "key": noise[:k]}
    half = jax.random.permutation(keys[1], batch)[: batch // 2]
    twice = jnp.concatenate([half, half])
    response = {name: x[k][twice] for name, x in windows.items()}
    response |= {"rows": twice, "key": noise[k]}
    width = config.context + t
    places = jax.random.randint(keys[2], (batch,), 0, parts["ids"].shape[0] - width)
    text = parts["ids"][places[:, None] + jnp.arange(width + 1)]
    valid = {"x": text[:, :-1], "y": text[:, config.context + 1 :]}
    return {"inner_batches": inner, "outer_batch": valid, "response_batch": response}


def _train(config: Config, state: Any, *, inner_batches: Any, **_: Any) -> Any:
    """The training steps of an outer step, and no hypergradient."""
    both = bilevel.Problem(_inner(config), _inner(config), has_state=True)
    trained, _info = bilevel.descend(
        both, _inner_tx(config), state.trained, state.hparams, inner_batches,
        steps=config.inner_steps, unroll=False,
    )  # fmt: skip
    return state._replace(trained=trained, step=state.step + 1), None


def measure(config: Config, params: Any, stream: jax.Array) -> jax.Array:
    """Mean loss in nats over a whole part, the state carried along its streams."""
    t = config.steps
    batch, count = stream.shape[0], (stream.shape[1] - 1) // t

    def body(carry: Any, i: jax.Array) -> Any:
        cut = jax.lax.dynamic_slice_in_dim(stream, i * t, t + 1, axis=1)
        logits, carry, _, _ = problem.forward(params, cut[:, :-1], carry)
        return carry, problem.cross_entropy(logits, cut[:, 1:])

    return jax.lax.scan(body, problem.zero_carry(config, batch), jnp.arange(count))[1].mean()
