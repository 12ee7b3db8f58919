"""Penalty methods against closed forms on quadratics: directions, bias, limits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Status
from bilevel.outer.penalty.difference import stencil

D, P = 2, 4  # hyperparameters x, parameters z


def spd(rng, n, low=1.0, high=3.0):
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return basis @ np.diag(np.linspace(low, high, n)) @ basis.T


class Quadratic:
    """Two quadratics in (z, x), and the exact answers."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.A, self.F, self.G = spd(rng, P), spd(rng, P, 0.5, 2.0), spd(rng, D)
        self.B, self.C = spd(rng, D), rng.standard_normal((D, P))
        self.K = 0.1 * rng.standard_normal((D, P))
        self.a, self.c = rng.standard_normal((2, P))
        self.b, self.e = rng.standard_normal((2, D))

    def inner(self, z, x, batch):
        return (z @ self.A @ z + x @ self.B @ x) / 2 + x @ self.C @ z + self.a @ z + self.b @ x

    def outer(self, z, x, batch):
        return (z @ self.F @ z + x @ self.G @ x) / 2 + x @ self.K @ z + self.c @ z + self.e @ x

    def minimum(self, x, nu=0.0):
        """Of h + nu f in z."""
        return -np.linalg.solve(
            self.A + nu * self.F, self.C.T @ x + self.a + nu * (self.K.T @ x + self.c)
        )

    def hypergrad(self, x):
        z = self.minimum(x)
        g = self.F @ z + self.K.T @ x + self.c
        return self.G @ x + self.K @ z + self.e - self.C @ np.linalg.solve(self.A, g)

    def penalized(self, x, sigma):
        """What a difference of first order gives."""
        y, z = self.minimum(x, 1 / sigma), self.minimum(x)
        return self.G @ x + self.K @ y + self.e + sigma * self.C @ (y - z)

    def root(self, field):
        """Where an affine field of x is zero."""
        origin = field(np.zeros(D))
        slopes = np.stack([field(e) - origin for e in np.eye(D)], axis=1)
        return -np.linalg.solve(slopes, origin)


Q = Quadratic()
X = np.array([0.7, -1.2])
OPTIMUM = Q.root(Q.hypergrad)
TX = optax.sgd(0.3)


def stacked(steps):
    return jnp.zeros((steps, 1))


def one_step(make, steps=300, x=X, z=None, tx=TX, losses=Q, **settings):
    """The direction of one step from ``(z, x)``, and its info."""
    algorithm = make(losses.outer, losses.inner, tx, optax.sgd(1.0), steps, **settings)
    start = algorithm.init(jnp.asarray(Q.minimum(x) if z is None else z), jnp.asarray(x))
    new, info = jax.jit(algorithm.step)(start, inner_batches=stacked(steps), outer_batch=())
    return x - np.asarray(new.hparams), info, new


def run(make, steps, count, outer_tx, x=X, **settings):
    algorithm = make(Q.outer, Q.inner, TX, outer_tx, steps, **settings)
    state = algorithm.init(jnp.zeros(P), jnp.asarray(x))
    batches = stacked(steps)

    def step(s, _):
        return algorithm.step(s, inner_batches=batches, outer_batch=())

    return jax.jit(lambda s: jax.lax.scan(step, s, length=count))(state)


