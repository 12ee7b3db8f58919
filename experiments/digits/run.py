"""Runs `digits`: tune weight decays by hypergradients, and by search at equal cost."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import baselines, data, record
from experiments.digits import problem
from experiments.digits.config import Config
from experiments.digits.methods import BLACK_BOX, GRADIENT, held, outer_steps, response, step_cost

TOTAL = 1797  # images in the set
METHODS = ("no_tuning", *BLACK_BOX, *GRADIENT)
TABLE = (
    "validation_loss",
    "test_loss",
    "chosen_test_loss",
    "chosen_test_error",
    "relative_residual",
)


def run(
    config: Config, seed: int, out: Path, resume: bool, methods: Sequence[str] = METHODS
) -> None:
    """All methods on one seed, each skipped if a resumed run had finished it."""
    records = record.Records(out, seed)
    batches = _batches(config, seed)
    for method in methods:
        if method == "no_tuning":
            _no_tuning(config, seed, batches, records)
        elif method in BLACK_BOX:
            _search(method, config, seed, batches, records)
        else:
            _tune(method, config, seed, batches, records, out)


def _batches(config: Config, seed: int) -> dict[str, Any]:
    test = TOTAL - config.train - config.valid
    sets = data.digits(valid=config.valid, test=test, seed=seed)
    return {
        name: {"x": jnp.asarray(part.x.reshape(-1, 64)), "y": jnp.asarray(part.y)}
        for name, part in zip(("train", "valid", "test"), sets, strict=True)
    }


@functools.cache
def _pieces(config: Config) -> tuple[Any, Any, Any]:
    """Operator, jitted training and jitted evaluation: made once, compiled once for all seeds."""
    operator = problem.operator(config)
    tx = optax.adam(config.inner_lr)

    @functools.partial(jax.jit, static_argnames="steps")
    def train(state: bilevel.InnerState, hparams: Any, batch: Any, steps: int) -> Any:
        def full(params: Any, hparams: Any, _: None) -> jax.Array:
            return operator.loss(params, hparams, batch)  # the same batch in every step

        return bilevel.descend(full, tx, state, hparams, None, steps=steps)[0]

    @jax.jit
    def evaluate(params: Any, batches: Any) -> dict[str, jax.Array]:
        return _metrics(operator, params, batches)

    return operator, train, evaluate


def _metrics(operator: bilevel.GaussNewton, params: Any, batches: Any) -> dict[str, jax.Array]:
    measured = {}
    for name, part in (("validation", "valid"), ("test", "test"), ("held", "held")):
        if part not in batches:
            continue
        logits = operator.model(params, None, batches[part])
        measured[f"{name}_loss"] = problem.cross_entropy(logits, None, batches[part])
        measured[f"{name}_error"] = jnp.mean(jnp.argmax(logits, -1) != batches[part]["y"])
    return measured


def _floats(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


class Stopped:
    """The best point along a run so far, by a loss that is not the test part's."""

    def __init__(self, by: str):
        self.by, self.lowest, self.kept = by, np.inf, {}

    def after(self, metrics: dict[str, Any]) -> dict[str, float]:
        """What the method would hand over if it ended here."""
        if metrics[self.by] < self.lowest:
            self.lowest = metrics[self.by]
            names = ("validation_loss", "test_loss", "test_error")
            self.kept = {f"chosen_{name}": metrics[name] for name in names}
        return self.kept


