"""The solvers of the public benchmark beside our loops on our three problems: which is first?

    python -m experiments.solvers.referee CHECKOUT OUT [PROBLEM ...]

`CHECKOUT` is a checkout of `benchopt/benchmark_bilevel`; benchopt must be installed. Its solvers
run unchanged, on its own base classes and samplers, from the starting points, on the losses and for
the budgets of `run.py`; both step sizes are found on seed 100 by the search of `tune.py`, which
tries the pair that the benchmark found for its own problem of that name as well. Our loops run on
the same seeds. Written are records, with its solvers as `PROBLEM_public_SOLVER`, the step sizes
found, and `referee.json`, with both and what `run.summary` makes of the records. What an earlier
call has finished is not run again.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.flatten_util import ravel_pytree

from bilevel.ground.cost import PRODUCT
from experiments.common import record
from experiments.solvers import run, tune
from experiments.solvers.config import Config, cpu
from experiments.solvers.problem import Problem, cached, everything
from experiments.solvers.steps import sizes

SEEDS = (0, 1, 2)
TERMS = 4.5  # products of its randomly truncated series of at most ten, on average
PERIOD = 0.01  # of VRBO, in its units: what its own search found for ijcnn1
SEARCH: dict[str, Any] = {  # nine pairs where a run of the search takes long, as for our loops
    "covtype": {
        "rates": (0.01, 0.03, 0.1), "outer": (100.0, 1e3, 1e4), "grown": 1, "kept": 2,
    },
}  # fmt: skip
# What the benchmark's own search found for its problems of these names, as pairs like ours.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "ijcnn1": {
        "mrbo": (0.5, 15.8), "vrbo": (0.0625, 0.0625), "pzobo": (0.5, 1.58),
        "fsla": (0.03125, 3.125), "sustain": (0.5, 5.0), "ttsa": (0.5, 15.8), "bsa": (0.5, 50.0),
    },
    "covtype": {
        "mrbo": (1.0, 100.0), "vrbo": (0.25, 25.0), "pzobo": (0.25, 25.0), "fsla": (1.0, 100.0),
        "sustain": (0.5, 50.0), "ttsa": (0.5, 50.0), "bsa": (0.5, 50.0),
    },
    "quadratic": {"mrbo": (0.1, 1.0), "vrbo": (0.1, 0.1), "f2sa": (0.1, 0.1)},
}  # fmt: skip
PAIRS = "step_sizes.json"
MARK = "public_"  # before the names of its solvers, in records


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver of the benchmark.

    Attributes:
      name: of its module, which holds one class, `Solver`.
      cost: inner gradients of one batch that a step costs, of `(batches, outer batches)`; a product
        counts as in our loops.
      whole: it reads all data in every step, and is driven from Python.
      settings: other than step sizes.
    """

    name: str
    cost: Callable[[int, int], float]
    whole: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


def _vrbo(inner: int, outer: int) -> float:
    period = max(1, int((inner + outer) * PERIOD))
    full = (1 + 11 * PRODUCT) * inner + outer
    return 10 * 2 * (1 + 11 * PRODUCT + 1) + full / period


SOLVERS = (
    Solver("sustain", lambda n, m: 2 * (1 + (TERMS + 1) * PRODUCT + 1)),
    Solver("ttsa", lambda n, m: 1 + (TERMS + 1) * PRODUCT + 1),
    Solver("bsa", lambda n, m: 10 + (TERMS + 1) * PRODUCT + 1),
    Solver("vrbo", _vrbo, settings=(("period_frac", PERIOD),)),
    Solver("f2sa", lambda n, m: 10 * 3 + 3),
    Solver("bome", lambda n, m: 12 * n + m, whole=True),
    Solver("pzobo", lambda n, m: 11 * 10 * n + m, whole=True),
    Solver("mrbo", lambda n, m: 2 * (1 + 11 * PRODUCT + 1)),
    Solver("fsla", lambda n, m: 3 + 2 * PRODUCT + 2),
)


def losses(problem: Problem) -> tuple[Any, Any, Any, Any]:
    """The benchmark's form of both losses, of flat parameters, and the numbers of examples."""
    _, whole = ravel_pytree(problem.params)

    def cut(loss: Any, batches: Any) -> Any:
        data = everything(batches)

        def value(w: Any, lam: Any, start: Any = 0, batch_size: int = 1) -> jax.Array:
            def leaf(x: Any) -> Any:
                return jax.lax.dynamic_slice_in_dim(x, start, batch_size)

            return loss(whole(w), lam, jax.tree.map(leaf, data))

        return value

    counts = (jax.tree.leaves(everything(x))[0].shape[0] for x in (problem.train, problem.valid))
    return cut(problem.inner, problem.train), cut(problem.outer, problem.valid), *counts