@pytest.mark.parametrize("sigma", [10.0, 300.0])
def test_f2sa_takes_the_closed_form_of_its_difference(sigma):
    direction, info, new = one_step(bilevel.f2sa, penalty=sigma)
    np.testing.assert_allclose(direction, Q.penalized(X, sigma), rtol=1e-8)
    np.testing.assert_allclose(new.params, Q.minimum(X), rtol=1e-9)
    np.testing.assert_allclose(new.penalized[0].params, Q.minimum(X, 1 / sigma), rtol=1e-9)
    np.testing.assert_allclose(info.value, Q.outer(Q.minimum(X), X, ()), rtol=1e-9)
    assert int(info.result) == Status.ok
    assert float(info.stats["residual_norm"]) < 1e-6 * float(info.stats["rhs_norm"])
    np.testing.assert_allclose(info.stats["penalty"], sigma)


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_of_f2sa_written_out(order):
    rng, x, sigma, rate, steps = np.random.default_rng(3), X, 5.0, 0.2, 3
    b, start = rng.standard_normal((steps, P)), rng.standard_normal(P)

    def inner(z, x, batch):
        return Q.inner(z, x, batch) + batch @ z + (batch @ z) ** 2 / 2

    def slopes(z, nu, b):
        """Of h + nu f in z, and of h and f in x."""
        h = Q.A @ z + Q.C.T @ x + Q.a + b + b * (b @ z)
        f = Q.F @ z + Q.K.T @ x + Q.c
        return h + nu * f, Q.B @ x + Q.C @ z + Q.b, Q.G @ x + Q.K @ z + Q.e

    expected, ends = 0, {}
    for j, c in {1: {0: -1, 1: 1}, 2: {-1: -0.5, 1: 0.5}}[order].items():
        z = start
        for batch in b:
            z = z - rate * slopes(z, j / sigma, batch)[0]
        _, h, f = slopes(z, j / sigma, b[-1])
        expected, ends[j] = expected + c * (sigma * h + j * f), z
    algorithm = bilevel.f2sa(
        Q.outer, inner, optax.sgd(rate), optax.sgd(1.0), steps, penalty=sigma, growth=0, order=order
    )
    state = algorithm.init(jnp.asarray(start), jnp.asarray(x))
    new, _ = algorithm.step(state, inner_batches=jnp.asarray(b), outer_batch=())
    # Three steps in float64.
    np.testing.assert_allclose(x - np.asarray(new.hparams), expected, rtol=1e-12)
    for (j, end), y in zip([e for e in ends.items() if e[0]], new.penalized, strict=True):
        np.testing.assert_allclose(y.params, end, rtol=1e-12, err_msg=str(j))


@pytest.mark.parametrize("order", [1, 3])
def test_all_copies_of_f2sa_are_trained_in_one_loop(order):
    # In loops of their own each reads every batch again, and what depends on batches alone is
    # computed once for each copy.
    algorithm = bilevel.f2sa(Q.outer, Q.inner, TX, TX, 5, order=order)
    state = algorithm.init(jnp.zeros(P), jnp.asarray(X))
    step = jax.make_jaxpr(lambda s, b: algorithm.step(s, inner_batches=b, outer_batch=()))
    loops = [e for e in step(state, stacked(5)).eqns if e.primitive.name in ("scan", "while")]
    assert [e.params.get("length") for e in loops] == [5]


@pytest.mark.parametrize("order, sigmas", [(1, (1e2, 1e3)), (2, (30, 300)), (3, (30, 300))])
def test_the_bias_of_f2sa_falls_with_the_penalty_to_its_order(order, sigmas):
    exact, errors = Q.hypergrad(X), []
    for sigma in sigmas:
        direction, _, _ = one_step(bilevel.f2sa, penalty=sigma, order=order)
        errors.append(np.linalg.norm(direction - exact))
    ratio = 10**order * errors[1] / errors[0]  # ten times the penalty
    assert 0.8 < ratio < 1.2, errors


def test_stencils_differentiate_polynomials_of_their_degree():
    assert stencil(1) == {0: -1.0, 1: 1.0}
    assert stencil(2) == {-1: pytest.approx(-0.5), 1: pytest.approx(0.5)}
    for order in range(1, 7):
        weights = stencil(order)
        assert len(weights) == order + order % 2
        for m in range(order + 1):
            got = sum(c * (0.3 + j) ** m for j, c in weights.items())
            assert got == pytest.approx(m * 0.3 ** (m - 1) if m else 0.0, abs=1e-9)


