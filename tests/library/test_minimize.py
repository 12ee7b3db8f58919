"""`minimize`: closed forms, optimality conditions, warm starts, statuses, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Dense, FixedPoint, Implicit, minimize, proximal_step
from bilevel.ground.status import Status

K = jax.random.split(jax.random.key(1), 4)
N = 12
X = jax.random.normal(K[0], (60, N)) * jnp.logspace(0, -1.5, N)[None]
Y = X @ jax.random.normal(K[1], (N,)) + 0.3 * jax.random.normal(K[2], (60,))
BATCH = (X, Y)


def error(w, lam, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def ridge(w, lam, batch):
    return error(w, lam, batch) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def logistic(w, lam, batch):
    margins = jnp.sign(batch[1]) * (batch[0] @ w)
    return jnp.mean(jnp.logaddexp(0, -margins)) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def soft(w, lam, step):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * jnp.exp(lam), 0)


def simplex(w, lam, step):
    return optax.projections.projection_simplex(w)


def exact(lam):
    return jnp.linalg.solve(X.T @ X / 60 + jnp.exp(lam) * jnp.eye(N), X.T @ Y / 60)


FIND = jax.jit(minimize, static_argnums=0, static_argnames=("prox", "max_steps"))


@pytest.mark.parametrize("tol", [1e-3, 1e-10])
def test_the_tolerance_bounds_the_gradient_and_with_it_the_error(tol):
    found = FIND(ridge, jnp.zeros(N), -4.0, BATCH, tol=tol)
    bilevel.raise_for_status(found)
    length = float(jnp.linalg.norm(jax.grad(ridge)(found.params, -4.0, BATCH)))
    np.testing.assert_allclose(found.stats["stationarity"], length, rtol=1e-6, atol=1e-15)
    # Strongly convex with exp(lam): |w - w*| <= |gradient| / mu.
    assert length <= tol
    assert float(jnp.linalg.norm(found.params - exact(-4.0))) <= tol / np.exp(-4.0)
    assert int(found.stats["num_steps"]) <= int(found.stats["num_gradients"]) < 120


def test_one_program_for_every_tolerance_start_and_strength():
    before = FIND._cache_size()
    cold = FIND(logistic, jnp.zeros(N), -5.0, BATCH, tol=1e-6)
    finer = FIND(logistic, cold.params, -5.0, BATCH, tol=1e-9)
    near = FIND(logistic, cold.params, -5.01, BATCH, tol=1e-6)
    assert FIND._cache_size() == before + 1
    assert int(near.stats["num_gradients"]) < int(cold.stats["num_gradients"])
    assert float(finer.stats["stationarity"]) <= 1e-9 < float(cold.stats["stationarity"]) <= 1e-6
    again = FIND(logistic, finer.params, -5.0, BATCH, tol=1e-8)
    assert int(again.stats["num_steps"]) == 0 and int(again.stats["num_gradients"]) == 1
    np.testing.assert_array_equal(again.params, finer.params)


def steep(w, lam, batch):
    """The same solution for strengths 300 times larger; a step of one is far too long."""
    return 300 * error(w, lam, batch)


@pytest.mark.parametrize(("loss", "more"), [(error, 0.0), (steep, np.log(300))])
def test_lasso_satisfies_its_optimality_conditions(loss, more):
    lam = jnp.linspace(-4.0, -2.0, N) + more
    found = FIND(loss, jnp.zeros(N), lam, BATCH, tol=1e-9, prox=soft)
    bilevel.raise_for_status(found)
    w, gradient = found.params, jax.grad(loss)(found.params, lam, BATCH)
    zero = w == 0
    assert 2 <= int(jnp.sum(zero)) <= N - 2
    assert bool(jnp.all(jnp.abs(gradient[zero]) <= jnp.exp(lam[zero])))
    np.testing.assert_allclose(
        gradient[~zero], -jnp.sign(w[~zero]) * jnp.exp(lam[~zero]), atol=1e-8
    )


@pytest.mark.parametrize("step_size", [0.1, 1.0])
def test_the_condition_of_a_proximal_solution(step_size):
    lam = jnp.linspace(-4.0, -2.0, N)

    def valid(w, lam, batch):
        return jnp.sum((w - 0.3) ** 2)

    @jax.jit
    def value(lam):
        return valid(minimize(error, jnp.zeros(N), lam, BATCH, tol=1e-13, prox=soft).params, 0, 0)

    w = FIND(error, jnp.zeros(N), lam, BATCH, tol=1e-13, prox=soft).params
    condition = FixedPoint(proximal_step(error, soft, step_size))
    np.testing.assert_allclose(condition.step(w, lam, BATCH), w, atol=1e-12)
    found = bilevel.hypergrad(valid, condition, Implicit(Dense()))(
        w, lam, inner_batch=BATCH, outer_batch=0.0
    )
    h = 1e-5
    differences = [(value(lam + h * e) - value(lam - h * e)) / (2 * h) for e in jnp.eye(N)]
    np.testing.assert_allclose(found, jnp.stack(differences), rtol=1e-5, atol=1e-7)


def test_a_projection_keeps_the_constraint():
    found = FIND(error, jnp.full(N, 1 / N), 0.0, BATCH, tol=1e-10, prox=simplex)
    bilevel.raise_for_status(found)
    np.testing.assert_allclose(jnp.sum(found.params), 1.0, rtol=1e-12)
    assert bool(jnp.all(found.params >= 0)) and bool(jnp.any(found.params == 0))


def test_the_units_of_the_loss_and_of_the_weights_do_not_matter():
    # A step of one is right for none of these: it is found, in both directions.
    def scaled(units):
        def loss(w, lam, batch):
            return units * error(w, lam, batch)

        def prox(w, lam, step):
            return soft(w, lam, units * step)

        start = jnp.zeros(N, jnp.float64)
        return FIND(loss, start, jnp.log(0.01), BATCH, tol=1e-8 * units, prox=prox)

    plain, *others = (scaled(units) for units in (1.0, 1e-4, 1e4))
    for found in others:
        # Strongly convex with the least curvature of the data, a thousandth: |w - w*| <= tol / mu.
        np.testing.assert_allclose(found.params, plain.params, atol=1e-4)
        assert int(found.stats["num_gradients"]) <= 1.3 * int(plain.stats["num_gradients"])


def test_a_composite_brings_its_first_step_and_a_bad_one_is_found_out():
    curvature = float(jnp.linalg.eigvalsh(X.T @ X / 60)[-1])
    gradients = {}
    for name, step in {"good": 1 / curvature, "long": 1e6, "short": 1e-3 / curvature}.items():
        inner = bilevel.Composite(error, soft, step)
        found = minimize(inner, jnp.zeros(N), jnp.log(0.01), BATCH, tol=1e-6)
        bilevel.raise_for_status(found)
        gradients[name] = int(found.stats["num_gradients"])
    assert gradients["good"] <= gradients["short"] <= gradients["good"] + 100
    assert gradients["long"] <= 1.3 * gradients["good"]


def test_known_curvatures_make_the_steps_of_the_theory():
    """The momentum of mu and L: |h'| falls by (1 - sqrt(mu/L)) a step, up to L/mu before it."""
    bend = jnp.linalg.eigvalsh(X.T @ X / 60)
    mu, largest = (float(b + jnp.exp(-7.0)) for b in (bend[0], bend[-1]))
    start = jnp.zeros(N)
    first = float(jnp.linalg.norm(jax.grad(ridge)(start, -7.0, BATCH)))
    for tol in (1e-4, 1e-9):
        found = FIND(ridge, start, -7.0, BATCH, tol=tol, curvatures=(mu, largest))
        bilevel.raise_for_status(found)
        length = float(jnp.linalg.norm(jax.grad(ridge)(found.params, -7.0, BATCH)))
        np.testing.assert_allclose(found.stats["stationarity"], length, rtol=1e-4)
        assert length <= tol
        steps = int(found.stats["num_steps"])
        assert int(found.stats["num_gradients"]) == steps + 1
        rate = -np.log1p(-np.sqrt(mu / largest))
        assert steps <= np.log(first * largest / mu / tol) / rate < 800
    # Plain steps of 1/L fall by 1 - mu/L, at a condition of 600: a thousand do not suffice.
    no_momentum = FIND(ridge, start, -7.0, BATCH, tol=1e-9, curvatures=(largest, largest))
    assert int(no_momentum.result) == Status.max_steps
    one = FIND(one_curvature, start, 0.0, BATCH, tol=1e-12, curvatures=(2.0, 2.0))
    assert int(one.result) == Status.ok and int(one.stats["num_steps"]) == 1


