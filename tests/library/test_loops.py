"""Every outer loop keeps its contract, and every deliberately wrong one is rejected."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loops_table import INNER, LOOPS, OUTER, LoopRow, within

from bilevel import Algorithm, Status
from bilevel.ground.cost import Cost
from bilevel.outer.base import Info, own
from bilevel.testing import CheckFailed, check_algorithm


@pytest.mark.parametrize("row", LOOPS, ids=lambda row: row.name)
def test_a_loop_keeps_its_contract(row: LoopRow):
    inner, outer = INNER[row.inner], OUTER
    if row.wrap is not None:
        inner, outer = row.wrap(inner, outer)
    infos = check_algorithm(
        row.algorithm,
        row.params,
        row.hparams,
        inner_batches=inner,
        outer_batch=outer,
        model_state=row.model_state,
        key=jax.random.key(1),
        outer=row.outer,
        inside=within if row.bounded else None,
        through_fit=row.through_fit,
        rtol=row.rtol,
        who=row.name,
    )
    inner, products, outer = row.cost
    if products is None and outer is not None:
        products = infos[-1].stats["num_matvecs"] + 1  # and the mixed one
        assert products >= 2
    for got, expected in zip(infos[-1].cost, (inner, products, outer), strict=True):
        if expected is None:  # counts of the loop's own are tested with it
            assert got >= 1
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-6)  # float32


# A loop by hand that is right, so that what rejects a wrong one is its one mistake.


class State(NamedTuple):
    params: Any
    hparams: Any
    model_state: Any
    key: Any
    step: Any
    extra: Any = ()


def loss(w, lam, x):
    return jnp.mean((w - x) ** 2) + lam["decay"] * jnp.sum(w**2)


PARAMS = jnp.array([0.3, -0.2])


def init(params, hparams):
    zero = jnp.zeros((), jnp.int32)
    return State(own(params), own(hparams), None, jax.random.key(5), zero)


def step(state, *, inner_batches, outer_batch, key=None):
    lam = state.hparams
    w = state.params - 0.1 * jax.grad(loss)(state.params, lam, inner_batches)
    value, slope = jax.value_and_grad(loss, 1)(w, lam, outer_batch)
    moved = {"decay": jnp.clip(lam["decay"] - 0.1 * slope["decay"], 0.01, 1.0)}
    new = State(w, moved, None, jax.random.fold_in(state.key, 0), state.step + 1, state.extra)
    failed = jnp.where(jnp.isfinite(value), Status.ok, Status.nonfinite_output)
    norm, cost = jnp.abs(slope["decay"]), Cost(1, 0, 1).arrays()
    return new, Info(value, value, norm, lam, failed.astype(jnp.int32), {}, cost)


def deploy(state, hparams=None):
    lam = state.hparams if hparams is None else hparams
    return state.params + 0 * lam["decay"]


def check(make=init, move=step, use=deploy, params=PARAMS, **rest):
    check_algorithm(
        Algorithm(make, move, use),
        params,
        {"decay": jnp.array(0.05)},
        inner_batches=jnp.array([0.2, 0.5]),
        outer_batch=jnp.array([0.1, 0.9]),
        **{"outer": loss, "inside": lambda lam: 0 < lam["decay"] < 2, "through_fit": False, **rest},
    )


def test_the_correct_twin_is_accepted():
    check(through_fit=True)


def after(change):
    """The right step, then a mistake `(new, info, old, batches) -> (new, info)`."""

    @functools.wraps(step)
    def wrong(state, **given):
        return change(*step(state, **given), state, given)

    return wrong


def of_state(change):
    return after(lambda new, info, old, given: (change(new, old, given), info))


def of_info(change):
    return after(lambda new, info, old, given: (new, change(new, info, old, given)))


def starting(**parts):
    return lambda params, hparams: init(params, hparams)._replace(**parts)


def decay(value):
    return {"decay": value}


WRONG_STARTS = {
    "a Python number in the state": (
        starting(extra=3),
        r"`state.extra` of `init` is 3, expected an array",
    ),
    "a weak type": (
        lambda params, hparams: init(params, hparams)._replace(hparams=decay(jnp.asarray(0.05))),
        r"`state.hparams\['decay'\]` of `init` has a weak type",
    ),
    "the caller's own arrays": (
        lambda params, hparams: init(params, hparams)._replace(params=params),
        r"`state.params` of `init` is an array of the caller's",
    ),
    "the caller's own memory": (
        lambda params, hparams: init(params, hparams)._replace(
            params=jax.device_put(params, jax.devices()[0])
        ),
        "hands out the memory it was given, which donating the state destroys",
    ),
    "one array in two places": (
        lambda params, hparams: (lambda s: s._replace(extra=s.params))(init(params, hparams)),
        r"`state.extra` of `init` is an array of the caller's or of another leaf",
    ),
    "a counter of another kind": (
        starting(step=jnp.zeros(())),
        r"`state.step` is float64\[\], expected int32\[\]",
    ),
    "other hyperparameters": (
        lambda params, hparams: init(params, [hparams["decay"]]),
        "`state.hparams` has the structure",
    ),
    "no model state": (
        lambda params, hparams: dict(init(params, hparams)._asdict()),
        "the state has no `params`",
    ),
    "a start that nobody can repeat": (
        lambda params, hparams: init(params + np.random.uniform(), hparams),
        "`state.params` differs between two calls of `init`",
    ),
    "a start that is outside the bounds": (
        lambda params, hparams: init(params, decay(jnp.asarray(-1.0))),
        "outside their bounds after `init`",
    ),
}
WRONG_STEPS = {
    "a narrower dtype": (
        of_state(lambda new, old, given: new._replace(params=new.params.astype(jnp.float32))),
        r"`state.params` changes in step 0 from float64\[2\] to float32\[2\]",
    ),
    "a weak type": (
        of_state(lambda new, old, given: new._replace(hparams=decay(jnp.asarray(0.5)))),
        r"`state.hparams\['decay'\]` changes in step 0 from float64\[\] to float64\[\] \(weak",
    ),
    "another structure": (
        of_state(lambda new, old, given: new._replace(extra=(new.params, *old.extra))),
        "`state` changes its structure in step 0",
    ),
    "a counter that stands": (
        of_state(lambda new, old, given: new._replace(step=old.step)),
        "`state.step` is 0 after 1 steps",
    ),
    "hyperparameters outside their bounds": (
        of_state(lambda new, old, given: new._replace(hparams=decay(new.hparams["decay"] - 1))),
        "outside their bounds after step 0",
    ),
    "a record of another kind": (
        of_info(lambda new, info, old, given: dict(info._asdict())),
        "`info` is a dict, expected an `Info`",
    ),
    "a value for each example": (
        of_info(lambda new, info, old, given: info._replace(value=info.value * jnp.ones(2))),
        "`info.value` is .* expected a scalar floating",
    ),
    "a status that is a fraction": (
        of_info(lambda new, info, old, given: info._replace(result=info.value)),
        "`info.result` is .* expected a scalar integer",
    ),
    "a cost below zero": (
        of_info(lambda new, info, old, given: info._replace(cost=Cost(1, -1, 0).arrays())),
        "`info.cost.products` is -1.0",
    ),
    "a cost that is a number": (
        of_info(lambda new, info, old, given: info._replace(cost=jnp.ones(()))),
        "`info.cost` is .* expected a `Cost`",
    ),
    "hyperparameters after the update": (
        of_info(lambda new, info, old, given: info._replace(hparams=new.hparams)),
        "`info.hparams` of step 0 are .* expected those of the state before",
    ),
    "the value at the new hyperparameters": (
        of_info(
            lambda new, info, old, given: info._replace(
                value=loss(new.params, new.hparams, given["outer_batch"])
            )
        ),
        "`info.value` of step 0 is not the outer loss at the pair",
    ),
    "NaN replaced and not told": (
        lambda state, **given: step(state, **{k: zeros_for_nan(x) for k, x in given.items()}),
        "`inner_batches` is NaN, but the status is ok and `info.value` 0",
    ),
    "NaN told, and the value replaced": (
        after(
            lambda new, info, old, given: (
                jax.tree.map(lambda x, y: keep_if(info.value, x, y), new._replace(key=old.key),
                             old._replace(step=new.step)),
                info._replace(value=zeros_for_nan(info.value)),
            )
        ),
        "`outer_batch` is NaN, but `info.value` 0",
    ),
    "NaN told, and parameters made up": (
        of_state(lambda new, old, given: new._replace(params=zeros_for_nan(new.params))),
        r"`inner_batches` is NaN, but `state.params` moved to finite numbers, \[array\(\[0",
    ),
    "NaN told, and hyperparameters made up": (
        of_state(
            lambda new, old, given: new._replace(
                hparams=decay(jnp.where(jnp.isnan(new.params[0]), 0.5, new.hparams["decay"]))
            )
        ),
        "`inner_batches` is NaN, but `state.hparams` moved to finite numbers",
    ),
}  # fmt: skip


def zeros_for_nan(x):
    return None if x is None else jnp.where(jnp.isnan(x), 0.0, x)


def keep_if(value, new, old):
    if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        return new
    return jnp.where(jnp.isfinite(value), new, old)


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_a_wrong_start_is_rejected(name):
    make, message = WRONG_STARTS[name]
    with pytest.raises(CheckFailed, match=message):
        check(make=make)


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_a_wrong_step_is_rejected(name):
    move, message = WRONG_STEPS[name]
    with pytest.raises(CheckFailed, match=message):
        check(move=move)


def test_deploying_for_other_hyperparameters_than_its_own_is_rejected():
    with pytest.raises(CheckFailed, match=r"`deploy\(state\)` is not `deploy\(state, state.hpar"):
        check(use=lambda state, lam=None: state.params + (0.0 if lam is None else lam["decay"]))


def test_a_step_that_compiles_again_is_rejected():
    """Equal shapes, dtypes and places, and yet another type: that of an array on a mesh."""
    spread = NamedSharding(jax.make_mesh((1,), ("d",)), PartitionSpec())
    again = of_state(
        lambda new, old, given: new._replace(
            params=jax.lax.with_sharding_constraint(new.params, spread)
        )
    )
    with pytest.raises(CheckFailed, match="`step` was traced 2 times for 3 steps"):
        check(move=again)


def test_an_init_that_writes_into_its_arguments_is_rejected():
    def writes(params, hparams):
        params += 1.0
        return init(params, hparams)

    with pytest.raises(CheckFailed, match="`init` changed its input"):
        check(make=writes, params=np.zeros(2))


def hiding(hidden, start=1):
    """A loop that remembers, outside its state, how often it was traced."""

    def change(new, old, given):
        hidden.append(None)
        return new._replace(params=new.params + max(0, len(hidden) - start))

    return of_state(change)


def test_a_state_that_is_hidden_in_python_is_rejected():
    with pytest.raises(
        CheckFailed, match="`state.params` after a `lax.scan` over the steps is not"
    ):
        check(move=hiding([]))
    # Traced for the loop and the scan it seems right; `fit` traces it once more.
    with pytest.raises(CheckFailed, match="`state.params` after `fit` is not"):
        check(move=hiding([], start=2), through_fit=True)


def test_a_value_that_is_hidden_in_python_is_rejected():
    hidden = []

    def change(new, info, old, given):
        hidden.append(None)
        return info._replace(value=info.value + max(0, len(hidden) - 2))

    with pytest.raises(CheckFailed, match="`best_value` of `fit` is not the lowest `info.value`"):
        check(move=of_info(change), through_fit=True)


def test_a_memory_on_the_host_that_a_nan_spoils_is_rejected():
    spoilt = []

    def remember(x):
        spoilt.extend([None] * bool(np.isnan(x)))
        return np.float64(len(spoilt))

    def change(new, old, given):
        shape = jax.ShapeDtypeStruct((), jnp.float64)
        return new._replace(params=new.params + jax.pure_callback(remember, shape, new.params[0]))

    with pytest.raises(CheckFailed, match="the state from before a step with NaN does not go on"):
        check(move=of_state(change))


def test_a_state_that_is_hidden_on_the_host_is_rejected():
    seen = []

    def count(_):
        seen.append(None)
        return np.float64(len(seen))

    def change(new, old, given):
        shape = jax.ShapeDtypeStruct((), jnp.float64)
        return new._replace(params=new.params + jax.pure_callback(count, shape, new.params[0]))

    with pytest.raises(
        CheckFailed, match="does not go on to the same bits: `state.params` differs"
    ):
        check(move=of_state(change))