def test_the_penalty_grows_as_the_theory_says():
    """k^(1/7): 3.7 times at ten thousand steps, where increments of k^(-1/7) / 10 reach 314."""
    algorithm = bilevel.f2sa(Q.outer, Q.inner, TX, TX, 1, penalty=2.0)
    state = algorithm.init(jnp.zeros(P), jnp.asarray(X))

    def penalty(k):
        at = state._replace(step=jnp.asarray(k, jnp.int32))
        return float(algorithm.step(at, inner_batches=stacked(1), outer_batch=())[1]
                     .stats["penalty"])  # fmt: skip

    assert penalty(0) == pytest.approx(2.0)
    assert penalty(9999) == pytest.approx(2 * 1e4 ** (1 / 7))
    benchmark = 1 + 0.1 * np.sum(np.arange(1, 10001) ** (-1 / 7))
    assert benchmark == pytest.approx(314, abs=1) and penalty(9999) < benchmark / 40


def test_a_schedule_is_used_as_it_is():
    rising = optax.linear_schedule(10.0, 20.0, 10)
    algorithm = bilevel.f2sa(Q.outer, Q.inner, TX, TX, 1, penalty=rising)
    state = algorithm.init(jnp.zeros(P), jnp.asarray(X))._replace(step=jnp.asarray(5, jnp.int32))
    _, info = algorithm.step(state, inner_batches=stacked(1), outer_batch=())
    assert float(info.stats["penalty"]) == pytest.approx(15.0)


@pytest.mark.parametrize("order", [1, 2])
def test_f2sa_reaches_the_optimum(order):
    state, infos = run(bilevel.f2sa, 10, 300, optax.sgd(0.1), penalty=20.0, order=order)
    distance = np.linalg.norm(state.hparams - OPTIMUM)
    assert distance <= 0.05 * np.linalg.norm(X - OPTIMUM)
    assert int(infos.result[-1]) == Status.ok
    # A stable step for every penalty: that of the penalized loss does not grow with it.
    assert np.isfinite(np.asarray(infos.value)).all()


def test_pbgd_reaches_the_stationary_point_of_its_penalty():
    """Which is as far from the optimum as the penalty is low: O(1/sigma)."""
    distances = []
    for sigma in (10.0, 100.0):
        state, _ = run(bilevel.pbgd, 2, 20000, optax.sgd(0.1 / sigma), penalty=sigma)
        expected = Q.root(functools.partial(Q.penalized, sigma=sigma))
        np.testing.assert_allclose(state.hparams, expected, rtol=1e-5)
        distances.append(np.linalg.norm(expected - OPTIMUM))
    assert 0.08 < distances[1] / distances[0] < 0.12


def test_a_step_of_pbgd_written_out():
    z, sigma, rate = np.ones(P), 7.0, 0.3
    direction, info, new = one_step(bilevel.pbgd, steps=2, z=z, penalty=sigma)
    trained = z
    for _ in range(2):
        trained = trained - rate * (Q.A @ trained + Q.C.T @ X + Q.a)
    # The penalized parameters move by the gradient at their old values, as the direction.
    slope_f, slope_h = Q.F @ z + Q.K.T @ X + Q.c, Q.A @ z + Q.C.T @ X + Q.a
    np.testing.assert_allclose(new.params, trained)
    np.testing.assert_allclose(new.penalized[0].params, z - rate * (slope_h + slope_f / sigma))
    np.testing.assert_allclose(direction, Q.G @ X + Q.K @ z + Q.e + sigma * Q.C @ (z - trained))
    residual = sigma * (slope_h - (Q.A @ trained + Q.C.T @ X + Q.a)) + slope_f
    np.testing.assert_allclose(info.stats["residual_norm"], np.linalg.norm(residual))
    np.testing.assert_allclose(info.stats["rhs_norm"], np.linalg.norm(slope_f))


