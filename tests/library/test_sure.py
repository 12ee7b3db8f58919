"""SURE and leave-one-out: closed forms of a ridge smoother, differences, the lasso's count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, Composite, Dense, Implicit
from bilevel.objectives import SURE, CrossValidation, LeaveOneOut, k_folds

N, D, SIGMA = 9, 4, 0.7
RNG = np.random.default_rng(1)
X = RNG.normal(size=(N, D))
Y = X @ np.array([1.0, -2.0, 0.5, 0.0]) + SIGMA * RNG.normal(size=N)
START, LAM = jnp.zeros(D), jnp.asarray(-0.8)
U, S, _ = np.linalg.svd(X, full_matrices=False)


def ridge(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def closed(w, lam, batch):
    x, y = batch
    return jnp.linalg.solve(x.T @ x / N + jnp.exp(lam) * jnp.eye(D), x.T @ y / N)


def predict(w, lam, batch):
    return batch[0] @ w


def oracle(lam):
    """O9: the value and its derivative, from singular values."""
    s, t = S**2 / (S**2 + N * np.exp(lam)), U.T @ Y
    rest, v = np.sum(Y**2) - np.sum(t**2), SIGMA**2
    value = np.sum((1 - s) ** 2 * t**2) + rest - N * v + 2 * v * np.sum(s)
    slope = 2 * np.sum(s * (1 - s) ** 2 * t**2) - 2 * v * np.sum(s * (1 - s))
    return value, slope


@functools.cache
def solved(**settings):
    """Value and hypergradient of ``SURE.outer``, compiled once per setting."""
    sure = SURE(SIGMA, predict, ridge, **settings)

    @jax.jit
    def run(lam):
        return bilevel.hypergrad_solve(
            sure.outer, ridge, Implicit(Dense()), closed(START, lam, (X, Y)), lam,
            inner_batch=(X, Y), outer_batch=(X, Y),
        )  # fmt: skip

    return run


def test_closed_form_of_a_ridge_smoother():
    solution = solved()(LAM)
    bilevel.raise_for_status(solution)
    value, slope = oracle(float(LAM))
    np.testing.assert_allclose(solution.value, value, rtol=1e-10)
    np.testing.assert_allclose(solution.grads, slope, rtol=1e-8)
    assert abs(solution.indirect) > 1e-3 < abs(solution.direct)


def test_functions_of_the_observations_implicit_explicit_unrolled():
    solve = bilevel.with_response(closed, ridge, Implicit(CG(20, rtol=1e-13)))

    def unrolled(y, lam):
        step = lambda _, w: w - 0.3 * jax.grad(ridge)(w, lam, (X, y))  # noqa: E731
        return X @ jax.lax.fori_loop(0, 400, step, START)

    value, slope = oracle(float(LAM))
    for estimate, rtol in (
        (lambda y, lam: X @ closed(START, lam, (X, y)), 1e-10),
        (lambda y, lam: X @ solve(START, lam, (X, y)), 1e-8),
        (unrolled, 1e-6),
    ):
        risk = jax.jit(jax.value_and_grad(lambda lam: SURE(SIGMA).risk(  # noqa: B023
            lambda y: estimate(y, lam), Y)))  # fmt: skip  # noqa: B023
        if estimate is unrolled:  # a loop of fixed length runs forwards only
            eps = 1e-5
            f = jax.jit(lambda lam: SURE(SIGMA).risk(lambda y: unrolled(y, lam), Y))
            np.testing.assert_allclose(f(LAM), value, rtol=rtol)
            np.testing.assert_allclose(jax.jit(jax.jacfwd(f))(LAM), slope, rtol=rtol)
            np.testing.assert_allclose((f(LAM + eps) - f(LAM - eps)) / (2 * eps), slope, rtol=rtol)
            continue
        got, grad = risk(LAM)
        np.testing.assert_allclose(got, value, rtol=rtol)
        np.testing.assert_allclose(grad, slope, rtol=rtol)


def test_probes_are_frozen_and_estimate_the_trace():
    count = 3
    run, eps = solved(probes=count, seed=5), 1e-5
    s = S**2 / (S**2 + N * np.exp(float(LAM)))
    error = (run(LAM).value - oracle(float(LAM))[0]) / (2 * SIGMA**2)
    assert 0 < abs(error) <= 4 * np.sqrt(2 * np.sum(s**2) / count)  # S23
    difference = (run(LAM + eps).value - run(LAM - eps).value) / (2 * eps)
    np.testing.assert_allclose(run(LAM).grads, difference, rtol=1e-8)


def test_projected_form_is_unbiased_for_the_error_of_the_unknowns():
    """Over its Gaussian noise exactly, by quadrature: the estimate is quadratic in y."""
    a = RNG.normal(size=(6, 3)) @ RNG.normal(size=(3, 5))  # rank 3: part of x is not seen
    truth, project = RNG.normal(size=5), np.linalg.pinv(a) @ a
    inverse = np.linalg.inv(a.T @ a + 0.4 * np.eye(5)) @ a.T
    mean = a @ truth
    nodes = np.concatenate([np.sqrt(6) * np.eye(6), -np.sqrt(6) * np.eye(6)])
    ys = mean + SIGMA * nodes
    for forward, error in ((a, project), (None, a)):
        sure = SURE(SIGMA, forward=forward)
        risks = jax.vmap(lambda y: sure.risk(lambda y: a @ (inverse @ y), y))(ys)  # noqa: B023
        losses = np.sum(((ys @ inverse.T - truth) @ error.T) ** 2, axis=1)
        np.testing.assert_allclose(np.mean(risks), losses.mean(), rtol=1e-10)
    one = SURE(SIGMA, forward=a, probes=20000).risk(lambda y: a @ (inverse @ y), ys[0])
    np.testing.assert_allclose(one, SURE(SIGMA, forward=a).risk(
        lambda y: a @ (inverse @ y), ys[0]), rtol=0.1)  # fmt: skip


def test_lasso_counts_its_support():
    soft = lambda w, lam, step: bilevel.prox.l1(w, jnp.exp(lam), step)  # noqa: E731
    squares = lambda w, lam, b: 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2)  # noqa: E731
    lasso = Composite(squares, soft, step_size=0.3)
    sure = SURE(SIGMA, predict, lasso)

    @jax.jit
    def run(lam):
        w = bilevel.minimize(lasso, START, lam, (X, Y), tol=1e-12).params
        return bilevel.hypergrad_solve(sure.outer, lasso, Implicit(Dense()), w, lam,
                                       inner_batch=(X, Y), outer_batch=(X, Y))  # fmt: skip

    lam, eps = jnp.asarray(-1.0), 1e-6
    solution = run(lam)
    support = int(np.sum(solution.params != 0))
    assert 0 < support < D
    expected = np.sum((X @ solution.params - Y) ** 2) + SIGMA**2 * (2 * support - N)
    np.testing.assert_allclose(solution.value, expected, rtol=1e-9)
    difference = (run(lam + eps).value - run(lam - eps).value) / (2 * eps)
    np.testing.assert_allclose(solution.grads, difference, rtol=1e-6)


def test_choice_is_close_to_the_best_risk():
    """S23: over 20 draws of the noise, at most 1.1 of the smallest true risk of the draw's grid."""
    n, d, v = 60, 20, 1.0
    x = RNG.normal(size=(n, d))
    mean = x @ RNG.normal(size=d) * 0.5
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    grid = np.linspace(-6, 2, 60)
    shrink = s**2 / (s**2 + n * np.exp(grid)[:, None])
    chosen, best = [], []
    for _ in range(20):
        y = mean + np.sqrt(v) * RNG.normal(size=n)
        fits = (shrink * (u.T @ y)) @ u.T
        risks = np.sum((fits - mean) ** 2, axis=1)
        estimates = np.asarray(
            jax.vmap(lambda s: SURE(1.0, probes=1).risk(lambda y: u @ (s * (u.T @ y)), y))(shrink)  # noqa: B023
        )
        chosen.append(risks[np.argmin(estimates)])
        best.append(risks.min())
    assert np.mean(chosen) <= 1.1 * np.mean(best)