def _no_tuning(config: Config, seed: int, batches: Any, records: record.Records) -> None:
    """One network at the starting decay, trained with the whole budget."""
    if records.finished("no_tuning", int(config.budget) // max(1, int(config.budget) // 40)):
        return
    _, train, evaluate = _pieces(config)
    params = problem.initial(config, seed)
    hparams = problem.decays(params, config.start, per_weight=False)
    state = bilevel.InnerState(params, optax.adam(config.inner_lr).init(params))
    every, best = max(1, int(config.budget) // 40), Stopped("validation_loss")
    for step in range(int(config.budget) // every):
        state = train(state, hparams, batches["train"], steps=every)
        metrics = _floats(evaluate(state.params, batches))
        records.append("no_tuning", step, every * (step + 1), **metrics, **best.after(metrics))


def _search(method: str, config: Config, seed: int, batches: Any, records: record.Records) -> None:
    """Random search or TPE over one log decay per tensor, each trial a network from scratch."""
    _, train, evaluate = _pieces(config)
    tx = optax.adam(config.inner_lr)
    start = problem.initial(config, seed)
    names = [_plain(jax.tree_util.keystr(path)) for path, _ in jax.tree.leaves_with_path(start)]

    def objective(setting: dict[str, Any], number: int) -> baselines.Tried:
        leaves = [jnp.float32(setting[name]) for name in names]
        hparams = jax.tree.unflatten(jax.tree.structure(start), leaves)
        state, best = bilevel.InnerState(start, tx.init(start)), Stopped("validation_loss")
        every, chosen = config.trial_steps // config.trial_points, {}
        for _ in range(config.trial_points):
            state = train(state, hparams, batches["train"], steps=every)
            chosen = best.after(_floats(evaluate(state.params, batches)))
        measured = {name.removeprefix("chosen_"): x for name, x in chosen.items()} | chosen
        return baselines.Tried(best.lowest, lambda: measured)

    baselines.recorded(
        objective,
        {name: (config.low, config.high) for name in names},
        records=records,
        method=method,
        trials=int(config.budget // config.trial_steps),
        cost=config.trial_steps,
        sampler={"random_search": "random", "tpe": "tpe"}[method],
        prefix="decay_",
    )


def _plain(path: str) -> str:
    """``['hidden']['kernel']`` as ``hidden_kernel``."""
    return path.strip("[]'").replace("']['", "_")


@functools.cache
def _algorithm(method: str, config: Config) -> Any:
    operator, _, _ = _pieces(config)

    def outer(params: Any, hparams: Any, batch: Any) -> tuple[jax.Array, Any]:
        metrics = _metrics(operator, params, batch)
        return metrics["validation_loss"], {**metrics, **_spread(hparams)}

    return bilevel.alternate(
        outer,
        operator.loss,
        response(method, config, operator),
        inner_tx=optax.adam(config.inner_lr),
        outer_tx=optax.adam(config.outer_lr),
        inner_steps=config.inner_steps,
        has_aux=True,
    )


def _spread(hparams: Any) -> dict[str, jax.Array]:
    """Quartiles of the log decays of every tensor."""
    quartiles = {"low": 0.25, "median": 0.5, "high": 0.75}
    return {
        f"{layer}_{name}_{word}": jnp.quantile(decay, q)
        for layer, tensors in hparams.items()
        for name, decay in tensors.items()
        for word, q in quartiles.items()
    }


def _outer(method: str, config: Config, batches: Any) -> Any:
    """What the outer loss reads: images to tune on, to test on, and to stop by if there are any."""
    cut = config.valid - held(method, config)
    tuned_on, kept = (
        {k: x[part] for k, x in batches["valid"].items()} for part in (slice(cut), slice(cut, None))
    )
    more = {"held": kept} if held(method, config) else {}
    return {"valid": tuned_on, "test": batches["test"], **more}


def _tune(
    method: str, config: Config, seed: int, batches: Any, records: record.Records, out: Path
) -> None:
    """One gradient method: the network trains once, and its decays move while it does."""
    steps, cost = outer_steps(method, config), step_cost(method, config)
    if len(record.read(out, seed=seed, method=method)) == steps:
        return
    records.rewind(method)
    algorithm = _algorithm(method, config)
    params = problem.initial(config, seed)
    hparams = problem.decays(params, config.start, per_weight="per_weight" in method)
    folder = out / "runs" / f"{method}_{seed}"
    # Full-batch training: the same stack, on the device, for every step.
    stack = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (config.inner_steps, *x.shape)), batches["train"]
    )
    result = bilevel.fit(
        algorithm,
        algorithm.init(params, hparams),
        stack,
        _outer(method, config, batches),
        steps=steps,
        key=jax.random.key(seed),
        log=folder / "log.jsonl",
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=config.checkpoint_every,
        run_id=f"digits {method} seed {seed}",
    )
    best = Stopped("held_loss" if held(method, config) else "validation_loss")
    for entry in result.history:
        metrics = {k.removeprefix("aux/"): v for k, v in entry.items() if k.startswith("aux/")}
        metrics |= best.after(metrics)
        records.append(
            method,
            entry["step"],
            cost * (entry["step"] + 1),
            **metrics,
            relative_residual=entry["residual_norm"] / entry["rhs_norm"],
            stationarity=entry["stationarity"],
        )
    pixels = np.asarray(batches["train"]["x"])
    record.save_arrays(
        out,
        f"{method}_{seed}",
        hidden_kernel=np.broadcast_to(
            result.state.hparams["hidden"]["kernel"], params["hidden"]["kernel"].shape
        ),
        params=np.concatenate([np.ravel(x) for x in jax.tree.leaves(result.state.params)]),
        hparams=np.concatenate([np.ravel(x) for x in jax.tree.leaves(result.state.hparams)]),
        mean_image=pixels.mean(0),
        deviation=pixels.std(0),
    )