@pytest.mark.parametrize("barrier", ["gradient", "gap"])
def test_a_step_of_bome_written_out(barrier):
    z, eta, rate = np.ones(P), 0.4, 0.3
    direction, info, new = one_step(bilevel.bome, steps=3, z=z, eta=eta, barrier=barrier)
    trained = z
    for _ in range(3):
        trained = trained - rate * (Q.A @ trained + Q.C.T @ X + Q.a)
    grad_f = np.concatenate([Q.F @ z + Q.K.T @ X + Q.c, Q.G @ X + Q.K @ z + Q.e])
    grad_q = np.concatenate([Q.A @ z + Q.C.T @ X + Q.a, Q.C @ (z - trained)])
    gap = Q.inner(z, X, ()) - Q.inner(trained, X, ())
    phi = eta * (grad_q @ grad_q if barrier == "gradient" else gap)
    multiplier = max((phi - grad_f @ grad_q) / (grad_q @ grad_q), 0)
    assert multiplier > 0
    whole = grad_f + multiplier * grad_q
    np.testing.assert_allclose(direction, whole[P:], rtol=1e-9)
    np.testing.assert_allclose(new.penalized[0].params, z - rate * whole[:P], rtol=1e-9)
    np.testing.assert_allclose(new.params, trained)
    for name, value in (("penalty", multiplier), ("gap", gap),
                        ("gap_slope", np.linalg.norm(grad_q)),
                        ("slope_norm", np.linalg.norm(whole))):  # fmt: skip
        np.testing.assert_allclose(info.stats[name], value, rtol=1e-9)


def test_bome_lowers_the_gap_and_its_distance_falls_as_the_inverse_multiplier():
    """Nobody chooses its multiplier, which grows as rates fall; the bias is that of a penalty."""
    distances, multipliers, gaps = [], [], []
    for count in (2000, 8000):
        tx = optax.sgd(optax.polynomial_schedule(0.02, 1e-4, 1, count))
        state, infos = run(bilevel.bome, 20, count, tx, penalized_tx=tx)
        distances.append(np.linalg.norm(state.hparams - OPTIMUM))
        multipliers.append(float(infos.stats["penalty"][-1]))
        gaps.append(float(infos.stats["gap"][-1]))
        assert np.min(infos.stats["gap"]) >= 0 and int(infos.result.max()) == Status.ok
    assert multipliers[1] > 1.8 * multipliers[0] > 200
    assert gaps[1] < gaps[0] / 3 < 1e-4
    assert distances[0] <= 0.05 * np.linalg.norm(X - OPTIMUM)
    assert distances[1] * multipliers[1] == pytest.approx(distances[0] * multipliers[0], rel=0.05)


def test_bome_at_a_minimum_of_the_inner_loss_divides_by_nothing():
    """The gradient of the gap is zero there: the step is one on the outer loss alone."""

    class Still:
        def inner(self, z, x, batch):
            return jnp.sum(x**2 * z**2) / 2

        def outer(self, z, x, batch):
            return jnp.sum((x - 2) ** 2) / 2 + jnp.sum(z)

    direction, info, new = one_step(bilevel.bome, steps=2, z=np.zeros(D), losses=Still())
    np.testing.assert_allclose(direction, X - 2)
    np.testing.assert_allclose(new.penalized[0].params, -0.3 * np.ones(D))
    assert float(info.stats["penalty"]) == 0 and int(info.result) == Status.ok


def test_bome_never_pushes_the_gap_up():
    """Where descent on the outer loss lowers the gap fast enough by itself, nothing is added."""

    class Alike(Quadratic):
        def outer(self, z, x, batch):
            return 3 * self.inner(z, x, batch)

    direction, info, _ = one_step(bilevel.bome, steps=300, z=np.ones(P), losses=Alike())
    assert float(info.stats["penalty"]) == 0
    slope = jax.grad(Alike().outer, 1)(jnp.ones(P), jnp.asarray(X), ())
    np.testing.assert_allclose(direction, slope, rtol=1e-9)


METHODS: dict[str, Any] = {
    "f2sa": bilevel.f2sa, "f2sa_2": functools.partial(bilevel.f2sa, order=2),
    "pbgd": bilevel.pbgd, "bome": bilevel.bome,
}  # fmt: skip


@jax.custom_vjp
def first_order(x):
    """Half a square whose gradient refuses to be differentiated."""
    return x**2 / 2


@jax.custom_vjp
def flat(x):
    return x


def refuse(*_):
    raise AssertionError("a second derivative was asked for")


flat.defvjp(refuse, refuse)
first_order.defvjp(lambda x: (first_order(x), x), lambda x, ct: (ct * flat(x),))


