"""The second part of `stn_ptb`: one dropout rate, self-tuned from five starting points."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from experiments.common import baselines, record
from experiments.lstm import corpus
from experiments.stn_ptb import starts_problem as problem
from experiments.stn_ptb import starts_train as train
from experiments.stn_ptb.config import Starts

TUNED = ("stn", "delta_stn")
BLACK_BOX = {"random_search": "random", "tpe": "tpe"}
# Streams of random numbers: methods share the first weights, and nothing else.
STREAMS = ("stn", "delta_stn", "stn_replay", "delta_stn_replay", "grid", "random_search", "tpe")


def run(config: Starts, seed: int, records: record.Records) -> None:
    """All methods on one seed, each skipped if a resumed run had finished it."""
    part = Part(config, seed, records)
    for method in TUNED:
        part.tune(method)
        part.replay(method)
    part.grid()
    for method in BLACK_BOX:
        part.search(method)


class Part:
    """One seed: its data, first weights, and records."""

    def __init__(self, config: Starts, seed: int, records: record.Records):
        self.config, self.records = config, records
        text = corpus.load(config.corpus, config.words, config.sizes)
        self.words = text.words
        self.sets = {
            "train": jnp.asarray(text.train),
            "valid": jnp.asarray(text.validation),
            "valid_streams": jnp.asarray(corpus.streams(text.validation, config.eval_batch)),
            "test_streams": jnp.asarray(corpus.streams(text.test, config.eval_batch)),
        }
        self.key = jax.random.fold_in(jax.random.key(seed), 100)
        self.params = problem.build(config, self.words, True, self.key)[1]

    def _keys(self, stream: str, count: int) -> jax.Array:
        return jax.random.split(jax.random.fold_in(self.key, STREAMS.index(stream)), count)

    def _append(self, name: str, i: int, cost: float, losses: Any, test: Any, **more: Any) -> None:
        """The i-th point of runs side by side: what each has reached, and the mean."""
        best = np.minimum.accumulate(np.asarray(losses), axis=1)[:, i]
        if i == self.config.points - 1:
            more = {"test_loss": float(np.mean(np.asarray(test))), **more}
        self.records.append(
            name,
            i,
            cost,
            validation_loss=float(best.mean()),
            losses=best,
            now=np.asarray(losses)[:, i],
            **more,
        )

    def tune(self, method: str) -> None:
        """A run from each start; the loss is the mean over them."""
        config, name = self.config, f"starts_{method}"
        if self.records.finished(name, config.points):
            return
        starts = jnp.asarray(config.starts)
        found, losses, test = train.tuned(method, config, self.words)(
            self.params, starts, self._keys(method, len(starts)), self.sets
        )
        found = np.asarray(found)
        record.save_arrays(self.records.out, f"{name}_{self.records.seed}", rates=found)
        every = found.shape[1] // config.points
        best = np.minimum.accumulate(np.asarray(losses), axis=1)
        for i in range(config.points):
            now = found[:, every * (i + 1) - 1]
            self._append(
                name,
                i,
                problem.cycle_cost(config, method) * every * (i + 1),
                losses,
                test,
                rates=now,
                mean_rate=float(now.mean()),
                spread=float(np.ptp(now) / np.ptp(config.starts)),
                loss_spread=float(np.ptp(best[:, i])),
            )

    def replay(self, method: str) -> None:
        """Plain networks that follow the schedules which the runs from each start found."""
        config, stream = self.config, f"{method}_replay"
        name = f"starts_{stream}"
        if self.records.finished(name, config.points):
            return
        found = record.load_arrays(self.records.out, f"starts_{method}_{self.records.seed}")
        every = config.inner_steps * found["rates"].shape[1] // config.points
        losses, test = self._train(found["rates"], every, self._keys(stream, len(found["rates"])))
        for i in range(config.points):
            self._append(name, i, every * (i + 1), losses, test)

    def grid(self) -> None:
        """Fixed rates, each trained for a whole budget."""
        config = self.config
        names = [f"starts_grid_{round(100 * rate):02d}" for rate in config.grid]
        if all([self.records.finished(name, config.points) for name in names]):
            return
        every = int(config.budget) // config.points
        keys = self._keys("grid", len(names))
        losses, test = self._train(np.asarray(config.grid)[:, None], every, keys)
        for k, (name, rate) in enumerate(zip(names, config.grid, strict=True)):
            self.records.rewind(name)
            for i in range(config.points):
                one = slice(k, k + 1)
                self._append(name, i, every * (i + 1), losses[one], test[one], rate=rate)

    def search(self, method: str) -> None:
        """Random search or TPE; each trial trains a network, and all share the budget."""
        config = self.config
        trials = config.tpe_trials if method == "tpe" else config.random_trials
        every = int(config.budget) // trials // config.points
        keys = self._keys(method, trials)

        def objective(setting: dict[str, Any], number: int) -> baselines.Tried:
            rates, key = np.asarray([[setting["rate"]]]), keys[number : number + 1]
            losses, test = self._train(rates, every, key)
            lowest = float(losses.min())
            return baselines.Tried(
                lowest, lambda: {"validation_loss": lowest, "test_loss": float(test[0])}
            )

        baselines.recorded(
            objective,
            {"rate": (0.0, config.top)},
            records=self.records,
            method=f"starts_{method}",
            trials=trials,
            cost=every * config.points,
            sampler=BLACK_BOX[method],
        )

    def _train(self, rates: np.ndarray, every: int, keys: jax.Array) -> Any:
        """Plain runs, a rate (n, k) for each cycle; the last is held from there on."""
        longest = max(problem.cycles(self.config, method) for method in TUNED)
        # Schedules of one length are one program.
        rates = np.pad(rates, ((0, 0), (0, longest - rates.shape[1])), "edge")
        steps = jnp.broadcast_to(self.config.inner_steps * jnp.arange(longest), rates.shape)
        schedules = bilevel.HyperSchedule(steps, problem.hparams(rates))
        train_all = train.trained(self.config, self.words)
        return train_all(self.params, schedules, every, keys, self.sets)
