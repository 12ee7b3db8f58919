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
    """Indices: in each split of the images one part tests, one validates and the rest train."""

    def __init__(self, count: int, parts: int, seed: int):
        # Parts of one size, so that all splits are one `vmap`; a few images are left over.
        order = np.random.default_rng(seed).permutation(count)[: count // parts * parts]
        part = order.reshape(parts, -1)
        at = [np.roll(np.arange(parts), -k) for k in range(parts)]
        self.guard = part
        self.valid = np.stack([part[k[1]] for k in at])
        self.train = np.stack([np.concatenate(part[k[2:]]) for k in at])
        self.both = np.concatenate([self.valid, self.train], 1)


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
    """`(keys, start, places, strengths, parts) -> log decays`, of all strengths and splits.

    One program for decays per feature, unit and weight: as many as there are weights, some unused.
    """

    @jax.jit
    def tune(keys: jax.Array, start: jax.Array, place: Any, strengths: Any, parts: Any) -> Any:
        def of_split(key: jax.Array, parts: Any) -> Any:
            params = problem.initial(key, inputs, config.hidden)
            params = problem.train(params, problem.spread_out(start, place), parts[0], config)

            def of_strength(strength: jax.Array) -> Any:
                prior = HyperPrior(start, strength, "all")
                return problem.tune(params, start, place, prior, parts, config)

            return jax.vmap(of_strength)(strengths)

        return jax.vmap(of_split, out_axes=1)(keys, parts)

    return tune


class Draw:
    """One set and draw: searches, tunes, chooses, and judges by networks trained from scratch."""

    def __init__(self, name: str, fitted: Rows, test: Rows, config: Config, records: Any):
        self.name, self.fitted, self.test = name, fitted, test
        self.config, self.records = config, records
        self.count, self.inputs = fitted[0].shape
        self.seed = records.seed
        self.splits = Splits(self.count, config.splits, self.seed)
        self.used = 1 - 2 / config.splits  # share of the images that train while decays move

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
        tuned = searched + self.tunings(1)
        # Of four decays the strength is no question.
        lam = self.tune(TENSOR, first, spreads)
        self.judge(TENSOR, self.averaged(lam[-1]), TENSOR, tuned)
        for granularity in problem.GRANULARITY:
            lam = self.tune(granularity, first, spreads)
            for mine, spread in zip(lam, spreads, strict=True):
                arm = f"{granularity}_{name_of(spread)}"
                self.judge(arm, self.averaged(mine), granularity, tuned)
            self.choose(granularity, first, lam, searched)

    def choose(self, granularity: str, first: float, lam: Any, searched: float) -> None:
        """The strength, or sharing, by images that neither trained nor validated."""
        spreads = self.config.spreads
        of = {strength(s, self.count): k for k, s in enumerate(spreads)}
        whole = {tuple(index.tolist()): k for k, index in enumerate(self.splits.both)}
        held: dict[float, np.ndarray] = {}

        def tune(prior: HyperPrior, train: np.ndarray) -> Any:
            # The networks of all splits are trained at once; the first split that asks pays.
            if prior.strength not in held:
                if math.isinf(prior.strength):
                    found = self.in_splits(first)
                else:
                    shift = math.log(self.used / (1 - 1 / self.config.splits))
                    found = lam[of[prior.strength]] + shift
                # Other networks than those beside which the decays were tuned.
                held[prior.strength] = self.held_out(found, granularity, self.splits, OTHER)
            return held[prior.strength][whole[tuple(train.tolist())]]

        choice = choose_strength(
            HyperPrior(jnp.zeros(1), 1.0, "all"), tune, lambda losses, _: losses,
            list(zip(self.splits.both, self.splits.guard, strict=True)),
            strengths=(*of, math.inf), rule="clearly_better", errors=self.config.errors,
        )  # fmt: skip
        told = {"gains": choice.gains.tolist(), "gain_errors": choice.gain_errors.tolist()}
        if math.isinf(choice.strength):
            found, told["spread"] = self.shared(first), 0.0
        else:
            k = of[choice.strength]
            found, told["spread"] = self.averaged(lam[k]), spreads[k]
        cost = searched + self.tunings(len(spreads)) + self.searches(1 + len(spreads))
        self.judge(f"{granularity}_chosen", found, granularity, cost, **told)

    def search(self, values: np.ndarray, repeats: Any) -> float:
        """The log decay with the lowest cross-validated loss, for networks of all images."""
        cuts = {r: Splits(self.count, self.config.splits, self.seed + 1000 * r) for r in repeats}

        def cross_validated(value: float) -> float:
            each = [self.held_out(self.in_splits(value), TENSOR, s, r) for r, s in cuts.items()]
            return float(np.mean(each))

        return float(values[np.argmin([cross_validated(float(v)) for v in values])])

    def tune(self, granularity: str, first: float, spreads: Any) -> jax.Array:
        """Log decays of each spread and split, for the images that train there."""
        strengths = jnp.asarray([strength(s, self.count) for s in spreads])
        parts = self.at(self.splits.train), self.at(self.splits.valid)
        start = self.shared(first - math.log(self.used))
        tuner = _tuner(self.config, self.inputs)
        return tuner(self.keys(0), start, self.places(granularity), strengths, parts)

    def held_out(self, lam: Any, granularity: str, splits: Splits, repeat: int) -> np.ndarray:
        """Losses of the guarded images of each split, by networks trained on all others."""
        place = self.places(granularity)
        decays = jax.vmap(lambda one: problem.spread_out(one, place))(lam)
        parts = self.at(splits.both), self.at(splits.guard)
        losses, _ = _fit(self.config, self.inputs)[0](self.keys(repeat), decays, *parts)
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
        fewer = value - math.log(1 - 1 / self.config.splits)
        return jnp.stack([self.shared(fewer)] * self.config.splits)

    def averaged(self, lam: jax.Array) -> jax.Array:
        """The mean over the splits, for networks of all images."""
        return jnp.mean(lam, 0) + math.log(self.used)

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

    def keys(self, repeat: int) -> jax.Array:
        """Of the networks of the splits: the same for all."""
        key = jax.random.key(self.seed + 1000 * repeat)
        return jnp.stack([key] * self.config.splits)

    def searches(self, points: int) -> float:
        """Cost of trainings in every split, in gradients of all images."""
        return points * (self.config.splits - 1) * self.config.steps

    def tunings(self, strengths: int) -> float:
        """Cost of hypergradients in every split, likewise."""
        c = self.config
        outer = budget.weight(1, c.splits - 2)
        each = budget.training(c.inner_steps).plus(budget.implicit_hypergradient(c.products, outer))
        steps = c.steps + strengths * c.rounds * each.total
        return c.splits * self.used * steps


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