@pytest.mark.parametrize("name", METHODS)
def test_no_second_derivative_is_asked_for(name):
    def train(w, lam, batch):
        return jnp.sum(first_order(w - lam)) + 0.1 * jnp.sum(lam * w)

    def valid(w, lam, batch):
        return jnp.sum(first_order(w - 1))

    w, given = jnp.zeros(3), dict(inner_batches=stacked(5), outer_batch=())
    algorithm = METHODS[name](valid, train, TX, TX, 5)
    new, info = jax.jit(algorithm.step)(algorithm.init(w, w), **given)
    assert float(info.cost.products) == 0 and np.isfinite(new.hparams).all()
    second = bilevel.alternate(valid, train, bilevel.Implicit(bilevel.CG()), TX, TX, 5)
    with pytest.raises((AssertionError, TypeError)):
        jax.jit(second.step)(second.init(w, w), **given)


def test_statuses_say_how_far_to_trust_the_difference():
    far = np.full(P, 30.0)
    _, info, _ = one_step(bilevel.f2sa, steps=1, z=far)
    assert int(info.result) in (Status.truncated, Status.worse_than_zero)
    ratio = info.stats["residual_norm"] / info.stats["rhs_norm"]
    assert float(ratio) > 0.1
    _, info, _ = one_step(bilevel.f2sa, penalty=1e18)
    assert int(info.result) == Status.rounding
    _, info, _ = one_step(bilevel.f2sa, penalty=lambda k: -1.0)
    assert int(info.result) == Status.invalid_setting
    np.testing.assert_allclose(
        one_step(bilevel.f2sa)[1].stats["min_curvature"], 2.0, atol=1.0
    )  # eigenvalues from 1 to 3

    class Concave(Quadratic):
        def inner(self, z, x, batch):
            return -super().inner(z, x, batch)

    _, info, _ = one_step(bilevel.f2sa, steps=3, losses=Concave())
    assert int(info.result) == Status.negative_curvature


@pytest.mark.parametrize("name", ["f2sa", "f2sa_2", "pbgd"])
def test_an_outer_loss_without_a_bound_is_not_taken_for_an_answer(name):
    """The penalized loss has no minimum where the penalty is too low: values run off."""

    class Unbounded(Quadratic):
        def outer(self, z, x, batch):
            return -20 * jnp.sum(z**2)

    losses = Unbounded()
    algorithm = METHODS[name](losses.outer, losses.inner, TX, optax.sgd(1e-6), 20, penalty=2.0)
    state = algorithm.init(jnp.ones(P), jnp.asarray(X))

    def step(s, _):
        s, info = algorithm.step(s, inner_batches=stacked(20), outer_batch=())
        return s, info.result

    results = jax.jit(lambda s: jax.lax.scan(step, s, length=500))(state)[1]
    assert int(results.min()) != Status.ok and int(results[-1]) >= Status.nonfinite_input


def test_frozen_leaves_stand_still_and_do_not_respond():
    def train(w, lam, batch):
        return jnp.sum((w["a"] - lam) ** 2) + jnp.sum((w["a"] - w["b"]) ** 2)

    def valid(w, lam, batch):
        return jnp.sum((w["a"] - 1) ** 2) + jnp.sum(w["b"] ** 2)

    labels = {"a": "train", "b": "keep"}
    tx = optax.multi_transform({"train": optax.sgd(0.2), "keep": optax.set_to_zero()}, labels)
    params = {"a": jnp.zeros(2), "b": jnp.full(2, 3.0)}
    for name, make in METHODS.items():
        algorithm = make(valid, train, tx, optax.sgd(1e-3), 200)
        state = algorithm.init(params, jnp.ones(2))
        for _ in range(2):
            state, info = jax.jit(algorithm.step)(state, inner_batches=stacked(200), outer_batch=())
        for copy in (state.trained, *state.penalized):
            np.testing.assert_array_equal(copy.params["b"], params["b"])
        if name.startswith("f2sa"):  # a leaf that cannot respond is no part of the residual
            assert int(info.result) == Status.ok