def test_alternate_finds_the_minimum_of_the_closed_form():
    sure = SURE(SIGMA, predict, ridge)
    alg = bilevel.alternate(
        sure.outer, ridge, Implicit(Dense()), optax.sgd(0.5), optax.adam(0.1), inner_steps=10
    )
    stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (10, *x.shape)), (X, Y))
    step = lambda s, _: alg.step(s, inner_batches=stack, outer_batch=(X, Y))  # noqa: E731
    state, info = jax.jit(lambda s: jax.lax.scan(step, s, length=100))(alg.init(START, LAM))
    best = min(oracle(lam)[0] for lam in np.linspace(-9, 1, 400))
    np.testing.assert_allclose(info.value[-1], best, rtol=1e-3)


def summed(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def test_leave_one_out_is_n_folds():
    def fit(w, lam, batch):
        x, y = batch
        return jnp.linalg.solve(x.T @ x + jnp.exp(lam) * jnp.eye(D), x.T @ y)

    cv = CrossValidation(k_folds(N, N), lambda w, lam, b: jnp.mean((b[0] @ w - b[1]) ** 2), summed)

    @jax.jit
    @jax.value_and_grad
    def folds(lam):
        w = cv.each(fit)(cv.init(START), lam, cv.inner_batch((X, Y)))
        return cv.outer(w, lam, cv.outer_batch((X, Y)))

    one = LeaveOneOut(predict, summed)
    solution = jax.jit(lambda lam: bilevel.hypergrad_solve(
        one.outer, summed, Implicit(Dense()), fit(START, lam, (X, Y)), lam,
        inner_batch=(X, Y), outer_batch=(X, Y)))(LAM)  # fmt: skip
    value, grad = folds(LAM)
    np.testing.assert_allclose(solution.value, value, rtol=1e-10)
    np.testing.assert_allclose(solution.grads, grad, rtol=1e-8)
    generalized = LeaveOneOut(generalized=True).risk(lambda y: X @ fit(START, LAM, (X, y)), Y)
    s = S**2 / (S**2 + np.exp(float(LAM)))
    residual = Y - U @ (s * (U.T @ Y))
    np.testing.assert_allclose(
        generalized, N * np.sum(residual**2) / (N - s.sum()) ** 2, rtol=1e-10
    )


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: SURE(0.0), ValueError, "`sigma` must be greater than 0"),
        (lambda: SURE(-1.0), ValueError, "`sigma` must be greater than 0"),
        (lambda: SURE(1.0, predict), ValueError, "`predict` and `inner` go together"),
        (lambda: SURE(1.0, probes=0), ValueError, "`probes` must be at least 1"),
        (lambda: SURE(1.0, forward=np.ones(3)), ValueError, "`forward` has shape"),
        (lambda: SURE(1.0, 3, ridge), TypeError, "`predict` must be callable"),
        (lambda: SURE(1.0, predict, ridge, observed=3), TypeError, "`observed` must be callable"),
        (lambda: SURE(1.0, predict, ridge, observed=lambda: Y), TypeError, "`observed` cannot be"),
        (
            lambda: SURE(1.0, predict, ridge, response=bilevel.Unroll(optax.sgd(0.1), 3)),
            ValueError,
            "`response` is Unroll.* asked of an `Implicit",
        ),
        (lambda: SURE(1.0).outer(START, LAM, (X, Y)), ValueError, "`outer` needs the fit"),
        (lambda: LeaveOneOut().outer(START, LAM, (X, Y)), ValueError, "`outer` needs the fit"),
        (lambda: LeaveOneOut(predict), ValueError, "`predict` and `inner` go together"),
        (lambda: SURE(1.0).risk(3, Y), TypeError, "`estimate` must be a function"),
        (lambda: SURE(True).risk(lambda y: y, Y), TypeError, "`SURE.sigma` must be a real number"),
        (lambda: SURE(object()).risk(lambda y: y, Y), TypeError, "`SURE.sigma` must be a real"),
        (lambda: SURE(1.0).risk(lambda y: y[:2], Y), ValueError, "`estimate` returned shape"),
        (lambda: SURE(1.0).risk(lambda y: y, np.arange(3)), TypeError, "y must be one array"),
        (
            lambda: SURE(1.0, forward=np.ones((3, 2))).risk(lambda y: y, Y),
            ValueError,
            "but there are 9 observations",
        ),
    ],
)
def test_bad_settings_are_refused_in_words(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_traced_noise_that_cannot_be_gives_nan():
    y = jnp.arange(3.0)
    risk = jax.jit(lambda sigma: SURE(sigma).risk(lambda y: 0.5 * y, y))
    assert jnp.isfinite(risk(1.0)) and jnp.isnan(risk(0.0)) and jnp.isnan(risk(-1.0))
