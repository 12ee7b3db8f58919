"""The methods of `sparse` that solve with `bilevel.minimize`: hypergradients, grid, searches.

All start a solve from the solution at the nearest penalty known, and count what it evaluates.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from experiments.common import baselines
from experiments.common.budget import Cost
from experiments.sparse import problem
from experiments.sparse.config import Config
from experiments.sparse.tasks import Task, hparams_at, tolerance

Log = Callable[..., None]


class Found(NamedTuple):
    """The best point along a run, by the criterion that the run itself measured."""

    hparams: Any
    value: float
    params: jax.Array
    cost: float
    seconds: float
    evaluations: int


@functools.partial(jax.jit, static_argnames="max_steps")
def evaluate(
    params: jax.Array, hparams: Any, fit: Any, held: Any, tol: jax.Array, max_steps: int
) -> tuple[bilevel.Minimum, jax.Array]:
    """A solution at the penalties, and the criterion there."""
    inner = problem.training(fit["step_size"])
    found = bilevel.minimize(inner, params, hparams, fit, tol=tol, max_steps=max_steps)
    return found, problem.outer(found.params, hparams, held)


class Rprop(NamedTuple):
    """The last hypergradient and the lengths of the last moves, shaped like the penalties."""

    slopes: Any
    lengths: Any


def rprop(grads: Any, hparams: Any, state: Rprop, box: jax.Array, grow: float) -> Any:
    """One move of each log penalty by its own length, in the box; and how long the longest was.

    A length grows while the sign stays and shrinks where it turns (Riedmiller and Braun, 1993): to
    where a line through both slopes is zero, but to a tenth at least and to a half at most. A
    penalty that is at a bound and pushes outward halves its length, too.
    """

    def move(g: jax.Array, h: jax.Array, last: jax.Array, length: jax.Array) -> Any:
        agree, size = g * last, jnp.abs(g) + jnp.abs(last)
        turned = jnp.clip(jnp.abs(g) / jnp.where(size > 0, size, 1), 0.1, 0.5)
        length = length * jnp.where(agree < 0, turned, jnp.where(agree > 0, grow, 1.0))
        moved = jnp.clip(h - jnp.sign(g) * length, box[0], box[1])
        return moved, g, jnp.where(moved == h, length / 2, length)

    moves = jax.tree.map(move, grads, hparams, *state)
    moved, slopes, lengths = jax.tree.transpose(
        jax.tree.structure(hparams), jax.tree.structure((0, 0, 0)), moves
    )
    steps = jax.tree.map(lambda new, old: jnp.max(jnp.abs(new - old)), moved, hparams)
    return moved, Rprop(slopes, lengths), jnp.max(jnp.stack(jax.tree.leaves(steps)))


@functools.partial(jax.jit, static_argnames="config")
def outer_step(
    config: Config, point: Any, batches: Any, tol: jax.Array, box: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """A solve from where the last one ended, a hypergradient, one move of the penalties."""
    (params, hparams, state, carried), (fit, held) = point, batches
    response = bilevel.Implicit(bilevel.CG(max_steps=config.products, rtol=config.rtol))
    found, _ = evaluate(params, hparams, fit, held, tol, config.max_steps)
    hyper = bilevel.hypergrad_solve(
        problem.outer, problem.training(fit["step_size"]), response, found.params, hparams,
        inner_batch=fit, outer_batch=held, state=carried,
    )  # fmt: skip
    moved, state, longest = rprop(hyper.grads, hparams, state, box, config.grow)
    paid = response.cost(hparams, hyper.stats).plus(Cost(found.stats["num_gradients"], 0, 1))
    report = {
        "criterion": hyper.value,
        "longest": longest,
        "gradients": found.stats["num_gradients"],
        "products": paid.products,
        "cost": paid.total,
    }
    return (found.params, moved, state, hyper.state), report


def hypergradients(task: Task, config: Config, log: Log) -> Found:
    """Penalties moved along hypergradients: one for all first, then, where there are, many."""
    one = task if task.leaves["l1"] == () else task._replace(leaves={"l1": ()})
    found = _descend(one, config, log)
    return found if one is task else _descend(task, config, log, found)


def _descend(task: Task, config: Config, log: Log, start: Found | None = None) -> Found:
    """Rprop along hypergradients, solved the more exactly the shorter its moves have become.

    Signs are what Rprop reads of a hypergradient, and most of what loose solves must get right.
    Their criterion is not to be trusted, as weights that are still on the way generalize better:
    what counts as a result is a point solved to the tolerance of all methods. From ``start``, a
    result for one penalty, it goes on with many.
    """
    box = jnp.asarray([task.top + math.log(config.low), task.top + math.log(config.high)])
    params, cost, spent, number = jnp.zeros(task.shape), 0.0, 0.0, 0
    first, steps, loose = config.first_step, config.outer_steps, config.loose
    hparams = hparams_at(task, {"l1": math.log(config.start), "l2": math.log(config.start_l2)})
    if start is None:
        cost = Cost(products=problem.POWER).total
    else:
        params, cost, spent, number = start.params, start.cost, start.seconds, start.evaluations
        first, steps, loose = config.many_step, config.many_steps, config.tolerance
        hparams = hparams_at(task, {"l1": start.hparams["l1"] - task.top})
        start = start._replace(hparams=hparams)
    zeros = jax.tree.map(jnp.zeros_like, hparams)
    state = Rprop(zeros, jax.tree.map(lambda h: jnp.full_like(h, first), hparams))
    point = params, hparams, state, jnp.zeros(task.shape)
    batches = task.fit, task.held
    outer_step(config, point, batches, jnp.float32(jnp.inf), box)  # compiled before it is timed
    tol, best, clock = loose, start, _now()
    for step in range(steps):
        used = point[1]
        point, report = outer_step(config, point, batches, tolerance(task, tol), box)
        told = {name: float(x) for name, x in report.items()}
        cost, longest = cost + told.pop("cost"), told.pop("longest")
        exact = tol == config.tolerance
        log(number, cost, seconds=spent + _now() - clock, counts=exact, **told)
        number += 1
        if exact and (best is None or told["criterion"] < best.value):
            best = Found(used, told["criterion"], point[0], cost, 0.0, 0)
        tol = max(config.tolerance, loose * min(1.0, longest / first))
        if longest < config.least_step:
            if exact:
                break
            tol = config.tolerance
        elif step == steps - 2:
            tol = config.tolerance  # whatever the moves: one point must count
    if best is None:
        raise ValueError("`outer_steps` must be at least 2")
    return best._replace(cost=cost, seconds=spent + _now() - clock, evaluations=number)


_now = time.perf_counter


class Warm:
    """Solves at penalties in any order, each from the solution nearest in log penalty."""

    def __init__(self, task: Task, config: Config, log: Log):
        self.task, self.config, self.log = task, config, log
        self.points: list[np.ndarray] = []
        self.solutions: list[jax.Array] = []
        self.best: Found | None = None
        self.cost = Cost(products=problem.POWER).total
        zeros = jnp.zeros(task.shape)
        hparams = hparams_at(task, dict.fromkeys(task.leaves, 0.0))
        evaluate(zeros, hparams, task.fit, task.held, jnp.float32(jnp.inf), config.max_steps)
        self.clock = _now()

    def __call__(self, value: dict[str, Any]) -> float:
        """The criterion at penalties relative to the top."""
        task, hparams = self.task, hparams_at(self.task, value)
        point = np.concatenate([np.ravel(x) for x in jax.tree.leaves(hparams)])
        start = jnp.zeros(task.shape)
        if self.points:
            start = self.solutions[np.argmin([np.sum((point - p) ** 2) for p in self.points])]
        tol = tolerance(task, self.config.tolerance)
        found, criterion = evaluate(start, hparams, task.fit, task.held, tol, self.config.max_steps)
        self.points.append(point)
        self.solutions.append(found.params)
        self.cost += float(found.stats["num_gradients"])
        measured, seconds = float(criterion), _now() - self.clock
        self.log(len(self.points) - 1, self.cost, criterion=measured, seconds=seconds)
        if self.best is None or measured < self.best.value:
            self.best = Found(hparams, measured, found.params, 0.0, 0.0, 0)
        return measured

    def found(self) -> Found:
        """The best of all, at the cost of all."""
        if self.best is None:
            raise ValueError("nothing was evaluated")
        seconds = _now() - self.clock
        return self.best._replace(cost=self.cost, seconds=seconds, evaluations=len(self.points))


def axis(config: Config, points: int) -> np.ndarray:
    """Log penalties relative to the top, from large to small."""
    return np.linspace(math.log(config.high), math.log(config.low), points)


def grid(task: Task, config: Config, log: Log) -> Found:
    """A hundred points: one penalty, or ten of each of two; penalties per class are all one."""
    warm = Warm(task, config, log)
    if "l2" in task.leaves:
        side = math.isqrt(config.points)
        for ridge in axis(config, side):
            for l1 in axis(config, side):
                warm({"l1": l1, "l2": ridge})
    else:
        for l1 in axis(config, config.points):
            warm({"l1": l1})
    return warm.found()


def searched(sampler: str, task: Task, config: Config, seed: int, log: Log) -> Found:
    """Random search or TPE over all log penalties."""
    warm = Warm(task, config, log)
    bounds = (math.log(config.low), math.log(config.high))
    names = [f"{k}_{i}" for k, shape in task.leaves.items() for i in range(math.prod(shape))]

    def objective(setting: dict[str, Any]) -> float:
        value = {}
        for leaf, shape in task.leaves.items():
            flat = [setting[f"{leaf}_{i}"] for i in range(math.prod(shape))]
            value[leaf] = np.reshape(flat, shape)
        return warm(value)

    baselines.search(
        objective, dict.fromkeys(names, bounds), budget=config.trials, cost=1, sampler=sampler,
        seed=seed, startup=config.startup,
    )  # fmt: skip
    return warm.found()