def one_curvature(w, lam, batch):
    return jnp.sum((w - 1) ** 2)


def test_solutions_are_differentiated_and_mapped():
    def solve(w, lam, batch):
        return minimize(ridge, w, lam, batch, tol=1e-12).params

    solution = bilevel.with_response(solve, ridge, Implicit(Dense()))
    value = jax.jit(jax.vmap(jax.grad(lambda lam: jnp.sum(solution(jnp.zeros(N), lam, BATCH)))))
    lams = jnp.array([-3.0, -1.0])
    truth = jax.vmap(jax.grad(lambda lam: jnp.sum(exact(lam))))(lams)
    np.testing.assert_allclose(value(lams), truth, rtol=1e-8)


@pytest.mark.parametrize("prox", [None, soft])
def test_what_became_of_it_is_told(prox):
    start = jnp.ones(N)
    short = FIND(ridge, start, -4.0, BATCH, tol=1e-9, max_steps=2, prox=prox)
    assert int(short.result) == Status.max_steps and int(short.stats["num_steps"]) == 2
    never = FIND(logistic, start, -4.0, BATCH, tol=0.0, max_steps=3000, prox=prox)
    assert int(never.result) in (Status.stagnated, Status.ok)
    assert float(never.stats["stationarity"]) < 1e-10
    nan = FIND(ridge, start, -4.0, (X * jnp.nan, Y), tol=1e-9, prox=prox)
    assert int(nan.result) == Status.nonfinite_output
    single = jax.tree.map(jnp.float32, (start, BATCH))
    found = FIND(ridge, single[0], jnp.float32(-4.0), single[1], prox=prox)
    assert int(found.result) == Status.ok and found.params.dtype == jnp.float32
    assert float(found.stats["tol"]) >= 3e-4  # the root of its rounding


