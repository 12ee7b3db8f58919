"""Runs `data_weights`: a network learns to weigh a corpus half of which is shuffled."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import budget, expected, record
from experiments.common.batches import draw
from experiments.data_weights import problem
from experiments.data_weights.config import Config

TABLE = ("test_loss", "steps_to_uniform", "weight_of_shuffled")
ARMS = ("uniform", "learned", "clean")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """Train the scorer, then compare three fresh runs; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    text = problem.text(config, seed)
    lam, spent = learn(config, text, seed, records)
    weighing = {
        "uniform": lambda rows, lam: jnp.ones(len(rows)),
        "learned": lambda rows, lam: problem.weights(lam, text.train[rows]),
        "clean": lambda rows, lam: 2.0 * ~text.shuffled[rows],
    }
    curves = {arm: fresh(config, text, seed, weighing[arm], lam) for arm in ARMS}
    goal = curves["uniform"][-1]
    for arm in ARMS:
        curve = curves[arm]
        reached = np.flatnonzero(curve <= goal)
        steps = config.every * (reached[0] + 1) if len(reached) else np.inf
        extra = {}
        if arm == "learned":
            given = jax.vmap(lambda x: problem.weights(lam, x))(_batches(config, text))
            shuffled = text.shuffled[: given.size].reshape(given.shape)
            extra["weight_of_shuffled"] = float((given * shuffled).sum() / given.sum())
        records.append(
            arm, 0, spent if arm == "learned" else float(config.steps), curve=curve,
            test_loss=float(curve[-1]), steps_to_uniform=float(steps) / config.steps, **extra,
        )  # fmt: skip


def _batches(config: Config, text: problem.Text) -> jax.Array:
    count = len(text.train) // config.batch
    return text.train[: count * config.batch].reshape(count, config.batch, -1)


def learn(
    config: Config, text: problem.Text, seed: int, records: record.Records
) -> tuple[Any, float]:
    """The scorer, trained beside one language model by hypergradients of short windows."""

    def train(w: Any, lam: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean(problem.weights(lam, batch) * problem.losses(w, batch, config.context))

    def valid(w: Any, lam: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean(problem.losses(w, batch, config.context))

    tx = optax.adam(config.rate)
    response = bilevel.Unroll(tx, config.window)
    loop = bilevel.alternate(valid, train, response, tx, optax.adam(config.move), 0)
    one, two, three = jax.random.split(jax.random.key(seed), 3)
    state = loop.init(problem.initial(config, one), problem.scorer(config, two))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, text: problem.Text, key: jax.Array) -> Any:
        inner, outer = jax.random.split(key)
        return loop.step(
            state,
            inner_batches=draw(text.train, inner, (config.window, config.batch)),
            outer_batch=draw(text.valid, outer, (config.valid_batch,)),
        )

    outer = budget.weight(config.valid_batch, config.batch)
    paid = budget.hypergradient(response, state.hparams, outer=outer).total
    for update in range(config.updates):
        state, info = step(state, text, jax.random.fold_in(three, update))
        if (update + 1) % 20 == 0 or update + 1 == config.updates:
            records.append("scorer", update, paid * (update + 1), value=float(info.value))
    return state.hparams, paid * config.updates


def fresh(
    config: Config, text: problem.Text, seed: int, weigh: Callable[..., jax.Array], lam: Any
) -> np.ndarray:
    """Test losses of a new run, every few steps; the same start and batches for all arms."""
    one, two = jax.random.split(jax.random.key(1_000_000 + seed))
    tx = optax.adam(config.rate)

    def loss(w: Any, rows: jax.Array, lam: Any, windows: jax.Array) -> jax.Array:
        given = weigh(rows, lam)
        return jnp.mean(given * problem.losses(w, windows[rows], config.context))

    @jax.jit
    def trained(w: Any, lam: Any, text: problem.Text) -> jax.Array:
        shape = (config.steps // config.every, config.every, config.batch)
        rows = jax.random.randint(two, shape, 0, config.train)

        def step(carry: Any, rows: jax.Array) -> Any:
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w, rows, lam, text.train), state, w)
            return (optax.apply_updates(w, updates), state), None

        def some(carry: Any, rows: jax.Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, rows)
            return carry, problem.losses(carry[0], text.test, config.context).mean()

        return jax.lax.scan(some, (w, tx.init(w)), rows)[1]

    return np.asarray(trained(problem.initial(config, one), lam, text))


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Steps of the learned weights to the loss where uniform ones end, as a share of theirs."""
    last = record.final(records)
    told = [r.metrics["steps_to_uniform"] for (name, _), r in last.items() if name == "learned"]
    return {"saved": {"share": expected.interval([1 - x for x in told])}}
