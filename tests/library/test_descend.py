"""Training steps as one loop: against optax in a Python loop, with state, keys and segments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.ground.batches import check_stack, select_batch
from bilevel.inner import InnerState, descend
from bilevel.inner.descend import start
from bilevel.problem.two_losses import Problem


def noisy(w, lam, batch, seen):
    """A loss with keyed noise and a running mean of its inputs, like batch norm's."""
    x, key = batch
    seen = {"mean": 0.9 * seen["mean"] + 0.1 * x.mean(0), "count": seen["count"] + 1}
    noise = jax.random.normal(key, w.shape)
    return jnp.sum((jnp.tanh(x @ w) - lam) ** 2) + jnp.sum(noise * w), seen


PROBLEM = Problem(noisy, noisy, has_state=True)
X = jax.random.normal(jax.random.key(0), (9, 5, 3))
W = jnp.asarray([0.2, -0.4, 1.0])
SEEN = {"mean": jnp.zeros(3), "count": jnp.asarray(0, jnp.int32)}


def by_hand(tx, batches, steps, first=0):
    state, opt_state, seen = W, tx.init(W), SEEN
    losses = []
    for t in range(first, first + steps):
        x, key = batches
        key = jax.random.fold_in(key, t) if key.ndim == 0 else key[t]
        (loss, seen), grads = jax.value_and_grad(noisy, has_aux=True)(state, 0.5, (x[t], key), seen)
        updates, opt_state = tx.update(grads, opt_state, state)
        state = optax.apply_updates(state, updates)
        losses.append(loss)
    return InnerState(state, opt_state, seen), losses


@pytest.mark.parametrize("single_key", [False, True])
@pytest.mark.parametrize("mixed,remat", [(False, "none"), (True, "sqrt")])
def test_equals_a_python_loop(single_key, mixed, remat):
    tx = optax.adam(0.1)
    key = jax.random.key(5)
    batches = (X, key if single_key else jax.random.split(key, 9))
    expected, losses = by_hand(tx, batches, 7, first=2)
    end, info = jax.jit(
        lambda b: descend(
            PROBLEM,
            tx,
            start(tx, W, SEEN),
            jnp.asarray(0.5),
            b,
            steps=7,
            first=2,
            mixed=mixed,
            remat=remat,
        )  # fmt: skip
    )(batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), end, expected)
    np.testing.assert_allclose(info.loss, losses, rtol=1e-12)
    assert info.grad_norm.shape == (7,) and end.model_state["count"] == 7


def test_two_halves_are_one_whole_and_types_stay():
    """A float64 rate does not widen float32 moments, so the state fits every later call."""
    rate = jnp.asarray(0.1, jnp.float64)
    w = W.astype(jnp.float32)
    problem = Problem(None, lambda w, lam, x: jnp.sum((x.astype(w.dtype) @ w - 1) ** 2))
    tx = optax.sgd(rate, momentum=rate)

    def go(state, first, steps):
        return descend(problem, tx, state, None, X, steps=steps, first=first)[0]

    begin = start(tx, w)
    halves, whole = go(go(begin, 0, 4), 4, 5), go(begin, 0, 9)
    for a, b, c in zip(*map(jax.tree.leaves, (halves, whole, begin)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == c.dtype and not a.weak_type
    assert halves.params.dtype == jnp.float32


def test_a_single_key_is_split_by_step():
    key = jax.random.key(1)
    a, b = (select_batch((X, key), t)[1] for t in (0, 1))
    assert jax.random.key_data(a).tolist() != jax.random.key_data(b).tolist()
    np.testing.assert_array_equal(select_batch((X, key), 3)[0], X[3])


def test_only_a_stack_of_exactly_the_steps_passes():
    """Longer would read a single batch of nine examples as nine batches."""
    for steps in (10, 8, 5):
        with pytest.raises(
            ValueError, match=rf"inner_batch\['x'\] has shape \(9, 5, 3\).*leading axis of {steps}:"
        ):
            check_stack({"x": X}, steps)
    with pytest.raises(ValueError, match=r"inner_batch\[1\] has shape \(4,\).*axis of 9"):
        check_stack((X, jnp.zeros(4)), 9)  # one leaf stacked and the other not
    with pytest.raises(ValueError, match=r"shape \(\).*axis of 9"):
        check_stack((X, 1.0), 9)
    check_stack((X, jax.random.key(0)), 9)


def test_the_public_door_refuses_what_would_be_clamped_or_wrong():
    tx, w = optax.sgd(0.5, momentum=0.9), jnp.zeros(3)
    state = InnerState(w, tx.init(w))

    def train(w, lam, batch):
        return 0.5 * jnp.sum((w - batch) ** 2)

    ones = jnp.ones((4, 3))

    def call(batches=ones, inner=train, tx=tx, state=state, steps=4, **more):
        return bilevel.descend(inner, tx, state, None, batches, steps=steps, **more)

    for match, changes in (
        ("batches has shape .2,., expected a leading axis of 4", dict(batches=jnp.ones(2))),
        (
            "batches has shape .12, 3., expected a leading axis of 4",
            dict(batches=jnp.ones((12, 3))),
        ),
        ("batches has shape .*expected a leading axis of 4", dict(batches=1.0)),
        ("`steps` must be at least 1", dict(steps=0)),
        ("`steps` must be a Python int", dict(steps=1.5)),
        ("`tx` must be an optax gradient transformation", dict(tx=optax.sgd)),
        (r"`state` must be `InnerState\(params", dict(state=w)),
        ("`inner` must be a function loss", dict(inner=1)),
        ("`inner` must be a function loss.*A condition", dict(inner=bilevel.FixedPoint(train))),
        ("`inner` must return a scalar", dict(inner=lambda w, lam, b: w * b)),
        ("`unroll` must be True or False, or None", dict(unroll="yes")),
        ("state.params has dtype int", dict(state=InnerState(jnp.ones(3, int), tx.init(w)))),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            call(**changes)
    weak = jnp.array(0.1) * 1.0
    end, _ = call(jnp.ones(4), state=InnerState(weak, tx.init(weak)))
    by_hand, trace = 0.1, 0.0
    for _ in range(4):
        trace = 0.9 * trace + (by_hand - 1)
        by_hand -= 0.5 * trace
    np.testing.assert_allclose(end.params, by_hand, rtol=1e-12)
    closed, _ = call(None, inner=lambda w, lam, b: train(w, lam, 1.0))
    np.testing.assert_allclose(closed.params, call()[0].params, rtol=1e-12)
