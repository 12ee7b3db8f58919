"""What all loops do alike: injected rates, one optimizer state, keys in a stack, loss values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.inner.hypernetwork import Hypernetwork
from bilevel.outer.global_response import global_response

KEY = jax.random.key(0)
LAM = jnp.array(-1.0)


def train(w, lam, batch):
    return 0.5 * jnp.sum((w - batch) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def valid(w, lam, batch):
    return 0.5 * jnp.sum((w - 2 * batch) ** 2)


def injected(lam):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=lam["lr"])


def test_training_steps_use_the_rate_of_now():
    def loss(w, lam, batch):
        return 0.5 * jnp.sum((w - batch) ** 2)

    alg = bilevel.alternate(
        valid, loss, bilevel.Unroll(injected, 1), injected, optax.sgd(0.2), inner_steps=2
    )
    step = jax.jit(alg.step)
    state = alg.init(jnp.zeros(1), {"lr": jnp.array(0.1)})
    for _ in range(3):
        new, _ = step(state, inner_batches=jnp.ones((3, 1)), outer_batch=jnp.ones(1))
        right = 1 - (1 - state.hparams["lr"]) ** 3 * (1 - state.params)
        np.testing.assert_allclose(new.params, right, rtol=1e-12)
        state = new
    assert float(state.hparams["lr"]) > 0.4
    assert float(state.trained.opt_state.hyperparams["learning_rate"]) > 0.4


def test_the_state_of_a_fixed_optimizer_is_the_callers_to_change():
    tx = optax.inject_hyperparams(optax.sgd)(0.1)
    alg = bilevel.alternate(valid, train, bilevel.Implicit(bilevel.Dense()), tx, optax.sgd(0.1), 2)
    state = alg.init(jnp.zeros(1), LAM)
    still = state.trained.opt_state._replace(hyperparams={"learning_rate": jnp.array(0.0)})
    new, _ = jax.jit(alg.step)(
        state._replace(trained=state.trained._replace(opt_state=still)),
        inner_batches=jnp.ones((2, 1)),
        outer_batch=jnp.ones(1),
    )
    assert float(new.params[0]) == 0.0


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_run_has_one_optimizer_state_which_an_unrolled_response_advances(tx):
    alg = bilevel.alternate(
        valid, train, bilevel.Unroll(tx, 3), tx, optax.set_to_zero(), inner_steps=2
    )
    state = alg.init(jnp.zeros(2), LAM)
    step = jax.jit(alg.step)
    batches = jax.random.normal(KEY, (10, 2))
    for i in (0, 5):
        state, _ = step(state, inner_batches=batches[i : i + 5], outer_batch=jnp.ones(2))

    @jax.jit
    def by_hand(carry, batch):
        w, opt_state = carry
        updates, opt_state = tx.update(jax.grad(train)(w, LAM, batch), opt_state, w)
        return optax.apply_updates(w, updates), opt_state

    carry = (jnp.zeros(2), tx.init(jnp.zeros(2)))
    for batch in batches:
        carry = by_hand(carry, batch)
    # Ten steps by two programs: rounding of float64.
    for a, b in zip(
        jax.tree.leaves((state.params, state.trained.opt_state)),
        jax.tree.leaves(carry),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    assert state.response.opt_state is None


def test_a_response_that_trains_with_another_optimizer_is_refused():
    settings = (optax.sgd(0.1, momentum=0.9), optax.sgd(0.1), 2)
    alg = bilevel.alternate(valid, train, bilevel.Unroll(optax.adam(0.1), 3), *settings)
    with pytest.raises(ValueError, match="share one optimizer state.*same optimizer to both"):
        alg.init(jnp.zeros(2), LAM)
    # A step that is only looked at keeps a state of its own.
    looks = bilevel.FiniteDifference(optax.sgd(0.1), lookahead=False)
    state = bilevel.alternate(valid, train, looks, *settings).init(jnp.zeros(2), LAM)
    assert state.response.opt_state is not None
    real_time = bilevel.Unroll(optax.sgd(0.1), 1, mode="forward", real_time=True)
    with pytest.raises(ValueError, match="`real_time=True` differentiates the whole run"):
        bilevel.alternate(valid, train, real_time, *settings)
    uncentred = bilevel.BestResponse(bilevel.StructuredResponse(centred=False))
    with pytest.raises(ValueError, match="uncentred network.*`self_tuning`"):
        bilevel.alternate(valid, train, uncentred, *settings)


def noisy(w, lam, batch):
    noise = jax.random.normal(batch["key"], w.shape)
    return train(w, lam, batch["x"][0] + noise)


def looks_at(w, lam, batch):
    return valid(w, lam, batch["x"][0])


TX = optax.sgd(0.1)
LOOPS = {
    "alternate, Implicit": (
        bilevel.alternate(looks_at, noisy, bilevel.Implicit(bilevel.Dense()), TX, TX, 3),
        3,
    ),
    "alternate, Unroll": (bilevel.alternate(looks_at, noisy, bilevel.Unroll(TX, 2), TX, TX, 1), 3),
    "self_tuning": (bilevel.self_tuning(looks_at, noisy, TX, TX, 3, groups=1), 3),
    "global_response": (
        global_response(
            looks_at, noisy, Hypernetwork((3,)), lambda k, lam: lam, TX, TX, 3, draws=1
        ),
        3,
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_lone_key_is_split_by_step_in_every_loop(name):
    alg, count = LOOPS[name]
    state = alg.init(jnp.ones(2), LAM)
    step = jax.jit(alg.step)
    x, key = jnp.ones((count, 1, 2)), jax.random.key(5)
    outer = {"x": x[0]}
    stacked = {"x": x, "key": jnp.stack([jax.random.fold_in(key, t) for t in range(count)])}
    lone, _ = step(state, inner_batches={"x": x, "key": key}, outer_batch=outer, key=KEY)
    given, _ = step(state, inner_batches=stacked, outer_batch=outer, key=KEY)
    for a, b in zip(jax.tree.leaves(lone), jax.tree.leaves(given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)

    def trace(**batch):
        jax.eval_shape(
            lambda s: alg.step(s, inner_batches=batch, outer_batch=outer, key=KEY), state
        )

    for wrong in ({"x": x[:2], "key": key}, {"x": jnp.ones((4, 1, 2)), "key": key},
                  {"x": x, "key": jax.random.split(key, 2)}, {"x": x, "key": key, "y": x[0]},
                  {"x": x, "key": key, "y": 1.0}):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"inner_batches\[.*leading axis of 3.*Stack a list of batches"
        ):
            trace(**wrong)


def minimised(tx, loss, w, steps, **given):
    """``steps`` updates by optax alone, with everything that optax offers to ask for."""
    state = tx.init(w)
    for _ in range(steps):
        value, grad = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        w = optax.apply_updates(w, updates)
    return w


def plateau():
    return optax.chain(optax.sgd(0.3), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))


@pytest.mark.parametrize("tx", [optax.lbfgs(), optax.polyak_sgd(max_learning_rate=0.3), plateau()])
def test_inner_optimizers_get_the_loss_that_they_ask_for(tx):
    target = jnp.array([1.0, -2.0])
    alg = bilevel.alternate(
        valid, train, bilevel.Implicit(bilevel.Dense()), tx, optax.set_to_zero(), inner_steps=3
    )
    batches = jnp.broadcast_to(target, (3, 2))
    state, _ = jax.jit(alg.step)(
        alg.init(jnp.ones(2), LAM), inner_batches=batches, outer_batch=target
    )
    right = jax.jit(lambda w: minimised(tx, lambda w: train(w, LAM, target), w, 3))(jnp.ones(2))
    np.testing.assert_allclose(state.params, right, rtol=1e-10)

    # The other loops, traced only: what reaches the optimizer is what `update` hands to all.
    for other in (
        bilevel.self_tuning(valid, train, tx, optax.sgd(0.1), 3, groups=1),
        bilevel.self_tuning(valid, train, tx, optax.sgd(0.1), 3, groups=1,
                            network=bilevel.StructuredResponse(centred=False)),
        global_response(valid, train, Hypernetwork((2,)), lambda k, h: h, tx, optax.sgd(0.1), 3),
    ):  # fmt: skip
        jax.eval_shape(
            functools.partial(other.step, inner_batches=batches, outer_batch=target, key=KEY),
            other.init(jnp.ones(2), LAM),
        )


@pytest.mark.parametrize("tx", [optax.polyak_sgd(max_learning_rate=2.0), plateau(),
                                optax.lbfgs(0.1, linesearch=None)])  # fmt: skip
def test_outer_optimizers_get_the_value_of_the_outer_loss(tx):
    alg = bilevel.alternate(valid, train, bilevel.Implicit(bilevel.Dense()), TX, tx, inner_steps=0)
    target, w = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.5])
    new, info = jax.jit(alg.step)(alg.init(w, LAM), inner_batches=target[None], outer_batch=target)
    grad = bilevel.hypergrad(valid, train, bilevel.Implicit(bilevel.Dense()))(
        w, LAM, inner_batch=target, outer_batch=target
    )
    value = valid(w, LAM, target)
    updates, state = tx.update(
        grad, tx.init(LAM), LAM, value=value, grad=grad, value_fn=lambda lam: value
    )
    np.testing.assert_allclose(new.hparams, LAM + updates, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(new.outer.opt_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    np.testing.assert_allclose(info.value, value, rtol=1e-12)


@pytest.mark.parametrize("slot", ["outer_tx", "scale_tx"])
def test_a_line_search_on_the_outer_loss_is_refused_where_it_would_solve_again(slot):
    settings = {"outer_tx": TX, slot: optax.lbfgs()}
    algs = [bilevel.self_tuning(valid, train, TX, inner_steps=2, groups=1, **settings)]
    if slot == "outer_tx":
        response = bilevel.Implicit(bilevel.Dense())
        algs.append(bilevel.alternate(valid, train, response, TX, optax.lbfgs(), 2))
    for alg in algs:
        step = functools.partial(
            alg.step, inner_batches=jnp.ones((2, 2)), outer_batch=jnp.ones(2), key=KEY
        )
        with pytest.raises(ValueError, match=f"`{slot}` evaluates the outer.*linesearch=None"):
            jax.eval_shape(step, alg.init(jnp.ones(2), LAM))


def test_a_line_search_follows_the_validation_loss_of_a_global_response():
    alg = global_response(
        valid, train, Hypernetwork((3,)), lambda k, lam: lam, TX, optax.lbfgs(), 2, draws=1
    )
    state = alg.init(jnp.ones(2), LAM)
    new, _ = jax.jit(alg.step)(
        state, inner_batches=jnp.ones((2, 2)), outer_batch=jnp.ones(2), key=KEY
    )
    right = jax.jit(lambda lam: minimised(
        optax.lbfgs(), lambda lam: valid(alg.deploy(new, lam), lam, jnp.ones(2)), lam, 1
    ))(LAM)  # fmt: skip
    np.testing.assert_allclose(new.hparams, right, rtol=1e-8)
    assert float(new.hparams) != float(LAM)


def test_what_is_no_optimizer_is_refused_by_name():
    def of_hparams(lam):
        return TX

    for build in (
        lambda **kw: bilevel.self_tuning(valid, train, **{"inner_tx": TX, "outer_tx": TX} | kw),
        lambda **kw: global_response(
            valid, train, Hypernetwork((3,)), lambda k, lam: lam,
            **{"inner_tx": TX, "outer_tx": TX} | kw,
        ),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="`inner_tx`.*`alternate` and `Unroll"):
            build(inner_tx=of_hparams)
        for slot in ("inner_tx", "outer_tx"):
            for wrong in (None, 0.1, optax.adam, optax.GradientTransformation):
                with pytest.raises(TypeError, match=f"`{slot}` must be an optax"):
                    build(**{slot: wrong})
    with pytest.raises(TypeError, match="`sample` must be a function"):
        global_response(valid, train, Hypernetwork((3,)), None, TX, TX)
    with pytest.raises(TypeError, match="`network` must be a network"):
        global_response(valid, train, None, lambda k, lam: lam, TX, TX)
    alg = global_response(valid, train, Hypernetwork((3,)), lambda k, lam: lam, TX, TX)
    with pytest.raises(ValueError, match="`model_state` has no place"):
        alg.init(jnp.ones(2), LAM, jnp.zeros(1))
    for returned in (None, (1, 2), optax.sgd):
        made = bilevel.alternate(
            valid, train, bilevel.Unroll(TX, 1), lambda lam, r=returned: r, TX, 1
        )
        with pytest.raises(TypeError, match=r"`inner_tx\(hparams\)` must return an optax"):
            made.init(jnp.ones(2), LAM)
