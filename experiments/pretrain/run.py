"""Runs `pretrain`: weights of pre-training tasks, for what they are worth after fine-tuning."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.objectives import FineTuned
from experiments.common import expected, record
from experiments.pretrain import problem
from experiments.pretrain.config import Config

TABLE = ("test_loss", "test_error", "useful", "useless")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All arms on one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    task = problem.task(config, seed)
    count = config.useful + config.useless
    uniform = jnp.zeros(count)
    only = jnp.where(jnp.arange(count) < config.useful, 0.0, -20.0)
    learned, cost = tuned(task, config, seed, records)
    w = problem.initial(jax.random.key(seed), task.pre[0].shape[1], config)
    for arm, chosen, paid in (
        ("learned", learned, cost), ("uniform", uniform, 0.0), ("useful_only", only, 0.0),
    ):  # fmt: skip
        values = np.asarray(problem.weights(chosen))
        told = {
            "useful": float(values[: config.useful].mean()),
            "useless": float(values[config.useful :].mean()),
            "weights": values.tolist(),
        }
        body = pretrained(config, w, chosen, task.pre)
        paid += config.pre_steps + config.fine_steps
        records.append(arm, 0, paid, **judged(body, task, config), **told)
    records.append("scratch", 0, config.fine_steps, **judged(w, task, config))


def tuned(
    task: problem.Task, config: Config, seed: int, records: record.Records
) -> tuple[jax.Array, float]:
    """Log weights of the tasks: implicit through pre-training, unrolled through fine-tuning."""
    w = problem.initial(jax.random.key(seed), task.pre[0].shape[1], config)
    # Far from a minimum of pre-training the hypergradient means nothing.
    warm = pretrained(config, w, jnp.zeros(config.useful + config.useless), task.pre)
    found = _tuned(config, warm, task, jax.random.key(seed + 1))
    # A fine-tuning step reads few images, its derivative costs about three times as much.
    fine_price = 3 * config.fine_steps * (len(task.fine[1]) // 2) / config.examples
    price = config.inner_steps + 2.5 * (config.terms + 1) + fine_price
    for i in range(0, config.outer_steps, max(1, config.outer_steps // 25)):
        values = np.asarray(problem.weights(found.infos.hparams[i])).tolist()
        cost, value = config.pre_steps + i * price, float(found.infos.value[i])
        records.append("path", i, cost, value=value, weights=values)
    return found.state.hparams, config.pre_steps + config.outer_steps * price


def fine_optimizer(config: Config) -> Any:
    """Adam for the new head, and at a smaller rate for the encoder."""
    rates = {"head": optax.adam(config.fine_rate), "body": optax.adam(config.body_rate)}
    return optax.multi_transform(rates, {"head": "head", "body": "body"})


@functools.partial(jax.jit, static_argnums=0)
def _tuned(config: Config, w: Any, task: problem.Task, key: jax.Array) -> bilevel.WholeRun:
    fine = FineTuned(
        problem.fine_loss, problem.fine_loss, fine_optimizer(config), config.fine_steps,
        problem.copied(config.classes),
    )  # fmt: skip
    alg = bilevel.alternate(
        fine.outer,
        problem.pre_loss(config.decay),
        bilevel.Implicit(bilevel.Neumann(config.terms, config.step_size), certify=False),
        optax.adam(config.pre_rate),
        optax.adam(config.outer_rate),
        config.inner_steps,
    )
    count, half = len(task.fine[1]), len(task.fine[1]) // 2

    def repeated(tree: Any, times: int) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)

    def sample(key: jax.Array) -> Any:
        order = jax.random.permutation(key, count)
        train, valid = (
            jax.tree.map(lambda x, rows=rows: x[rows], task.fine)
            for rows in (order[:half], order[half:])
        )
        outer = (repeated(train, config.fine_steps), valid)
        return repeated(task.pre, config.inner_steps), outer

    first = alg.init(w, jnp.zeros(config.useful + config.useless))
    return bilevel.scan_run(alg, first, sample, config.outer_steps, key=key)


@functools.partial(jax.jit, static_argnums=0)
def pretrained(config: Config, w: Any, log_weights: jax.Array, batch: Any) -> Any:
    """Pre-training from the start with fixed weights of tasks."""
    loss, tx = problem.pre_loss(config.decay), optax.adam(config.pre_rate)
    return _trained(loss, tx, w, log_weights, batch, config.pre_steps)


@functools.partial(jax.jit, static_argnums=0)
def fine_tuned(config: Config, w: Any, batch: Any) -> Any:
    """Fine-tuning of a pre-trained encoder on all labels."""
    start, tx = problem.copied(config.classes)(w, None), fine_optimizer(config)
    return _trained(problem.fine_loss, tx, start, (), batch, config.fine_steps)


def _trained(loss: Any, tx: Any, w: Any, hparams: Any, batch: Any, steps: int) -> Any:
    def body(state: Any, _: None) -> Any:
        stack = jax.tree.map(lambda x: x[None], batch)
        return bilevel.descend(loss, tx, state, hparams, stack, steps=1)[0], None

    return jax.lax.scan(body, bilevel.InnerState(w, tx.init(w)), None, length=steps)[0].params


def judged(w: Any, task: problem.Task, config: Config) -> dict[str, float]:
    """Test loss and error after fine-tuning on all labels."""
    tuned = fine_tuned(config, w, task.fine)
    wrong = jnp.argmax(problem.fine_outputs(tuned, task.test[0]), 1) != task.test[1]
    loss = problem.fine_loss(tuned, (), task.test)
    return {"test_loss": float(loss), "test_error": float(jnp.mean(wrong))}


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Learned weights against the other arms, seed by seed."""
    last = record.final(records)
    told: dict[str, Any] = {
        f"learned_less_{other}": {
            metric: expected.paired(records, metric, "learned", other)
            for metric in ("test_loss", "test_error")
        }
        for other in ("uniform", "useful_only", "scratch")
    }
    ratios = [
        got.metrics["useful"] / got.metrics["useless"]
        for (name, _), got in last.items()
        if name == "learned"
    ]
    told["useful_over_useless"] = {"weight": expected.statistics(ratios)}
    return told
