"""Mistakes in arguments that are refused at once: one line each, nothing compiled."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel import objectives
from bilevel.ground.leaves import select
from bilevel.ground.loops import keep_types
from bilevel.inner.groups import batch_size
from bilevel.outer.base import check_arrays, check_model_state, check_state


def loss(w, lam, batch):
    return jnp.sum((w - batch) ** 2) + lam * jnp.sum(w**2)


KEY = jax.random.key(0)
LOOP = bilevel.alternate(
    loss, loss, bilevel.Implicit(), optax.sgd(0.1), optax.sgd(0.1), inner_steps=1
)
STATE = LOOP.init(jnp.zeros(2), jnp.array(0.1))
BATCHES = jnp.ones((1, 2)), jnp.ones(2)


def scan(algorithm=LOOP, state=STATE, sample=lambda key: BATCHES, **options):
    return lambda: bilevel.scan_run(algorithm, state, sample, 1, **{"key": KEY, **options})


def replay(steps, values, step=0):
    return lambda: bilevel.HyperSchedule(steps, values)(step)


def unroll(**settings):
    return lambda: bilevel.Unroll(optax.sgd(0.1), 3, **settings)


def tuning(**settings):
    return lambda: bilevel.self_tuning(loss, loss, optax.sgd(0.1), optax.sgd(0.1), **settings)


ONE = {"rate": jnp.ones(1)}
REFUSED = {
    "scan_run, no loop": (scan(algorithm=3), TypeError, "`algorithm` must be an outer loop"),
    "scan_run, no state": (scan(state=jnp.ones(2)), TypeError, "`state` must be what"),
    "scan_run, arrays": (scan(sample=BATCHES), TypeError, "`sample` must be a function key"),
    "scan_run, one batch": (scan(sample=lambda key: {}), TypeError, "must return a pair"),
    "scan_run, no score": (scan(score=1.0), TypeError, "`score` must be a function"),
    "scan_run, two scores": (
        scan(score=lambda state: state.params), TypeError, "`score` must return one real"
    ),
    "schedule, a list": (replay([0], ONE), TypeError, "must be an array of whole numbers"),
    "schedule, times": (replay(jnp.array([0.5]), ONE), TypeError, "`steps` must be of whole"),
    "schedule, rows": (
        replay(jnp.zeros((1, 1), int), {"rate": jnp.ones((1, 1))}), ValueError, "expected \\(K,\\)"
    ),
    "schedule, half a step": (replay(jnp.array([0]), ONE, 0.5), TypeError, "`step` must be of"),
    "schedule, empty": (replay(jnp.array([0]), {}), ValueError, "`values` has no entries"),
    "schedule, longer": (
        replay(jnp.array([0, 1]), ONE), ValueError, "expected a leading axis of 2"
    ),
    "schedule, words": (replay(jnp.array([0]), {"rate": "high"}), TypeError, "array of numbers"),
    "unroll, too short": (unroll(truncate=4), ValueError, "`truncate` must be at most"),
    "unroll, mode": (unroll(mode="backward"), ValueError, "`mode` must be one of"),
    "unroll, remat": (unroll(mode="forward", remat="sqrt"), ValueError, "has no meaning with"),
    "unroll, real time": (unroll(real_time=True), ValueError, "carries the forward tangent"),
    "tuning, linearize": (tuning(linearize=loss), TypeError, "`linearize` must be"),
    "tuning, shared": (tuning(shared=(1,)), TypeError, "`shared` must be parts of the names"),
    "linen, no params": (lambda: bilevel.split_linen({"x": 1}), TypeError, "`variables` must be"),
    "SURE, numbers": (
        lambda: objectives.SURE(0.5, jnp.ones(2), loss), TypeError, "`predict` must be callable"
    ),
    "SURE, observed": (
        lambda: objectives.SURE(0.5, loss, loss, observed=jnp.ones(2)), TypeError,
        "`observed` must be callable",
    ),
    "report, a row": (
        lambda: bilevel.MemoryReport(()).row("mixed"), KeyError, "no row 'mixed'"
    ),
    "leaves, numbers": (
        lambda: select({"w": 1.0}, (0,)), TypeError, "`leaves` must be parts of the paths"
    ),
    "carry, structure": (
        lambda: keep_types((1.0,), 1.0, "carry", "Keep it."), TypeError, "changes its tree"
    ),
    "carry, kind": (
        lambda: keep_types(jnp.ones(2, int), jnp.ones(2), "carry", "Keep it."), TypeError,
        "changes in a step from float64\\(2,\\) to int64\\(2,\\). Keep it.",
    ),
    "groups, no examples": (
        lambda: batch_size(jnp.array(1.0)), ValueError, "no array with a leading axis"
    ),
    "a loop, statistics": (
        lambda: check_model_state(True, None), ValueError, "needs the first statistics"
    ),
    "a loop, another state": (
        functools.partial(check_state, STATE, dict), TypeError, "`state` must be what `init`"
    ),
    "a loop, words": (lambda: check_arrays({"a": "b"}), TypeError, "a tree of arrays"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_what_was_expected(name):
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_objectives_of_one_fit_pass_everything_through():
    data, params = (jnp.arange(4.0), jnp.arange(4.0)), jnp.zeros(2)
    held = objectives.HeldOut(([0, 2], [1, 3]), loss, loss)
    assert held.init(params) is params and held.each(loss) is loss
    assert held.outer_batch(data)[0].tolist() == [1.0, 3.0]
    left = objectives.LeaveOneOut(lambda w, lam, batch: w, loss)
    assert left.init(params) is params
    assert left.inner_batch(data) is data and left.outer_batch(data) is data