@functools.cache
def made(solver: Solver, name: str, config: Config) -> Any:
    """An instance on a problem: its compiled steps serve every seed and step size."""
    base = importlib.import_module(f"solvers.{solver.name}").Solver

    def compiled(self: Any, inner_sampler: Any, outer_sampler: Any) -> Any:
        step = self.get_step(inner_sampler, outer_sampler)

        def steps(carry: Any, begin: Any, end: Any) -> Any:
            return jax.lax.fori_loop(begin, end, lambda t, carry: step(carry, t)[0], carry)

        return jax.jit(steps)

    # Without the benchmark's warm-up, which makes steps, and with loops of any length.
    changed = {"run_once": lambda self, *_: None, "get_one_epoch_jitted": compiled}
    settings = dict(solver.settings)
    if not solver.whole:
        settings |= {"batch_size": config.batch}
    one = type("Solver", (base,), changed).get_instance(**settings)
    problem = cached(name, config.batch)
    f_inner, f_outer, inner, outer = losses(problem)
    one.init_keys = functools.partial(_keys, one)
    one.set_objective(
        f_inner=f_inner, f_outer=f_outer, n_inner_samples=inner, n_outer_samples=outer,
        inner_var0=ravel_pytree(problem.params)[0], outer_var0=problem.hparams,
    )  # fmt: skip
    return one


def _keys(one: Any, seed: int) -> None:
    """Its samplers as they begin with a seed, as `set_objective` makes them."""
    inner, outer = jax.random.split(jax.random.PRNGKey(seed), 2)
    for name, key in (("state_inner_sampler", inner), ("state_outer_sampler", outer)):
        setattr(one, name, getattr(one, name) | {"key": key})


def follow(
    config: Config, name: str, solver: Solver, seed: int, rates: tuple[float, float],
    stops: list[int],
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """`(step, hyperparameters)` at the start and at each stop."""
    one = made(solver, name, config)
    one.step_size, one.outer_ratio, one.random_state = rates[0], rates[0] / rates[1], seed
    yield 0, one.outer_var0
    if solver.whole:
        yield from _driven(one, stops)
        return
    one.init_keys(seed)
    carry, before = one.init(), 0
    for stop in stops:
        carry, before = one.one_epoch(carry, before, stop), stop
        yield stop, carry["outer_var"]


def _driven(one: Any, stops: list[int]) -> list[tuple[int, Any]]:
    seen, count = [], 0

    def callback() -> bool:
        nonlocal count
        if count in stops:
            seen.append((count, one.outer_var))
        count += 1
        return count <= max(stops)

    one.run(callback)
    return seen


def reach(solver: Solver, name: str) -> tune.Reach:
    """What a pair of step sizes reaches, for the search."""
    config = cpu()

    def steps(seed: int, pair: tuple[float, float], stops: list[int]) -> Iterator[Any]:
        return follow(config, name, solver, seed, pair, stops)

    return functools.partial(tune.reached, name, cost(solver, name, config), steps)


def cost(solver: Solver, name: str, config: Config) -> float:
    """Of a step, in inner gradients of one batch."""
    return float(solver.cost(*sizes(cached(name, config.batch))))


def compare(config: Config, name: str, solver: Solver, seed: int, rates: Any, out: Path) -> None:
    """One run of one solver, recorded as those of our loops are."""
    problem, each = cached(name, config.batch), cost(solver, name, config)
    budget = dict(zip(config.problems, config.budget, strict=True))[name]
    stops = sorted(set(run.marks(max(1, int(budget / each)), config.points)))
    records = record.Records(out, seed)
    first = run.at_start(name, config.batch)
    for step, hparams in follow(config, name, solver, seed, rates, stops):
        size = first if step == 0 else run.squared(problem, hparams)
        records.append(
            f"{name}_{MARK}{solver.name}", step, step * each, gradient=size, relative=size / first
        )


def ours(config: Config, name: str, out: Path) -> None:
    """Our loops on the same problem and seeds, into the same records."""
    budget = dict(zip(config.problems, config.budget, strict=True))[name]
    only = dataclasses.replace(config, problems=(name,), budget=(budget,), timed=0.0)
    for seed in SEEDS:
        run.run(only, seed, out, resume=True)


def public(config: Config, name: str, solver: Solver, out: Path) -> None:
    """Search and runs of one of its solvers, as far as they are not in the records yet."""
    label, path = f"{name}_{solver.name}", out / PAIRS
    pairs = record.read_json(path) if path.exists() else {}
    if label not in pairs:
        known = PUBLISHED.get(name, {}).get(solver.name)
        more, search = (known,) if known else (), SEARCH.get(name, {})
        pairs[label], worst = tune.tune(reach(solver, name), more=more, **search)
        record.write_json(path, pairs)
        sys.stdout.write(f"{label} {pairs[label]} {worst:.2e}\n")
        sys.stdout.flush()
    done = {r.seed for r in record.read(out, method=f"{name}_{MARK}{solver.name}")}
    for seed in SEEDS:
        if seed not in done:
            compare(config, name, solver, seed, tuple(pairs[label]), out)


def main(checkout: str, out: Path, names: list[str]) -> None:
    """Search and runs of all its solvers, and runs of our loops."""
    sys.path.insert(0, checkout)
    config = cpu()
    for name in names or config.problems:
        for solver in SOLVERS:
            public(config, name, solver, out)
        ours(config, name, out)
    told = {"step_sizes": record.read_json(out / PAIRS), **run.summary(record.read(out))}
    record.write_json(out / "referee.json", told)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