def test_a_minimiser_of_optimistix_is_judged_by_the_gradient_where_it_ends():
    optimistix = pytest.importorskip("optimistix")

    @jax.jit
    def found(lam, atol, tol):
        solver = optimistix.BFGS(rtol=0.0, atol=atol)
        return minimize(ridge, jnp.zeros(N), lam, BATCH, tol=tol, max_steps=500, solver=solver)

    good = found(-1.0, 1e-12, 1e-8)
    # the error is at most the gradient over the least curvature, here the penalty's
    np.testing.assert_allclose(good.params, exact(-1.0), atol=1e-8 / np.exp(-1.0))
    assert int(good.result) == Status.ok and float(good.stats["stationarity"]) <= 1e-8
    # a solver content with less than was asked for is found out
    rough = found(-1.0, 1e-1, 1e-12)
    assert int(rough.result) == Status.stagnated
    solver = optimistix.BFGS(rtol=0.0, atol=1e-12)
    short = minimize(ridge, jnp.zeros(N), -1.0, BATCH, max_steps=1, solver=solver)
    assert int(short.result) == Status.max_steps
    with pytest.raises(ValueError, match="`solver` minimizes a smooth loss"):
        minimize(ridge, jnp.zeros(N), -1.0, BATCH, prox=soft, solver=solver)
    with pytest.raises(TypeError, match="`solver` must be a minimizer of optimistix"):
        minimize(ridge, jnp.zeros(N), -1.0, BATCH, solver="bfgs")


def test_bad_calls():
    def call(loss=ridge, **changes):
        minimize(loss, jnp.zeros(N), -4.0, BATCH, **changes)

    for match, changes in (
        ("`tol` must be at least 0", dict(tol=-1.0)),
        ("`tol` must be a real number", dict(tol="1e-3")),
        ("`max_steps` must be at least 1", dict(max_steps=0)),
        ("`prox` must be a function prox", dict(prox=1)),
        (r"`prox` cannot be called as prox\(params", dict(prox=lambda w: w)),
        ("result of `prox` has shape", dict(prox=lambda w, lam, s: w[:2])),
        ("`curvatures` is given together", dict(prox=soft, curvatures=(0.1, 1.0))),
        (r"`curvatures` must be a pair \(mu, L\)", dict(curvatures=1.0)),
        (r"`curvatures` must be \(mu, L\) with mu", dict(curvatures=(2.0, 1.0))),
        (r"`curvatures\[1\]` must be greater than 0", dict(curvatures=(0.0, 0.0))),
        ("`inner` must be a function loss", dict(loss=3)),
        ("`inner` must return a scalar", dict(loss=lambda w, lam, b: w)),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            call(**changes)
    with pytest.raises(ValueError, match="batch.* is empty"):
        minimize(ridge, jnp.zeros(N), -4.0, (X[:0], Y[:0]))
