"""Runs `many_network`: a decay per feature, unit or weight of a network, beside one searched."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.objectives import HyperPrior, choose_strength
from experiments.common import budget, data, expected, record
from experiments.many.run import name_of
from experiments.many_network import problem
from experiments.many_network.config import Config

TABLE = ("test_loss", "test_error", "spread")
TENSOR = "tensor"
OTHER = 1000
Rows = tuple[Any, Any]


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All sets that have so many draws, on one; a resumed run measures the draw again."""
    records = record.Records(out, seed)
    records.rewind()
    for name, count, draws in config.sets:
        if seed % 100 < draws:
            fitted, test = images(name, count, config.test, seed)
            Draw(name, fitted, test, config, records).measure()


def images(name: str, count: int, most: int, seed: int) -> tuple[Rows, Rows]:
    """`count` images to fit and tune on, and at most so many others that test."""
    sets = data.digits(valid=0, test=0) if name == "digits" else getattr(data, name)(valid=0)
    order = np.random.default_rng(seed).permutation(len(sets.train.y))
    rows = [_flat(sets.train, order[:count])]
    if len(sets.test.y):
        return rows[0], _flat(sets.test, np.arange(min(most, len(sets.test.y))))
    return rows[0], _flat(sets.train, order[count : count + most])


def _flat(rows: data.Split, chosen: np.ndarray) -> Rows:
    x = rows.x[chosen]
    if x.shape[1] == 28:
        x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return x.reshape(len(x), -1), rows.y[chosen]


def strength(spread: float, count: int) -> float:
    """Of a prior under which log decays deviate by ``spread``, beside a mean over the images."""
    return 0.0 if math.isinf(spread) else 1 / (count * spread**2)


class Splits:
    """Indices: in each split one part of the images is guarded, and the others make folds."""

    def __init__(self, count: int, config: Config, seed: int):
        parts, folds = config.splits, config.folds
        # Parts of one size, so that all splits are one `vmap`; a few images are left over.
        size = count // parts
        while size * (parts - 1) % folds:
            size -= 1
        order = np.random.default_rng(seed).permutation(count)[: size * parts]
        self.guard = order.reshape(parts, size)
        self.others = np.stack([np.delete(self.guard, k, 0).ravel() for k in range(parts)])
        self.valid = self.others.reshape(parts, folds, -1)
        self.train = np.stack(
            [np.delete(self.valid, k, 1).reshape(parts, -1) for k in range(folds)], 1
        )


@functools.cache
def _fit(config: Config, inputs: int) -> Any:
    """`(keys, log decays, rows, held) -> (losses of each held image, errors)`, networks at once."""

    def one(key: jax.Array, lam: Any, rows: Rows, held: Rows) -> Any:
        params = problem.initial(key, inputs, config.hidden)
        params = problem.train(params, lam, rows, config)
        return problem.losses(params, held), problem.error(params, held)

    return jax.jit(jax.vmap(one)), jax.jit(jax.vmap(one, (0, None, None, None)))


@functools.cache
def _tuner(config: Config, inputs: int) -> Any:
    """`(keys, start, places, strengths, folds) -> log decays`, of all strengths and splits.

    One program for decays per feature, unit and weight: as many as there are weights, some unused.
    """

    @jax.jit
    def tune(keys: jax.Array, start: jax.Array, place: Any, strengths: Any, folds: Any) -> Any:
        decays = problem.spread_out(start, place)

        def of_split(keys: jax.Array, folds: Any) -> Any:
            def trained(key: jax.Array, rows: Rows) -> Any:
                return problem.train(
                    problem.initial(key, inputs, config.hidden), decays, rows, config
                )

            params = jax.vmap(trained)(keys, folds[0])

            def of_strength(strength: jax.Array) -> Any:
                prior = HyperPrior(start, strength, "all")
                return problem.tune(params, start, place, prior, folds, config)

            return jax.vmap(of_strength)(strengths)

        return jax.vmap(of_split, out_axes=1)(keys, folds)

    return tune


