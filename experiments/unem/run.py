"""Runs `unem`: coefficients of a clustering, one for all steps or one for each."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import expected, record
from experiments.unem import problem
from experiments.unem.config import Config

LEARNED = ("shared", "layers", "layers_temperatures")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All sets and ways to choose the coefficients; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    for name in config.sets:
        valid, test = problem.episodes(name, config, seed)
        judge = _judge(config, test)
        for method, gamma in (("kmeans", 0.0), ("one", 1.0)):
            records.append(f"{name}_{method}", 0, 0.0, accuracy=judge(_same(gamma)), gamma=gamma)
        inductive = bilevel.UnrollMap(problem.step(config.shots), 1, initial=problem.start)
        found = inductive.run(problem.blank(test), _same(0.0), test)
        records.append(f"{name}_prototypes", 0, 0.0, accuracy=problem.accuracy(found, test))
        for method, taus in (("grid", (0.0,)), ("grid_temperature", config.temperatures)):
            gamma, tau = grid(config, valid, taus)
            tried = config.grid * len(taus) * config.valid / 3
            records.append(
                f"{name}_{method}", 0, tried, accuracy=judge(_same(gamma, tau)), gamma=gamma,
                temperature=np.exp(tau),
            )  # fmt: skip
        for method in LEARNED:
            lam, losses = tuned(method, config, valid, seed)
            for i, loss in enumerate(losses):
                at = (i + 1) * config.steps // len(losses)
                records.append(f"{name}_{method}_path", at, at * config.batch, loss=loss)
            records.append(
                f"{name}_{method}", config.steps, config.steps * config.batch,
                accuracy=judge(lam), gamma=np.asarray(lam["gamma"]).ravel().tolist(),
                temperature=np.exp(np.asarray(lam["temperature"])).ravel().tolist(),
            )  # fmt: skip


def _same(gamma: float, tau: float = 0.0) -> Any:
    return {"gamma": jnp.float32(gamma), "temperature": jnp.float32(tau)}


def response(config: Config) -> bilevel.UnrollMap:
    """The whole iteration, from the means of the support."""
    return bilevel.UnrollMap(problem.step(config.shots), config.layers, initial=problem.start)


def _judge(config: Config, episodes: problem.Episodes) -> Any:
    return lambda lam: float(_accuracy(lam, episodes, config))


@functools.partial(jax.jit, static_argnums=2)
def _accuracy(lam: Any, episodes: problem.Episodes, config: Config) -> jax.Array:
    state = response(config).run(problem.blank(episodes), lam, episodes)
    return problem.accuracy(state, episodes)


def grid(config: Config, valid: problem.Episodes, taus: tuple[float, ...]) -> tuple[float, float]:
    """The values of the best accuracy on validation episodes, the same in all steps."""
    judge = _judge(config, valid)
    pairs = [(float(g), t) for g in np.geomspace(*config.grid_ends, config.grid) for t in taus]
    return pairs[int(np.argmax([judge(_same(*pair)) for pair in pairs]))]


def tuned(
    method: str, config: Config, valid: problem.Episodes, seed: int
) -> tuple[Any, np.ndarray]:
    """Coefficients after Adam on hypergradients of validation episodes, and the losses met."""
    lam, values = _learned(method, config)(valid, jax.random.key(seed))
    return lam, np.array([part.mean() for part in np.array_split(np.asarray(values), 10)])


@functools.cache
def _learned(method: str, config: Config) -> Any:
    """Jitted ``(episodes, key) -> (coefficients, losses)``, for all seeds."""
    shape = () if method == "shared" else (config.layers,)
    fixed = {"gamma": jnp.ones(shape), "temperature": jnp.zeros(())}
    # With temperatures the scale would be the last of them once more.
    other = ("temperature", shape) if method == "layers_temperatures" else ("scale", ())
    first = {"gamma": jnp.ones(shape), other[0]: jnp.zeros(other[1])}

    def step(state: Any, lam: Any, batch: Any, t: Any) -> Any:
        return problem.step(config.shots)(state, {**fixed, **lam}, batch, t)

    through = bilevel.UnrollMap(step, config.layers, initial=problem.start)
    gradient = bilevel.value_and_hypergrad(problem.cross_entropy, None, through)
    tx = optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))

    @jax.jit
    def learn(valid: problem.Episodes, key: Any) -> Any:
        def advance(carry: Any, key: Any) -> Any:
            lam, opt = carry
            chosen = jax.random.choice(key, config.valid, (config.batch,), replace=False)
            batch = jax.tree.map(lambda x: x[chosen], valid)
            value, grads = gradient(problem.blank(batch), lam, inner_batch=batch, outer_batch=batch)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(lam, updates), opt), value

        keys = jax.random.split(key, config.steps)
        (lam, _), values = jax.lax.scan(advance, (first, tx.init(first)), keys)
        return {**fixed, **lam}, values

    return learn


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Differences in accuracy on the same episodes, with their intervals."""
    told: dict[str, Any] = {}
    names = {r.method.removesuffix("_grid") for r in records if r.method.endswith("_grid")}
    pairs = {
        "layers_less_grid": ("layers", "grid"),
        "layers_less_one": ("layers", "one"),
        "layers_less_kmeans": ("layers", "kmeans"),
        "layers_less_prototypes": ("layers", "prototypes"),
        "layers_less_shared": ("layers", "shared"),
        "temperatures_less_grid": ("layers_temperatures", "grid"),
        "temperatures_less_grid_temperature": ("layers_temperatures", "grid_temperature"),
        "temperatures_less_layers": ("layers_temperatures", "layers"),
    }
    for name in sorted(names):
        for pair, (a, b) in pairs.items():
            got = expected.paired(records, "accuracy", f"{name}_{a}", f"{name}_{b}")
            told[f"{name}_{pair}"] = got
    return told
