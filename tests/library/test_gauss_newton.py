"""Gauss–Newton steps against dense matrices, and what the search and the damping do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel import CG, InnerState, Unroll, Woodbury, gauss_newton

KEYS = jax.random.split(jax.random.key(5), 6)
SIZE, INPUTS, HIDDEN, OUTPUTS = 5, 4, 3, 3
PARAMS = {
    "first": {"w": jax.random.normal(KEYS[0], (INPUTS, HIDDEN)), "b": jnp.full(HIDDEN, 0.1)},
    "last": jax.random.normal(KEYS[1], (HIDDEN, OUTPUTS)),
}
X = jax.random.normal(KEYS[2], (SIZE, INPUTS))
BATCHES = {
    "squares": (X, jax.random.normal(KEYS[3], (SIZE, OUTPUTS))),
    "softmax": (X, jnp.array([0, 2, 1, 1, 0])),
}
LAM = {"decay": jnp.asarray(0.05), "damping": jnp.asarray(0.2)}


def model(w, lam, batch):
    return jnp.tanh(batch[0] @ w["first"]["w"] + w["first"]["b"][None]) @ w["last"]


def squares(z, lam, batch):
    return 0.5 * jnp.mean(jnp.sum((z - batch[1]) ** 2, 1))


def softmax(z, lam, batch):
    return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()


LOSSES = {"squares": squares, "softmax": softmax}


def decay(w, lam):
    return 0.5 * lam["decay"] * optax.tree.norm(w, squared=True)


def train(name, penalty=None):
    def loss(w, lam, batch):
        value = LOSSES[name](model(w, lam, batch), lam, batch)
        return value if penalty is None else value + penalty(w, lam)

    return loss


def dense(name, damping, penalty):
    """The direction from dense Jacobians: the gradient through (J'QJ + (rho + decay) I)^-1."""
    batch, (flat, unravel) = BATCHES[name], ravel_pytree(PARAMS)

    def outputs(w):
        return model(unravel(w), LAM, batch).reshape(-1)

    def of_outputs(z):
        return LOSSES[name](z.reshape(SIZE, OUTPUTS), LAM, batch)

    j, z = jax.jacrev(outputs)(flat), outputs(flat)
    ridge = damping + (0.0 if penalty is None else float(LAM["decay"]))
    matrix = j.T @ jax.hessian(of_outputs)(z) @ j + ridge * jnp.eye(flat.size)
    g = ravel_pytree(jax.grad(train(name, penalty))(PARAMS, LAM, batch))[0]
    return np.linalg.solve(matrix, g)


def updated(tx, name, penalty=None, params=PARAMS, state=None):
    loss = functools.partial(train(name, penalty), lam=LAM, batch=BATCHES[name])
    value, grads = jax.value_and_grad(lambda w: loss(w))(params)
    return tx.update(
        grads, tx.init(params) if state is None else state, params,
        hparams=LAM, batch=BATCHES[name], value=value, value_fn=lambda w: loss(w),
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("independent", [False, True])
def test_the_direction_is_that_of_the_dense_system(name, independent):
    """O18, by rows and through layers, with and without a penalty."""
    for penalty in (None, decay):
        tx = gauss_newton(
            model, LOSSES[name], damping=0.03, penalty=penalty, independent_examples=independent
        )
        step, _ = updated(tx, name, penalty)
        expected = -dense(name, 0.03, penalty)
        np.testing.assert_allclose(ravel_pytree(step)[0], expected, rtol=1e-8, atol=1e-10)


def test_push_through_gives_the_same_step():
    """O18 as written: a system for the outputs, r and Q per example, before the mean."""
    batch, (flat, unravel) = BATCHES["softmax"], ravel_pytree(PARAMS)
    j = jax.jacrev(lambda w: model(unravel(w), LAM, batch).reshape(-1))(flat)
    p = jax.nn.softmax(model(PARAMS, LAM, batch))
    r = (p - jax.nn.one_hot(batch[1], OUTPUTS)).reshape(-1)
    q = jax.scipy.linalg.block_diag(*(jnp.diag(row) - jnp.outer(row, row) for row in p))
    inner = np.linalg.solve(SIZE * 0.03 * np.eye(len(r)) + q @ j @ j.T, r)
    step, _ = updated(gauss_newton(model, softmax, damping=0.03), "softmax")
    np.testing.assert_allclose(ravel_pytree(step)[0], -j.T @ inner, rtol=1e-8, atol=1e-10)


def test_another_solver_and_momentum():
    """CG to rounding is the same; the mean of one direction, corrected for its start, is it."""
    exact = dense("squares", 0.2, None)
    for tx in (
        gauss_newton(model, squares, damping=0.2, solver=CG(max_steps=100, rtol=1e-13)),
        gauss_newton(model, squares, damping=0.2, momentum=0.9),
    ):
        step, state = updated(tx, "squares")
        np.testing.assert_allclose(ravel_pytree(step)[0], -exact, rtol=1e-8, atol=1e-10)
    step, _ = updated(tx, "squares", state=state)  # the same point again: the same direction
    np.testing.assert_allclose(ravel_pytree(step)[0], -exact, rtol=1e-8, atol=1e-10)


def test_the_damping_follows_the_prediction():
    """A linear model is predicted exactly; a step ten times too long is not."""
    x, y = X, jnp.ones(SIZE)

    def run(rate, start=1.0):
        def loss(w):
            return 0.5 * jnp.mean((x @ w - y) ** 2)

        tx = gauss_newton(
            lambda w, lam, b: b[0] @ w, lambda z, lam, b: 0.5 * jnp.mean((z - b[1]) ** 2), rate,
            damping=start, adaptation=1.25,
        )  # fmt: skip
        w = jnp.zeros(INPUTS)
        value, g = jax.value_and_grad(loss)(w)
        given = dict(hparams=None, batch=(x, y), value=value, value_fn=loss)
        return tx.update(g, tx.init(w), w, **given)[1].damping

    np.testing.assert_allclose(run(1.0), 1 / 1.25)
    np.testing.assert_allclose(run(1.0, 0.1), 0.1)  # its least
    np.testing.assert_allclose(run(1.0, 0.01), 0.01)  # chosen below it, and not raised to it


def test_an_uphill_step_raises_the_damping():
    def loss(w):
        return 0.5 * jnp.sum(jnp.cos(w) ** 2)

    tx = gauss_newton(
        lambda w, lam, b: jnp.cos(w), lambda z, lam, b: 0.5 * jnp.sum(z**2), 30.0,
        damping=0.5, adaptation=1.25,
    )  # fmt: skip
    w = jnp.array([1.2])
    value, g = jax.value_and_grad(loss)(w)
    given = dict(hparams=None, batch=jnp.zeros(1), value=value, value_fn=loss)
    step, state = tx.update(g, tx.init(w), w, **given)
    assert loss(w + step) > value
    np.testing.assert_allclose(state.damping, 0.5 * 1.25)


def test_the_search_reaches_armijo():
    """From a length that raises the loss; the next search begins half as long again."""
    tx = gauss_newton(model, squares, 4.0, damping=1e-3, line_search=True)
    step, state = updated(tx, "squares")
    loss = functools.partial(train("squares"), lam=LAM, batch=BATCHES["squares"])
    start, g = jax.value_and_grad(lambda w: loss(w))(PARAMS)
    direction = -dense("squares", 1e-3, None)
    length = float(state.length)
    assert length in [pytest.approx(4.0 * 0.8**k) for k in range(1, 15)]
    np.testing.assert_allclose(ravel_pytree(step)[0], length * direction, rtol=1e-6, atol=1e-8)
    unravel = ravel_pytree(PARAMS)[1]

    def armijo(length):
        slope = ravel_pytree(g)[0] @ direction
        moved = jax.tree.map(jnp.add, PARAMS, unravel(length * direction))
        return loss(moved) <= start + 0.1 * length * slope

    assert armijo(length) and not armijo(length / 0.8)
    _, after = updated(tx, "squares", state=state)
    assert after.length in [pytest.approx(length * 1.5 * 0.8**k) for k in range(15)]


def stacked(name, steps):
    return jax.tree.map(lambda x: jnp.stack([x] * steps), BATCHES[name])


@pytest.mark.slow
def test_training_with_it_and_tuning_through_it():
    """``descend`` hands it the batch; unrolled derivatives in all modes equal differences."""
    loss = train("softmax", decay)

    def inner_tx(lam):
        return gauss_newton(
            model, softmax, 0.5, damping=lam["damping"], penalty=decay, independent_examples=True
        )

    def run(lam):
        tx = inner_tx(lam)
        state = InnerState(PARAMS, tx.init(PARAMS))
        return bilevel.descend(loss, tx, state, lam, stacked("softmax", 3), steps=3)

    end, info = jax.jit(run)(LAM)
    assert info.loss[2] < info.loss[1] < info.loss[0]

    def outer(w, lam, batch):
        return softmax(model(w, lam, batch), lam, batch)

    def solve(mode):
        return bilevel.hypergrad_solve(
            outer, loss, Unroll(inner_tx, 3, mode=mode), PARAMS, LAM,
            inner_batch=stacked("softmax", 3), outer_batch=BATCHES["softmax"],
        )  # fmt: skip

    def value(lam):
        return outer(jax.jit(run)(lam)[0].params, lam, BATCHES["softmax"])

    found = {mode: solve(mode).grads for mode in ("mixed", "reverse", "forward")}
    for leaf in LAM:
        h = 1e-5
        up, down = ({**LAM, leaf: LAM[leaf] + s * h} for s in (1, -1))
        difference = (value(up) - value(down)) / (2 * h)
        for grads in found.values():
            np.testing.assert_allclose(grads[leaf], difference, rtol=1e-6)


def test_alternate_takes_it_beside_an_implicit_response():
    operator = bilevel.GaussNewton(model, softmax, 0.1, decay)
    tx = gauss_newton(model, softmax, 0.5, damping=0.1, penalty=decay)
    alg = bilevel.alternate(
        train("softmax"), operator.loss, bilevel.Implicit(Woodbury(), operator), tx,
        optax.sgd(0.01), inner_steps=3,
    )  # fmt: skip
    lam = {"decay": LAM["decay"]}
    state, info = jax.jit(alg.step)(
        alg.init(PARAMS, lam), inner_batches=stacked("softmax", 3), outer_batch=BATCHES["softmax"]
    )
    assert info.inner_value < operator.loss(PARAMS, lam, BATCHES["softmax"])
    assert state.hparams["decay"] != lam["decay"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(damping=0.0), ValueError, "`damping` must be greater than 0"),
        (dict(momentum=1.0), ValueError, "`momentum` must be below 1"),
        (dict(adaptation=0.9), ValueError, "`adaptation`"),
        (dict(line_search=1), TypeError, "`line_search`"),
        (dict(model=3), TypeError, "`model` must be"),
        (dict(penalty=0.1), TypeError, "`penalty` must be"),
    ],
)
def test_settings_refused(settings, error, message):
    with pytest.raises(error, match=message):
        gauss_newton(**{"model": model, "output_loss": squares, **settings})


def test_calls_refused():
    tx = gauss_newton(model, squares, line_search=True)
    with pytest.raises(TypeError, match="pass `value=loss"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, hparams=LAM, batch=BATCHES["squares"])
    alg = bilevel.soba(
        train("squares"), train("squares", decay), gauss_newton(model, squares), optax.sgd(0.1),
        optax.sgd(0.1),
    )  # fmt: skip
    state = alg.init(PARAMS, {"decay": LAM["decay"]})
    with pytest.raises(TypeError, match="needs an argument that steps do not have.*`batch`"):
        alg.step(state, inner_batches=stacked("squares", 1), outer_batch=BATCHES["squares"])
