"""Our loops and their hand-written twins, with the batches that each step draws."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel
from bilevel.ground.cost import PRODUCT
from experiments.solvers.config import Config
from experiments.solvers.hand import Hand
from experiments.solvers.problem import Problem, cached, everything
from experiments.solvers.steps import falling, momentum, outer_size, period, sizes

IMPLEMENTATIONS = ("bilevel", "jax")
SABA = ("saba", "saba_momentum")  # they keep tables
START = (0.1, 0.01)  # step sizes where none were tuned


class Runner(NamedTuple):
    """A loop as the experiment drives it.

    Attributes:
      init: ``(params, hparams) -> state``.
      step: ``(state, inner, outer, key) -> state``.
      hparams: of a state.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    hparams: Callable[[Any], Any]


def ours(
    method: str, config: Config, problem: Problem, rates: tuple[Any, Any]
) -> bilevel.Algorithm:
    """The loop of this library."""
    losses = problem.outer, problem.inner
    tx, outer_tx = (optax.sgd(rate) for rate in rates)
    k, t, falls = config.products, config.inner_steps, {"schedule": falling(method)}
    if method == "soba":
        return bilevel.soba(*losses, tx, tx, outer_tx, **falls)
    if method == "saba":
        return bilevel.saba(*losses, tx, tx, outer_tx, *sizes(problem))
    if method == "saba_momentum":
        heavy = optax.sgd(rates[0], momentum=config.decay)
        outer_tx = optax.sgd(lambda t: outer_size(method, config.horizon, rates[1], t))
        return bilevel.saba(*losses, heavy, heavy, outer_tx, *sizes(problem))
    if method == "fsla":
        return bilevel.fsla(*losses, tx, tx, outer_tx, momentum(method), **falls)
    if method == "srba":
        return bilevel.srba(*losses, tx, tx, outer_tx, period(config, problem))
    if method == "spaba":
        return bilevel.spaba(*losses, tx, tx, outer_tx, 1 / period(config, problem))
    if method == "mrbo":
        storm = momentum(method), momentum(method)
        return bilevel.mrbo(*losses, tx, outer_tx, *storm, k, rates[0], **falls)
    if method == "stocbio":
        return bilevel.stocbio(*losses, tx, outer_tx, t, k, rates[0])
    if method == "f2sa":
        return bilevel.f2sa(*losses, tx, outer_tx, t, penalty=config.penalty)
    if method == "pbgd":
        return bilevel.pbgd(*losses, tx, outer_tx, penalty=config.penalty)
    if method == "bome":
        return bilevel.bome(*losses, tx, outer_tx, t)
    return bilevel.amigo(*losses, tx, tx, outer_tx, t, k)


def runner(
    implementation: str, method: str, config: Config, problem: Problem, rates: tuple[Any, Any]
) -> Runner:
    """A loop of ours, or by hand."""
    if implementation == "jax":
        by_hand = Hand(method, config, problem, rates)
        return Runner(by_hand.init, by_hand.step, by_hand.hparams)
    algorithm = ours(method, config, problem, rates)

    def step(state: Any, inner: Any, outer: Any, key: Any) -> Any:
        if method in SABA:
            inner, outer = bilevel.Indexed(*inner), bilevel.Indexed(*outer)
        if method in ("srba", "spaba"):
            inner, outer = bilevel.Anchored(*inner), bilevel.Anchored(*outer)
        return algorithm.step(state, inner_batches=inner, outer_batch=outer, key=key)[0]

    return Runner(algorithm.init, step, lambda state: state.hparams)


def draw(method: str, config: Config, train: Any, valid: Any, key: Any) -> tuple[Any, Any]:
    """What a step reads: batches drawn evenly, with what the method wants beside them."""
    k, t = config.products, config.inner_steps
    count = {"mrbo": k + 2, "stocbio": t + k + 1, "amigo": t + k + 1, "f2sa": t, "bome": t}
    count = count.get(method, 1)
    batches = jax.tree.leaves(train)[0].shape[0], jax.tree.leaves(valid)[0].shape[0]
    one, two = jax.random.split(key)
    i = jax.random.randint(one, (count,), 0, batches[0], jnp.int32)
    j = jax.random.randint(two, (), 0, batches[1], jnp.int32)
    inner = jax.tree.map(lambda x: x[i], train)
    outer = jax.tree.map(lambda x: x[j], valid)
    if method in SABA:
        return (inner, i), (outer, j)
    if method in ("srba", "spaba"):
        return (inner, everything(train)), (outer, everything(valid))
    return inner, outer


def cost(method: str, config: Config, problem: Problem) -> float:
    """Inner gradients that a step of ours counts, on average over its full steps."""
    k, t, product = config.products, config.inner_steps, PRODUCT
    one = 2 + product
    if method in ("srba", "spaba"):
        inner, outer = sizes(problem)
        full = (1 + inner) * (1 + product) + 1 + outer
        return 2 * one + (full - 2 * one) / period(config, problem)
    return {
        "soba": one,
        "saba": one,
        "saba_momentum": one,
        "fsla": 1 + 2 * product + 2,
        "mrbo": 2 * (1 + (k + 1) * product + 1),
        "stocbio": t + (k + 1) * product + 1,
        "amigo": t + (k + 1) * product + 1,
        "f2sa": 3 * (t + 1),
        "pbgd": 4,
        "bome": t + 3,
    }[method]


@functools.cache
def advance(implementation: str, method: str, config: Config, name: str) -> Any:
    """``(state, count, key, rates, train, valid) -> state`` after ``count`` more steps."""
    problem = cached(name, config.batch)

    @jax.jit
    def steps(state: Any, begin: Any, end: Any, key: Any, rates: Any, train: Any, valid: Any):
        one = runner(implementation, method, config, problem, rates)

        def body(t: Any, state: Any) -> Any:
            drawn, own = jax.random.split(jax.random.fold_in(key, t))
            inner, outer = draw(method, config, train, valid, drawn)
            return one.step(state, inner, outer, own)

        return jax.lax.fori_loop(begin, end, body, state)

    return steps
