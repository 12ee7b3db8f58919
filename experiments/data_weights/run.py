"""Runs `data_weights`: a network learns to weigh a corpus half of which is shuffled."""

import functools
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
ARMS = ("uniform", "learned", "filtered", "clean")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """Train the scorer, then compare fresh runs; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    text = problem.text(config, seed)
    lam, spent = learn(config, text, seed, records)
    kept = chosen(config, text, seed, int(spent))
    alike, twice = jnp.ones(len(text.train)), 2.0 * kept
    # Every arm weighs the windows by what it is given: the scorer's numbers, or one per window.
    given = {"uniform": alike, "learned": lam, "filtered": twice, "clean": 2.0 * ~text.shuffled}
    curves = {arm: fresh(config, text, seed, given[arm], arm == "learned") for arm in ARMS}
    goal = curves["uniform"][-1]
    for arm in ARMS:
        curve = curves[arm]
        reached = np.flatnonzero(curve <= goal)
        steps = config.every * (reached[0] + 1) if len(reached) else np.inf
        extra = {}
        if arm == "learned":
            mine = jax.vmap(lambda x: problem.weights(lam, x))(_batches(config, text))
            shuffled = text.shuffled[: mine.size].reshape(mine.shape)
            extra["weight_of_shuffled"] = float((mine * shuffled).sum() / mine.sum())
        if arm == "filtered":
            extra["weight_of_shuffled"] = float((kept & text.shuffled).sum() / kept.sum())
        records.append(
            arm, 0, spent if arm in ("learned", "filtered") else 0.0, curve=curve,
            test_loss=float(curve[-1]), steps_to_uniform=float(steps) / config.steps, **extra,
        )  # fmt: skip


def chosen(config: Config, text: problem.Text, seed: int, steps: int) -> jax.Array:
    """The usual filter: the half of the windows that a model of the held-out text finds likeliest.

    It may train for as many steps as the scorer costs, on the windows that the scorer's outer
    loss reads, and knows how much of the text to leave out.
    """
    one, two = jax.random.split(jax.random.fold_in(jax.random.key(seed), 7))
    tx = optax.adam(config.rate)

    @jax.jit
    def score(w: Any, text: problem.Text) -> jax.Array:
        rows = jax.random.randint(two, (steps, config.batch), 0, len(text.valid))

        def step(carry: Any, rows: jax.Array) -> Any:
            w, state = carry

            def loss(w: Any) -> jax.Array:
                return problem.losses(w, text.valid[rows], config.context).mean()

            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jax.lax.scan(step, (w, tx.init(w)), rows)[0][0]
        each = jax.lax.map(lambda x: problem.losses(w, x, config.context), _batches(config, text))
        # The last windows fill no batch.
        rest = problem.losses(w, text.train[each.size :], config.context)
        return jnp.concatenate([each.ravel(), rest])

    scores = score(problem.initial(config, one), text)
    return scores <= jnp.quantile(scores, 1 - config.corrupted)


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


def fresh(config: Config, text: problem.Text, seed: int, given: Any, scored: bool) -> np.ndarray:
    """Test losses of a new run, every few steps; the same start and batches for all arms.

    ``given``: the parameters of the scorer where ``scored``, else the weight of every window.
    """
    one, two = jax.random.split(jax.random.key(1_000_000 + seed))
    tx = optax.adam(config.rate)

    def loss(w: Any, rows: jax.Array, given: Any, windows: jax.Array) -> jax.Array:
        read = windows[rows]
        weights = problem.weights(given, read) if scored else given[rows]
        return jnp.mean(weights * problem.losses(w, read, config.context))

    @jax.jit
    def trained(w: Any, given: Any, text: problem.Text) -> jax.Array:
        shape = (config.steps // config.every, config.every, config.batch)
        rows = jax.random.randint(two, shape, 0, config.train)

        def step(carry: Any, rows: jax.Array) -> Any:
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w, rows, given, text.train), state, w)
            return (optax.apply_updates(w, updates), state), None

        def some(carry: Any, rows: jax.Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, rows)
            return carry, problem.losses(carry[0], text.test, config.context).mean()

        return jax.lax.scan(some, (w, tx.init(w)), rows)[1]

    return np.asarray(trained(problem.initial(config, one), given, text))


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Steps saved to the loss where uniform weights end, as a share of theirs."""
    shares: dict[str, dict[int, float]] = {"learned": {}, "filtered": {}}
    for (name, seed), r in record.final(records).items():
        if name in shares:
            shares[name][seed] = 1 - r.metrics["steps_to_uniform"]
    return {
        "saved": {"share": expected.interval(shares["learned"])},
        "saved_filtered": {"share": expected.interval(shares["filtered"])},
    }
