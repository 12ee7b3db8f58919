"""Runs `augment`: learned augmentation and learned weights of examples, by hypergradients."""

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.augment import problem
from experiments.augment.config import Config
from experiments.common import budget, record

TABLE = ("test_accuracy", "test_loss", "validation_loss", "train_loss")
# Methods, and the hyperparameters each tunes. `both_parts` trains on the validation images too:
# what the same labels are worth without any tuning.
METHODS = {
    "none": (),
    "by_hand": (),
    "both_parts": (),
    "untrained": (),
    "learned": ("augment",),
    "replayed": (),
    "noisy_none": (),
    "noisy_learned": ("weigh",),
}


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = tuple(METHODS)
) -> None:
    """All sets and methods on one seed; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    for name in config.sets:
        wanted = [m for m in methods if not _finished(records, name, m, config)]
        if not wanted:
            continue
        parts = problem.load(name, config, seed)
        for method in wanted:
            _run(name, method, config, parts, records)


def _steps(method: str, config: Config) -> int:
    """Training steps of a method: a whole number of rounds."""
    steps = config.noisy_steps if method.startswith("noisy") else config.steps
    return steps // config.every * config.every


def _finished(records: record.Records, name: str, method: str, config: Config) -> bool:
    done = record.read(records.out, seed=records.seed, method=f"{name}_{method}")
    return bool(done) and done[-1].step == _steps(method, config)


class Steps(NamedTuple):
    """The jitted pieces of a run: one compilation each, for all methods and seeds."""

    tx: Any
    draw: Any
    train: Any
    tune: Any
    tune_tx: Any
    measure: Any


@functools.cache
def _pieces(
    config: Config, side: int, channels: int, steps: int, outer_lr: float, mirror: bool
) -> Steps:
    made = problem.build(config, side, channels)
    schedule = optax.cosine_decay_schedule(config.lr, steps)
    if config.network == "small":
        tx = optax.adam(schedule)
    else:
        tx = optax.sgd(schedule, momentum=0.9, nesterov=True)
    updates = max(1, steps // config.every)
    tune_tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(outer_lr, updates)),
    )
    # No warm start: the equation is another one for every batch.
    solver = bilevel.CG(max_steps=config.products)
    response = bilevel.Implicit(solver, made.operator, warm_start=False)

    @functools.partial(jax.jit, static_argnames=("size", "hand"))
    def draw(part: Any, key: jax.Array, size: int, hand: bool = False) -> Any:
        rows_key, noise_key, hand_key = jax.random.split(key, 3)
        rows = jax.random.randint(rows_key, (size,), 0, len(part["y"]))
        x = part["x"][rows]
        if hand:
            kept = problem.unchanged(config, size)
            made = problem.by_hand(hand_key, x[kept:], config, mirror)
            x = jnp.concatenate([x[:kept], made])
        return {
            "x": x,
            "y": part["y"][rows],
            "noise": jax.random.normal(noise_key, (size, config.noise), jnp.float32),
        }

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Any, opt_state: Any, hparams: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(made.operator.loss)(params, hparams, batch)
        moves, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, moves), opt_state, loss

    @jax.jit
    def tune(params: Any, hparams: Any, opt_state: Any, batch: Any, outer_batch: Any) -> Any:
        solution = bilevel.hypergrad_solve(
            made.outer,
            made.operator.loss,
            response,
            params,
            hparams,
            inner_batch=batch,
            outer_batch=outer_batch,
        )
        moves, opt_state = tune_tx.update(solution.grads, opt_state, hparams)
        stats = {
            "relative_residual": solution.stats["residual_norm"] / solution.stats["rhs_norm"],
            "result": solution.result,
        }
        return optax.apply_updates(hparams, moves), opt_state, stats

    @jax.jit
    def measure(params: Any, part: Any) -> Any:
        outputs = made.logits(params, part["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, part["y"])
        return losses, jnp.argmax(outputs, -1) == part["y"]

    return Steps(tx, draw, train, tune, tune_tx, measure)


def _evaluate(measure: Any, params: Any, part: Any, chunk: int = 1_000) -> tuple[float, float]:
    """Mean loss and accuracy of a part, a thousand images at a time."""
    total = len(part["y"])
    chunks = [
        measure(params, {k: v[i : i + chunk] for k, v in part.items()})
        for i in range(0, total, chunk)
    ]
    losses, right = (np.concatenate([np.asarray(c[k]) for c in chunks]) for k in (0, 1))
    return float(losses.mean()), float(right.mean())


def _start(config: Config, shape: tuple[int, ...], tuned: tuple[str, ...], seed: int) -> Any:
    hparams = {}
    if "augment" in tuned:
        hparams["augment"] = problem.augmenter(config, shape[-1], seed)[1]
    if "weigh" in tuned:
        hparams["weigh"] = problem.reweighter(config, seed)[1]
    return hparams


def _training_part(method: str, parts: problem.Parts) -> dict[str, jax.Array]:
    if method == "both_parts":
        return {k: jnp.concatenate([parts.train[k], parts.valid[k]]) for k in parts.train}
    return {k: parts.noisy[k] for k in "xy"} if method.startswith("noisy") else parts.train


def round_cost(method: str, config: Config) -> float:
    """G of the training steps between two hypergradients, and of the hypergradient."""
    cost = budget.training(config.every)
    if METHODS[method]:
        outer = budget.weight(config.outer_batch, config.batch)
        cost = cost.plus(budget.implicit_hypergradient(config.products, outer))
    return cost.total


def _run(
    name: str, method: str, config: Config, parts: problem.Parts, records: record.Records
) -> None:
    """One method on one set: trains, tunes if it does, measures."""
    full, seed = f"{name}_{method}", records.seed
    records.rewind(full)
    shape, steps = parts.train["x"].shape[1:], _steps(method, config)
    outer_lr = config.weigh_lr if "weigh" in METHODS[method] else config.outer_lr
    made = _pieces(config, shape[0], shape[-1], steps, outer_lr, name in config.mirrored)
    part = _training_part(method, parts)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(method.encode()))
    params = problem.classifier(config, shape[0], shape[-1], seed)[1]
    hparams = _start(config, shape, METHODS[method], seed)
    opt_state, tune_state = made.tx.init(params), made.tune_tx.init(hparams)
    if method == "untrained":  # the network as `learned` starts with it, held fixed
        hparams = _start(config, shape, ("augment",), seed)
    if method == "replayed":  # the network that `learned` found, held fixed, a fresh classifier
        hparams = {"augment": _restored(records.out, f"{name}_learned_{seed}", config, shape)}
    cost, tuning = round_cost(method, config), bool(METHODS[method])
    # Those who do not pay for hypergradients are measured at the same steps.
    rounds = steps // config.every
    spaced = {round(rounds * (i + 1) / config.points) for i in range(config.points)}
    stats: dict[str, Any] = {}
    best: dict[str, float] = {}
    for k in range(1, rounds + 1):
        for j in range(config.every):
            batch_key = jax.random.fold_in(key, k * config.every + j)
            batch = made.draw(part, batch_key, size=config.batch, hand=method == "by_hand")
            params, opt_state, train_loss = made.train(params, opt_state, hparams, batch)
        if tuning:
            outer_key = jax.random.fold_in(jax.random.fold_in(key, k), 1)
            outer_batch = made.draw(parts.valid, outer_key, size=config.outer_batch)
            hparams, tune_state, stats = made.tune(params, hparams, tune_state, batch, outer_batch)
        if k not in spaced:
            continue
        test_loss, test_accuracy = _evaluate(made.measure, params, parts.test)
        here = {
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "validation_loss": _evaluate(made.measure, params, parts.valid)[0],
            "train_loss": _evaluate(made.measure, params, part)[0],
        }
        # What trains on the validation images cannot be stopped by them: it is taken at its end.
        if not best or method == "both_parts" or here["validation_loss"] < best["validation_loss"]:
            best = here
        records.append(
            full,
            k * config.every,
            cost * k,
            **best,
            now=here["validation_loss"],
            batch_loss=float(train_loss),
            **{key: float(value) for key, value in stats.items()},
            **_changes(config, hparams, part, parts, params, made),
        )
    if "augment" in METHODS[method]:
        _save_augmented(records.out, f"{full}_{seed}", config, parts.train, hparams, shape)
    if "weigh" in METHODS[method]:
        _save_weights(records.out, f"{full}_{seed}", config, part, parts, params, hparams, made)


def _changes(
    config: Config, hparams: Any, part: Any, parts: problem.Parts, params: Any, made: Steps
) -> dict[str, float]:
    """How far from doing nothing the hyperparameters are."""
    shape, changes = part["x"].shape[1:], {}
    built = problem.build(config, shape[0], shape[-1])
    if "augment" in hparams:
        x = part["x"][:100]
        noise = jax.random.normal(jax.random.key(0), (len(x), config.noise), jnp.float32)
        moved = built.augment(hparams["augment"], x, noise)
        changes["change"] = float(jnp.sqrt(jnp.mean((moved - x) ** 2)))
    if "weigh" in hparams:
        weights, wrong = _weights(built, params, part, parts, hparams, made)
        changes["weight_wrong"] = float(weights[wrong].mean())
        changes["weight_right"] = float(weights[~wrong].mean())
    return changes


def _weights(
    built: problem.Problem, params: Any, part: Any, parts: problem.Parts, hparams: Any, made: Steps
) -> tuple[np.ndarray, np.ndarray]:
    losses = np.concatenate(
        [
            np.asarray(made.measure(params, {k: v[i : i + 1_000] for k, v in part.items()})[0])
            for i in range(0, len(part["y"]), 1_000)
        ]
    )
    weights = np.asarray(built.weigh(hparams["weigh"], jnp.asarray(losses)))
    return weights, np.asarray(parts.noisy["wrong"])


def _save_augmented(
    out: Path, name: str, config: Config, part: Any, hparams: Any, shape: tuple[int, ...]
) -> None:
    """The learned network, and what it makes of ten images, one per class."""
    built = problem.build(config, shape[0], shape[-1])
    labels = np.asarray(part["y"])
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(10) if (labels == c).any()]
    x = part["x"][np.array(first)]
    drawn = []
    for i in range(4):
        noise = jax.random.normal(jax.random.key(i), (len(x), config.noise), jnp.float32)
        drawn.append(np.asarray(built.augment(hparams["augment"], x, noise)))
    hand = problem.by_hand(jax.random.key(0), x, config, name.startswith(config.mirrored))
    weights = np.concatenate([np.ravel(w) for w in jax.tree.leaves(hparams["augment"])])
    record.save_arrays(
        out, name, originals=x, augmented=np.stack(drawn), by_hand=hand, weights=weights
    )


def _restored(out: Path, name: str, config: Config, shape: tuple[int, ...]) -> Any:
    """The weights of the U-Net that a finished method saved."""
    flat = record.load_arrays(out, name)["weights"]
    like, place, leaves = problem.augmenter(config, shape[-1], 0)[1], 0, []
    for leaf in jax.tree.leaves(like):
        leaves.append(jnp.asarray(flat[place : place + leaf.size]).reshape(leaf.shape))
        place += leaf.size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _save_weights(
    out: Path,
    name: str,
    config: Config,
    part: Any,
    parts: problem.Parts,
    params: Any,
    hparams: Any,
    made: Steps,
) -> None:
    """Weights of the training examples, which of them are wrong, and the weight of any loss."""
    shape = part["x"].shape[1:]
    built = problem.build(config, shape[0], shape[-1])
    weights, wrong = _weights(built, params, part, parts, hparams, made)
    losses = np.linspace(0, 6, 121, dtype=np.float32)
    curve = np.asarray(built.weigh(hparams["weigh"], jnp.asarray(losses)))
    record.save_arrays(out, name, weights=weights, wrong=wrong, losses=losses, curve=curve)
