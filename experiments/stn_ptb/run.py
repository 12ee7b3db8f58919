"""Runs `stn_ptb`: a self-tuning LSTM, its schedule replayed, and fixed values beside them.

Two parts: seven hyperparameters from one starting point (here), and one from five (`starts.py`).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import baselines, budget, expected, record
from experiments.lstm import corpus
from experiments.stn_ptb import problem, starts, starts_summary
from experiments.stn_ptb.config import Config

TABLE = (
    "validation_perplexity",
    "test_perplexity",
    "validation_loss",
    "test_loss",
    "spread",
    "loss_spread",
)


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All methods on one seed; what a resumed run had finished is skipped."""
    records = record.Records(out, seed)
    text = corpus.load(config.corpus, config.words, config.sizes)
    parts = {
        "train": jnp.asarray(text.train),
        "valid": jnp.asarray(text.validation),
        **{
            f"{part}_streams": jnp.asarray(corpus.streams(getattr(text, part), config.eval_batch))
            for part in ("train", "validation", "test")
        },
    }
    bench = Bench(config, seed, text.words, parts, records)
    schedule = bench.tune()
    # Equal costs: a plain network makes more steps than the tuned one, and holds the last value
    # after the end of the schedule.
    bench.train("replay", schedule)
    bench.train("final_value", bench.constant(jax.tree.map(lambda x: x[-1], schedule.values)))
    for rate in config.grid:
        bench.train(f"grid_{round(100 * rate):02d}", bench.constant(problem.hparams(rate, 1e-6)))
    bench.search()
    starts.run(config.starts, seed, records)


def summary(records: list[record.Record]) -> dict[str, Any]:
    """The best of each part's grid as a method of its own, chosen by its mean over seeds."""
    chosen = best_grid(records)
    statistics = expected.summarise(r for r in records if r.method == chosen)
    return {"best_grid": statistics[chosen], **starts_summary.summary(records)}


def best_grid(records: list[record.Record]) -> str:
    """The grid point with the lowest mean validation perplexity."""
    grid: dict[str, list[float]] = {}
    for (method, _), last in record.final(records).items():
        if method.startswith("grid_"):
            grid.setdefault(method, []).append(last.metrics["validation_perplexity"])
    return min(grid, key=lambda method: float(np.mean(grid[method])))


@functools.cache
def cycle_cost(config: Config) -> float:
    """G of the training steps of a cycle and of its validation step."""
    network, _ = problem.build(config, 2, jax.random.key(0))  # any vocabulary counts alike
    return budget.self_tuning(network, config.inner_steps).total