class Draw:
    """One set and draw: searches, tunes, chooses, and judges by networks trained from scratch."""

    def __init__(self, name: str, fitted: Rows, test: Rows, config: Config, records: Any):
        self.name, self.fitted, self.test = name, fitted, test
        self.config, self.records = config, records
        self.count, self.inputs = fitted[0].shape
        self.seed = records.seed
        self.splits = Splits(self.count, config, self.seed)
        # Shares of the images that train: beside guarded ones, and beside a fold of the rest.
        self.outer = 1 - 1 / config.splits
        self.inner = self.outer * (1 - 1 / config.folds)

    def measure(self) -> None:
        """Every arm, one record each."""
        c = self.config
        first = self.search(np.linspace(*c.grid, c.points), [0])
        beside = first + np.linspace(-c.beside, c.beside, c.points_beside)
        again = self.search(beside, range(1, 1 + c.repeats))
        searched = self.searches(c.points)
        self.judge("first", self.shared(first), TENSOR, searched, decay=first)
        both = searched + self.searches(c.repeats * c.points_beside)
        self.judge("one", self.shared(again), TENSOR, both, decay=again)
        spreads = (*c.spreads, math.inf)
        shared = self.held_out(self.in_splits(first), TENSOR, self.splits, OTHER)
        for granularity in (TENSOR, *problem.GRANULARITY):
            tuned = self.tune(granularity, first, spreads)
            # Of four decays the strength is no question.
            tuned = tuned[-1:] if granularity == TENSOR else tuned
            levelled = [self.level(granularity, lam) for lam in tuned]
            cost = searched + self.tunings(1) + self.searches(len(c.levels))
            for (lam, _), spread in zip(levelled, spreads[-len(tuned) :], strict=True):
                arm = TENSOR if granularity == TENSOR else f"{granularity}_{name_of(spread)}"
                self.judge(arm, lam, granularity, cost)
            if granularity != TENSOR:
                cost = searched + self.choosing()
                self.choose(granularity, (self.shared(first), shared), levelled[:-1], cost)

    def level(self, granularity: str, lam: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """Log decays for networks of all images, and the losses of guarded images with them.

        Beside networks in training hypergradients find what differs between the decays, but less
        well how strong all of them should be: that is one number, and searched.
        """
        shift = math.log(self.inner / self.outer)
        # Other networks than those beside which the decays were tuned.
        each = [
            self.held_out(lam + shift + level, granularity, self.splits, OTHER)
            for level in self.config.levels
        ]
        best = int(np.argmin([np.mean(losses) for losses in each]))
        whole = jnp.mean(lam, 0) + math.log(self.inner) + self.config.levels[best]
        return whole, each[best]

    def choose(self, granularity: str, shared: Any, many: Any, cost: float) -> None:
        """The strength, or sharing, by images that neither trained nor validated.

        ``shared`` and ``many``: log decays, and losses of the guarded images of each split.
        """
        spreads = (0.0, *self.config.spreads)
        strengths = [math.inf, *(strength(s, self.count) for s in self.config.spreads)]
        candidates = dict(zip(strengths, (shared, *many), strict=True))
        split = {tuple(index.tolist()): k for k, index in enumerate(self.splits.others)}
        choice = choose_strength(
            HyperPrior(jnp.zeros(1), 1.0, "all"),
            lambda prior, train: candidates[prior.strength][1][split[tuple(train.tolist())]],
            lambda losses, _: losses,
            list(zip(self.splits.others, self.splits.guard, strict=True)),
            strengths=strengths, rule="clearly_better", errors=self.config.errors,
        )  # fmt: skip
        told = {"gains": choice.gains.tolist(), "gain_errors": choice.gain_errors.tolist()}
        told["spread"] = spreads[strengths.index(choice.strength)]
        found = candidates[choice.strength][0]
        self.judge(f"{granularity}_chosen", found, granularity, cost, **told)

    def search(self, values: np.ndarray, repeats: Any) -> float:
        """The log decay with the lowest cross-validated loss, for networks of all images."""
        cuts = {r: Splits(self.count, self.config, self.seed + 1000 * r) for r in repeats}

        def cross_validated(value: float) -> float:
            each = [self.held_out(self.in_splits(value), TENSOR, s, r) for r, s in cuts.items()]
            return float(np.mean(each))

        return float(values[np.argmin([cross_validated(float(v)) for v in values])])

    def tune(self, granularity: str, first: float, spreads: Any) -> jax.Array:
        """Log decays of each spread and split, for the images that train there."""
        strengths = jnp.asarray([strength(s, self.count) for s in spreads])
        folds = self.at(self.splits.train), self.at(self.splits.valid)
        start = self.shared(first - math.log(self.inner))
        tuner = _tuner(self.config, self.inputs)
        keys = jax.random.split(self.key(0), self.splits.train.shape[:2])
        return tuner(keys, start, self.places(granularity), strengths, folds)

    def held_out(self, lam: Any, granularity: str, splits: Splits, repeat: int) -> np.ndarray:
        """Losses of the guarded images of each split, by networks trained on all others."""
        place = self.places(granularity)
        decays = jax.vmap(lambda one: problem.spread_out(one, place))(lam)
        parts = self.at(splits.others), self.at(splits.guard)
        keys = jax.random.split(self.key(repeat), len(lam))
        losses, _ = _fit(self.config, self.inputs)[0](keys, decays, *parts)
        return np.asarray(losses)

    def judge(self, arm: str, lam: Any, granularity: str, cost: float, **told: Any) -> None:
        """Fresh networks, trained from scratch on all images, read the test part."""
        keys = jax.random.split(jax.random.key(7919 + self.seed), self.config.fresh)
        decays = problem.spread_out(lam, self.places(granularity))
        losses, errors = _fit(self.config, self.inputs)[1](keys, decays, self.fitted, self.test)
        told["deviation"] = float(np.std(np.concatenate([x.ravel() for x in decays.values()])))
        told |= {"test_loss": float(jnp.mean(losses)), "test_error": float(jnp.mean(errors))}
        self.records.append(f"{self.name}_{arm}", 0, cost, **told)

    def in_splits(self, value: float) -> jax.Array:
        """A shared log decay of all images, as the fewer images of a split need it."""
        fewer = value - math.log(self.outer)
        return jnp.stack([self.shared(fewer)] * self.config.splits)

    def averaged(self, lam: jax.Array) -> jax.Array:
        """The mean over the splits, for networks of all images."""
        return jnp.mean(lam, 0) + math.log(self.inner)

    def shared(self, value: float) -> jax.Array:
        """The same log decay for all weights."""
        weights = self.inputs * self.config.hidden + self.config.hidden * (problem.CLASSES + 1)
        return jnp.full(weights + problem.CLASSES, value)

    def places(self, granularity: str) -> Any:
        """Of the log decays of this network."""
        return problem.places(granularity, self.inputs, self.config.hidden)

    def at(self, index: np.ndarray) -> Rows:
        """Some of the images."""
        return self.fitted[0][index], self.fitted[1][index]

    def key(self, repeat: int) -> jax.Array:
        """Networks of one repeat begin from these random numbers."""
        return jax.random.key(self.seed + 1000 * repeat)

    def searches(self, points: int) -> float:
        """Cost of trainings in every split, in gradients of all images."""
        return points * self.config.splits * self.outer * self.config.steps

    def choosing(self) -> float:
        """Cost of all candidates, sharing among them, likewise."""
        spreads, levels = len(self.config.spreads), len(self.config.levels)
        return self.tunings(spreads) + self.searches(1 + spreads * levels)

    def tunings(self, strengths: int) -> float:
        """Cost of hypergradients in every split and fold, likewise."""
        c = self.config
        outer = budget.weight(1, c.folds - 1)
        each = budget.training(c.inner_steps).plus(budget.implicit_hypergradient(c.products, outer))
        steps = c.steps + strengths * c.rounds * each.total
        return c.splits * c.folds * self.inner * steps


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Test losses and errors over those of one searched decay, draw by draw."""
    names = sorted({r.method.removesuffix("_one") for r in records if r.method.endswith("_one")})
    told: dict[str, Any] = {}
    arms = [TENSOR, *(f"{g}_{a}" for g in problem.GRANULARITY for a in ("none", "chosen"))]
    for metric in ("test_loss", "test_error"):
        ratios = {
            (name, arm): expected.paired(
                records, metric, f"{name}_{arm}", f"{name}_one", ratio=True
            )
            for name in names
            for arm in arms
        }
        for (name, arm), ratio in ratios.items():
            told.setdefault(f"{name}_{arm}_over_one", {})[metric] = ratio
        for kind in ("none", "chosen"):
            mine = [r for (_, arm), r in ratios.items() if arm.endswith(f"_{kind}")]
            counts = {
                "worse": sum(r["low"] > 1 for r in mine),
                "better": sum(r["high"] < 1 for r in mine),
            }
            told.setdefault(f"{kind}_against_one", {}).update(
                {f"{metric}_{k}": expected.statistics([float(v)]) for k, v in counts.items()}
            )
    return told