def test_copies_have_statistics_of_their_own():
    def train(w, lam, batch, seen):
        return jnp.sum((w - lam) ** 2), 0.5 * seen + 0.5 * jnp.sum(w)

    def valid(w, lam, batch, seen):
        return jnp.sum((w - 1) ** 2) + seen * jnp.sum(w), seen

    algorithm = bilevel.f2sa(valid, train, TX, optax.sgd(0.0), 5, penalty=1.0, has_state=True)
    state = algorithm.init(jnp.ones(2), jnp.full(2, 2.0), jnp.asarray(0.0))
    for _ in range(10):
        state, _ = jax.jit(algorithm.step)(state, inner_batches=stacked(5), outer_batch=())
    assert float(state.model_state) == pytest.approx(4.0, abs=1e-3)
    own = state.penalized[0]
    assert float(own.model_state) == pytest.approx(float(jnp.sum(own.params)), abs=1e-2)
    assert abs(float(own.model_state) - 4.0) > 0.5


WRONG: dict[str, tuple[Any, str]] = {
    "order": (lambda: one_step(bilevel.f2sa, order=0), "`order` must be at least 1"),
    "penalty": (lambda: one_step(bilevel.f2sa, penalty=0.0), "`penalty` must be greater than 0"),
    "schedule": (
        lambda: one_step(bilevel.f2sa, penalty=lambda k: jnp.ones(2)),
        "`penalty` must return one number for a step",
    ),
    "growth": (lambda: one_step(bilevel.f2sa, growth=-1.0), "`growth` must be at least 0"),
    "eta": (lambda: one_step(bilevel.bome, eta=-1.0), "`eta` must be at least 0"),
    "barrier": (
        lambda: one_step(bilevel.bome, barrier="value"),
        "`barrier` must be 'gradient' or 'gap', got 'value'",
    ),
    "steps": (lambda: one_step(bilevel.pbgd, steps=0), "`inner_steps` must be at least 1"),
    "tuned": (lambda: one_step(bilevel.pbgd, tx=lambda lam: TX), "`inner_tx` must be an optax"),
    "search": (
        lambda: one_step(bilevel.pbgd, penalized_tx=optax.lbfgs()),
        "`penalized_tx` evaluates its loss at other parameters",
    ),
    "state": (
        lambda: bilevel.f2sa(Q.outer, Q.inner, TX, TX, 2).step(
            (), inner_batches=stacked(2), outer_batch=()
        ),
        "`state` must be what `init` returns, a PenaltyState",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    call, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_stacks_and_unread_hyperparameters_are_refused():
    algorithm = bilevel.f2sa(Q.outer, Q.inner, TX, TX, 2)
    state = algorithm.init(jnp.zeros(P), jnp.asarray(X))
    with pytest.raises(ValueError, match="expected a leading axis of 2"):
        algorithm.step(state, inner_batches=stacked(3), outer_batch=())

    def unread(w, lam, batch):
        return jnp.sum(w**2) + jnp.sum(lam**2)  # the gradient in w does not depend on lam

    algorithm = bilevel.f2sa(lambda w, lam, b: jnp.sum(w), unread, TX, TX, 2)
    with pytest.raises(ValueError, match="No derivative reaches hparams"):
        algorithm.step(
            algorithm.init(jnp.zeros(P), jnp.asarray(X)), inner_batches=stacked(2), outer_batch=()
        )


def test_the_difference_reads_its_own_batch_if_it_is_given():
    def train(w, lam, batch):
        return jnp.sum((w - lam * batch) ** 2)

    def valid(w, lam, batch):
        return jnp.sum(w)

    algorithm = bilevel.f2sa(valid, train, TX, optax.sgd(1.0), 2)
    state = algorithm.init(jnp.ones(1), jnp.ones(1))
    batches = jnp.array([[1.0], [2.0]])
    moved = [
        algorithm.step(state, inner_batches=batches, outer_batch=(), **rest)[0].hparams
        for rest in ({}, {"response_batch": batches[1]}, {"response_batch": batches[0]})
    ]
    assert moved[0] == moved[1] != moved[2]