def cycles(config: Config) -> int:
    """As many as the budget pays."""
    return int(config.budget // cycle_cost(config))


class Bench:
    """One seed: its data, first weights, and records."""

    def __init__(self, config: Config, seed: int, words: int, parts: Any, records: record.Records):
        self.config, self.seed, self.parts, self.records = config, seed, parts, records
        self.key = jax.random.key(seed)
        self.words = words

    def constant(self, hparams: Any) -> bilevel.HyperSchedule:
        """No change, as long as a schedule that was found: both are then one program."""
        count = cycles(self.config)
        values = jax.tree.map(lambda x: jnp.full(count, x, jnp.float32), hparams)
        return bilevel.HyperSchedule(self.config.inner_steps * jnp.arange(count), values)

    def _begin(self, method: str, last: int) -> bool:
        done = record.read(self.records.out, seed=self.seed, method=method)
        if done and done[-1].step == last:
            return False
        self.records.rewind(method)
        return True

    def tune(self) -> bilevel.HyperSchedule:
        """Self-tuning; returns the schedule that training steps can replay."""
        config, total = self.config, cycles(self.config)
        path = self.records.out / "arrays" / f"schedule_{self.seed}.npz"
        like = problem.hparams(config.start, config.penalty)
        if not self._begin("stn", total):
            if path.exists():
                return bilevel.HyperSchedule.load(path, like)
            self.records.rewind("stn")  # killed between its last record and its schedule
        pieces = compiled(config, self.words)
        _, params = problem.build(config, self.words, jax.random.fold_in(self.key, 1))
        state = pieces.algorithm.init(params, like, key=jax.random.fold_in(self.key, 2))
        infos = []

        def advance(state: Any, length: int, lr: float) -> Any:
            state, info = pieces.tune(with_rates(state, lr), self.parts, self.key, length)
            infos.append(jax.tree.map(np.asarray, info))
            return state

        self._follow(
            "stn",
            state,
            total,
            cycle_cost(config),
            advance,
            pieces.algorithm.deploy,
            lambda state: state.hparams,
        )
        values = jax.tree.map(lambda *x: jnp.concatenate(x), *(info.hparams for info in infos))
        schedule = bilevel.HyperSchedule(config.inner_steps * jnp.arange(total), values)
        path.parent.mkdir(parents=True, exist_ok=True)
        schedule.save(path)
        return schedule

    def train(
        self, method: str, schedule: bilevel.HyperSchedule, budget: float | None = None
    ) -> float:
        """Plain training with the hyperparameters of a schedule; the best validation loss."""
        config = self.config
        total = int(config.budget if budget is None else budget)
        if not self._begin(method, total):
            last = record.read(self.records.out, seed=self.seed, method=method)[-1]
            return last.metrics["best_loss"]
        pieces = compiled(config, self.words)
        _, params = problem.build(config, self.words, jax.random.fold_in(self.key, 1))
        state = (params, pieces.tx.init(params), jnp.zeros((), jnp.int32))

        def advance(state: Any, length: int, lr: float) -> Any:
            state = (state[0], _rate(state[1], lr), state[2])
            return pieces.train(state, schedule, self.parts, self.key, length)

        def plain(state: Any) -> Any:
            return pieces.network.plain(pieces.still, state[0])

        return self._follow(method, state, total, 1, advance, plain, lambda state: None)

    def search(self) -> None:
        """Random search over all seven; its networks share the budget of one tuning run."""
        config = self.config
        each = config.budget // config.trials
        method = "random_search"
        if not self._begin(method, config.trials):
            return
        space = {name: (0.0, 0.8) for name in problem.RATES}
        space |= {name: (-7.0, 1.0) for name in problem.PENALTIES}
        best: dict[str, Any] = {"best_loss": np.inf}

        def objective(setting: dict[str, Any]) -> float:
            values = {
                name: jnp.float32(np.exp(x) if name in problem.PENALTIES else x)
                for name, x in setting.items()
            }
            return self.train(f"trial_{len(done)}", self.constant(values), each)

        def log(trial: baselines.Trial) -> None:
            done.append(trial.value)
            name = f"trial_{trial.number}"
            last = record.read(self.records.out, seed=self.seed, method=name)[-1]
            if last.metrics["best_loss"] < best["best_loss"]:
                best.update(last.metrics)
            self.records.append(method, trial.number + 1, trial.cost, **best)

        done: list[float] = []
        baselines.search(
            objective,
            space,
            budget=config.budget,
            cost=each,
            sampler="random",
            seed=self.seed,
            log=log,
        )

    def _follow(
        self,
        method: str,
        state: Any,
        total: int,
        cost: float,
        advance: Any,
        weights_of: Any,
        hparams_of: Any,
    ) -> float:
        """Stretches of a run, a measurement after each; the step size falls when it stalls."""
        config, pieces = self.config, compiled(self.config, self.words)
        ends = [round(total * (i + 1) / config.points) for i in range(config.points)]
        best, best_loss, best_cost, losses, lr = None, np.inf, 0.0, [], config.lr
        for i, end in enumerate(ends):
            state = advance(state, end - (ends[i - 1] if i else 0), lr)
            weights = weights_of(state)
            losses.append(float(pieces.measure(weights, self.parts["validation_streams"])))
            if losses[-1] < best_loss:
                best, best_loss, best_cost = weights, losses[-1], cost * end
            elif losses.index(min(losses)) < len(losses) - config.patience:
                # Fall, and wait as long again before the next fall.
                lr, losses = lr * config.shrink, losses[-1:]
            metrics: dict[str, Any] = {}
            if end == total:
                for part in ("validation", "test", "train"):
                    loss = float(pieces.measure(best, self.parts[f"{part}_streams"]))
                    metrics[f"{part}_perplexity"] = float(np.exp(loss))
                metrics["best_cost"] = best_cost
            for name, value in (hparams_of(state) or {}).items():
                metrics[f"h_{name}"] = float(value)
            self.records.append(
                method,
                end,
                cost * end,
                now_perplexity=float(np.exp(losses[-1])),
                best_perplexity=float(np.exp(best_loss)),
                best_loss=best_loss,
                lr=lr,
                **metrics,
            )
        return best_loss


def _rate(opt_state: Any, lr: float) -> Any:
    rate = opt_state.hyperparams["learning_rate"]
    return opt_state._replace(hyperparams={"learning_rate": jnp.full_like(rate, lr)})


def with_rates(state: Any, lr: float) -> Any:
    """A tuning state with another step size of weights and response."""
    trained = jax.tree.map(
        lambda part: part._replace(opt_state=_rate(part.opt_state, lr)),
        state.trained,
        is_leaf=lambda part: part is not state.trained,
    )
    return state._replace(trained=trained)


class Pieces:
    """What is compiled once for all seeds and methods."""

    def __init__(self, config: Config, words: int):
        # The graph and the shapes of the network; its weights are those of a seed.
        self.network, params = problem.build(config, words, jax.random.key(0))
        outer, inner = problem.losses(self.network)
        self.tx = optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                optax.clip_by_global_norm(config.clip), optax.adam(learning_rate)
            )
        )(learning_rate=config.lr)
        count = cycles(config)
        self.algorithm = bilevel.self_tuning(
            outer,
            inner,
            self.tx,
            optax.adam(config.outer_lr),
            config.inner_steps,
            network=self.network,
            scale=config.scale,
            tune_scales=False,
            shared=tuple(f"'{name}'" for name in problem.SHARED),
            constrain=problem.space(config),
            warm_up=round(config.warm_up * count),
        )
        zero = self.network.init(
            jax.random.key(0), params, problem.hparams(config.start, config.penalty)
        )
        self.still = jax.tree.map(jnp.zeros_like, zero)  # a response that plain weights ignore

        def windows(ids: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> dict[str, Any]:
            width = config.context + config.steps
            place_key, noise = jax.random.split(key)
            starts = jax.random.randint(place_key, shape, 0, ids.shape[0] - width)
            text = ids[starts[..., None] + jnp.arange(width + 1)]
            noise = jax.random.split(noise, shape[:-1]) if len(shape) > 1 else noise
            return {"x": text[..., :-1], "y": text[..., config.context + 1 :], "key": noise}

        def tune(state: Any, parts: Any, key: Any, length: int) -> Any:
            def body(state: Any, _: None) -> Any:
                keys = jax.random.split(jax.random.fold_in(key, state.step), 3)
                return self.algorithm.step(
                    state,
                    inner_batches=windows(
                        parts["train"], keys[0], (config.inner_steps, config.batch)
                    ),
                    outer_batch=windows(parts["valid"], keys[1], (config.batch,)),
                    key=keys[2],
                )

            return jax.lax.scan(body, state, None, length=length)

        def train(state: Any, schedule: Any, parts: Any, key: Any, length: Any) -> Any:
            def loss(params: Any, hparams: Any, batch: Any) -> jax.Array:
                return inner(self.network.plain(self.still, params), hparams, batch)

            def body(_: Any, carry: Any) -> Any:
                params, opt_state, step = carry
                batch = windows(parts["train"], jax.random.fold_in(key, step), (config.batch,))
                grads = jax.grad(loss)(params, schedule(step), batch)
                updates, opt_state = self.tx.update(grads, opt_state, params)
                return optax.apply_updates(params, updates), opt_state, step + 1

            # A traced length: stretches of all lengths are one program.
            return jax.lax.fori_loop(0, length, body, state)

        def measure(weights: Any, stream: jax.Array) -> jax.Array:
            model, d = self.network.merge(weights)
            t, count = config.steps, (stream.shape[1] - 1) // config.steps

            def body(carry: Any, i: jax.Array) -> Any:
                cut = jax.lax.dynamic_slice_in_dim(stream, i * t, t + 1, axis=1)
                logits, carry, _, _ = model(cut[:, :-1], carry, d=d)
                return carry, problem.cross_entropy(logits, cut[:, 1:])

            carry = problem.zero_carry(stream.shape[0], config.units)
            return jax.lax.scan(body, carry, jnp.arange(count))[1].mean()

        self.tune = jax.jit(tune, static_argnames="length")
        self.train = jax.jit(train)
        self.measure = jax.jit(measure)


@functools.cache
def compiled(config: Config, words: int) -> Pieces:
    """The pieces, made once."""
    return Pieces(config, words)
