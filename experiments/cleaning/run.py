"""Runs `cleaning`: weights of examples by implicit and by first-order methods, at equal cost."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.cleaning import problem
from experiments.cleaning.config import Config
from experiments.common import budget, expected, record

TABLE = ("test_error", "auroc", "validation_loss", "weight_right", "weight_wrong")
TUNED = ("cg", "lanczos", "f2sa", "f2sa_2", "pbgd", "bome")
PLAIN = ("all", "clean", "valid", "both_parts")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All sets and methods on one seed; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    for name in config.sets:
        wanted = [m for m in (*PLAIN, *TUNED) if not _finished(records, f"{name}_{m}")]
        if not wanted:
            continue
        parts = problem.load(name, config, seed)
        for method in wanted:
            records.rewind(f"{name}_{method}")
            if method in PLAIN:
                _plain(name, method, config, parts, records)
            else:
                _tune(name, method, config, parts, records)


def _finished(records: record.Records, full: str) -> bool:
    done = record.read(records.out, seed=records.seed, method=full)
    return any("test_error" in r.metrics for r in done)


def optimizer(config: Config) -> Any:
    """SGD with momentum, of every method alike."""
    return optax.sgd(config.lr, momentum=0.9)


def algorithm(method: str, config: Config) -> bilevel.Algorithm:
    """The loop of a method."""
    inner, steps, tx = problem.train_loss(config), config.inner_steps, optimizer(config)
    losses = (problem.valid_loss, inner)
    # By size, not by sign as with Adam: where the signal is weak a weight stays.
    rate = config.reach * config.train / outer_steps(method, config)
    outer_tx = optax.chain(optax.sgd(rate), optax.clip(config.longest))
    if method in ("cg", "lanczos"):
        solver = (
            bilevel.CG(max_steps=config.max_products, rtol=0.1)
            if method == "cg"
            else bilevel.DynamicLanczos(config.subspace)
        )
        return bilevel.alternate(*losses, bilevel.Implicit(solver), tx, outer_tx, steps)
    if method.startswith("f2sa"):
        order = 2 if method == "f2sa_2" else 1
        return bilevel.f2sa(*losses, tx, outer_tx, steps, penalty=config.penalty, order=order)
    if method == "pbgd":
        return bilevel.pbgd(*losses, tx, outer_tx, 1, penalty=config.penalty)
    return bilevel.bome(*losses, tx, outer_tx, steps, eta=config.eta)


def step_cost(method: str, config: Config) -> float:
    """G of one outer step, at most; gradients count by their examples."""
    outer, steps = budget.weight(config.valid, config.train), config.inner_steps
    if method in ("cg", "lanczos"):
        # CG starts warm, by one more product; a subspace begins anew every so often.
        products = config.max_products + 1 if method == "cg" else 1 + 1 / config.subspace
        return budget.training(steps).plus(budget.implicit_hypergradient(products, outer)).total
    if method.startswith("f2sa"):
        copies = 2 if method == "f2sa_2" else 1
        gradients = (copies + 1) * steps + 2
        return budget.Cost(gradients, 0, copies * (steps + 1) * outer).total
    return budget.Cost((1 if method == "pbgd" else steps) + 2, 0, outer).total


def outer_steps(method: str, config: Config) -> int:
    """How many the budget pays for."""
    return int(config.budget / step_cost(method, config))


def _plain(
    name: str, method: str, config: Config, parts: problem.Parts, records: record.Records
) -> None:
    """Training with all weights one, on one part of the data; the best point by validation."""
    full = f"{name}_{method}"
    both = tuple(jnp.concatenate(pair) for pair in zip(parts.train, parts.valid, strict=True))
    batch = {
        "all": parts.train, "clean": parts.clean, "valid": parts.valid, "both_parts": both,
    }[method]  # fmt: skip
    loss, tx = problem.train_loss(config), optimizer(config)
    ones = jnp.full(len(batch[1]), 100.0, jnp.float32)  # whose sigmoid is one
    params = problem.start(parts)
    steps = min(config.budget, 2_000)
    every = config.inner_steps

    @jax.jit
    def train(carry: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            moves, state = tx.update(jax.grad(loss)(params, ones, batch), state, params)
            return (optax.apply_updates(params, moves), state), None

        def block(carry: Any, _: Any) -> Any:
            now, best = carry
            now, _ = jax.lax.scan(step, now, length=every)
            value = problem.valid_loss(now[0], None, parts.valid)
            better = value < best[0]
            kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), now[0], best[1])
            return (now, (jnp.where(better, value, best[0]), kept)), value

        return jax.lax.scan(block, carry, length=steps // every)

    # The validation images are trained on by two of these: their last point is taken.
    first = (params, tx.init(params)), (jnp.asarray(jnp.inf, jnp.float32), params)
    ((last, _), (_, best)), values = train(first)
    chosen = best if method in ("all", "clean") else last
    _curve(full, np.asarray(values), float(every), records)
    records.append(
        full,
        len(values) + 1,
        float(steps),
        test_error=problem.error_rate(chosen, parts.test),
        validation_loss=float(problem.valid_loss(chosen, None, parts.valid)),
    )


def _tune(
    name: str, method: str, config: Config, parts: problem.Parts, records: record.Records
) -> None:
    """One method at the budget; the best point by validation, and the test part once."""
    full = f"{name}_{method}"
    loop, cost = algorithm(method, config), step_cost(method, config)
    count = outer_steps(method, config)
    inner_steps = 1 if method == "pbgd" else config.inner_steps
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (inner_steps, *x.shape)), parts.train)
    start = loop.init(problem.start(parts), jnp.zeros(len(parts.wrong), jnp.float32))
    key = jax.random.key(records.seed)

    @jax.jit
    def whole(state: Any) -> Any:
        return bilevel.scan_run(
            loop,
            state,
            lambda _: (stacked, parts.valid),
            count,
            key=key,
            score=lambda s: problem.valid_loss(loop.deploy(s), None, parts.valid),
        )

    found = whole(start)
    weights = np.asarray(jax.nn.sigmoid(found.best.hparams))
    _curve(full, np.asarray(found.infos.value), cost, records)
    statuses = np.asarray(found.infos.result)
    records.append(
        full,
        count + 1,
        cost * count,
        test_error=problem.error_rate(found.best_params, parts.test),
        validation_loss=float(found.best_score),
        best_step=int(found.best.step),
        auroc=problem.auroc(weights, ~parts.wrong),
        weight_right=float(weights[~parts.wrong].mean()),
        weight_wrong=float(weights[parts.wrong].mean()),
        sound=float(np.mean(statuses == bilevel.Status.ok)),
    )
    record.save_arrays(records.out, f"{full}_{records.seed}", weights=weights, wrong=parts.wrong)


def _curve(full: str, values: np.ndarray, cost: float, records: record.Records) -> None:
    """The validation loss along the run, at about forty points."""
    for k in np.unique(np.linspace(1, len(values), 40).astype(int)):
        records.append(full, int(k), cost * int(k), loss_now=float(values[k - 1]))


def summary(records: list[record.Record]) -> dict[str, Any]:
    """What methods differ by, seed by seed, and what finds the wrong labels, with intervals."""
    last = record.final(records)
    told: dict[str, Any] = {}
    for name in sorted({m.removesuffix("_all") for m, _ in last if m.endswith("_all")}):
        for method in TUNED:
            full = f"{name}_{method}"
            found = [r.metrics["auroc"] for (m, _), r in last.items() if m == full]
            against = {
                f"error_over_{other}": expected.paired(
                    records, "test_error", full, f"{name}_{other}"
                )
                for other in (*PLAIN, "cg")
                if other != method
            }
            told[f"{full}_intervals"] = {"auroc": expected.interval(found), **against}
    return told
