"""Held-out data and cross-validation: against scikit-learn, closed forms, differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, Composite, Dense, Implicit
from bilevel.objectives import CrossValidation, HeldOut, k_folds

N, D = 23, 4  # five folds of unequal sizes: two groups
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
Y = X @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.3 * RNG.normal(size=N)
DATA = (X, Y)
START = jnp.zeros(D)


def squares(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def ridge(w, lam, batch):
    return squares(w, lam, batch) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def closed(w, lam, batch):
    x, y = batch
    n = x.shape[0]
    return jnp.linalg.solve(x.T @ x / n + jnp.exp(lam) * jnp.eye(D), x.T @ y / n)


FOLDS = k_folds(N, 5, seed=1)
CV = CrossValidation(FOLDS, squares, ridge)
INNER, OUTER = CV.inner_batch(DATA), CV.outer_batch(DATA)


@functools.cache
def value_and_grad():
    solve = bilevel.with_response(CV.each(closed), CV.inner, Implicit(Dense()))
    return jax.jit(
        jax.value_and_grad(lambda lam: CV.outer(solve(CV.init(START), lam, INNER), lam, OUTER))
    )


def by_hand(lam):
    values = []
    for train, test in FOLDS:
        a = X[train].T @ X[train] / len(train) + np.exp(lam) * np.eye(D)
        w = np.linalg.solve(a, X[train].T @ Y[train] / len(train))
        values.append(0.5 * np.mean((X[test] @ w - Y[test]) ** 2))
    return np.array(values)


def test_value_is_the_mean_over_the_folds_in_their_order():
    values = by_hand(-1.0)
    scores = jax.jit(lambda w: CV.scores(CV.each(closed)(w, -1.0, INNER), -1.0, OUTER))(
        CV.init(START)
    )
    np.testing.assert_allclose(scores.folds, values, rtol=1e-12)
    np.testing.assert_allclose(value_and_grad()(-1.0)[0], values.mean(), rtol=1e-12)
    np.testing.assert_allclose(scores.standard_error, values.std(ddof=1) / np.sqrt(5), rtol=1e-12)


def test_derivative_is_that_of_the_folds_refitted():
    eps = 1e-5
    difference = (by_hand(-1.0 + eps).mean() - by_hand(-1.0 - eps).mean()) / (2 * eps)
    np.testing.assert_allclose(value_and_grad()(-1.0)[1], difference, rtol=1e-8)


def test_hypergrad_solve_and_alternate_read_the_same_losses():
    @jax.jit
    def solved(lam):
        return bilevel.hypergrad_solve(
            CV.outer_and_scores, CV.inner, Implicit(CG(30, rtol=1e-12)),
            CV.each(closed)(CV.init(START), lam, INNER), lam,
            inner_batch=INNER, outer_batch=OUTER, has_aux=True,
        )  # fmt: skip

    solution = solved(jnp.asarray(-1.0))
    bilevel.raise_for_status(solution)
    np.testing.assert_allclose(solution.grads, value_and_grad()(-1.0)[1], rtol=1e-9)
    np.testing.assert_allclose(solution.aux.folds, by_hand(-1.0), rtol=1e-12)

    alg = bilevel.alternate(
        CV.outer,
        CV.inner,
        Implicit(Dense()),
        optax.sgd(0.5),
        optax.adam(0.1, b2=0.9),
        inner_steps=20,
    )
    stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (20, *x.shape)), INNER)

    def step(state, _):
        return alg.step(state, inner_batches=stack, outer_batch=OUTER)

    start = alg.init(CV.init(START), jnp.asarray(0.0))
    state, info = jax.jit(lambda s: jax.lax.scan(step, s, length=120))(start)
    grid = np.linspace(-8, 1, 200)
    best = min(by_hand(lam).mean() for lam in grid)
    assert info.value[-1] < 1.002 * best < info.value[0]


def test_agrees_with_scikit_learn():
    """The value of every strength, and the choice between them, of ``GridSearchCV``."""
    selection = pytest.importorskip("sklearn.model_selection")
    linear = pytest.importorskip("sklearn.linear_model")
    splits = list(selection.KFold(5, shuffle=True, random_state=0).split(X))
    cv = CrossValidation(
        splits, lambda w, lam, b: jnp.mean((b[0] @ w - b[1]) ** 2),
        lambda w, lam, b: jnp.sum((b[0] @ w - b[1]) ** 2) + jnp.exp(lam) * jnp.sum(w**2),
    )  # fmt: skip
    grid = np.linspace(-6, 4, 7)
    search = selection.GridSearchCV(
        linear.Ridge(fit_intercept=False), {"alpha": np.exp(grid)}, cv=splits,
        scoring="neg_mean_squared_error",
    ).fit(X, Y)  # fmt: skip

    def fit(w, lam, batch):
        return bilevel.minimize(cv.inner_loss, w, lam, batch, tol=1e-10).params

    inner, outer = cv.inner_batch(DATA), cv.outer_batch(DATA)
    values = jax.jit(
        jax.vmap(lambda lam: cv.outer(cv.each(fit)(cv.init(START), lam, inner), lam, outer))
    )(grid)
    np.testing.assert_allclose(values, -search.cv_results_["mean_test_score"], rtol=1e-7)
    assert np.argmin(values) == search.best_index_


def soft(w, lam, step):
    return bilevel.prox.l1(w, jnp.exp(lam), step)


def test_a_condition_of_every_fold_lasso():
    """The derivative of the cross-validated lasso, and its values, as of ``LassoCV``."""
    linear = pytest.importorskip("sklearn.linear_model")
    cv = CrossValidation(FOLDS, squares, Composite(squares, soft, step_size=0.5))

    def fit(w, lam, batch):
        return bilevel.minimize(cv.inner_loss, w, lam, batch, tol=1e-11).params

    assert isinstance(cv.inner, Composite)
    solve = bilevel.with_response(cv.each(fit), cv.inner, Implicit(Dense()))
    value = jax.jit(
        jax.value_and_grad(lambda lam: cv.outer(solve(cv.init(START), lam, INNER), lam, OUTER))
    )
    lam, eps = -1.5, 1e-6
    (middle, grad), (up, _), (down, _) = (value(v) for v in (lam, lam + eps, lam - eps))
    np.testing.assert_allclose(grad, (up - down) / (2 * eps), rtol=1e-6)
    path = linear.LassoCV(alphas=[np.exp(lam)], cv=FOLDS, fit_intercept=False, tol=1e-12)
    np.testing.assert_allclose(2 * middle, path.fit(X, Y).mse_path_.mean(), rtol=1e-8)


def test_other_conditions_and_single_keys():
    fixed = CrossValidation(FOLDS, squares, bilevel.FixedPoint(closed))
    w = fixed.each(closed)(fixed.init(START), -1.0, INNER)
    np.testing.assert_allclose(fixed.inner.step(w, -1.0, INNER), w, rtol=1e-12)
    root = CrossValidation(FOLDS, squares, bilevel.Root(jax.grad(ridge)))
    np.testing.assert_allclose(root.inner.equation(w, -1.0, INNER), 0, atol=1e-12)
    keys = [k for group in CV.inner_batch((X, jax.random.key(0))) for k in group[1]]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 5


def test_held_out_is_one_split():
    train, test = FOLDS[0]
    held_out = HeldOut((np.isin(np.arange(N), train), test), squares, ridge)
    w = held_out.each(closed)(held_out.init(START), -1.0, held_out.inner_batch(DATA))
    value = held_out.outer(w, -1.0, held_out.outer_batch(DATA))
    np.testing.assert_allclose(value, by_hand(-1.0)[0], rtol=1e-12)


def test_one_split_without_partition():
    shuffled = [(np.arange(5, 20), np.arange(5)), (np.arange(15), np.arange(15, 20))]
    cv = CrossValidation(shuffled, squares, ridge, partition=False)
    assert cv.inner_batch(DATA)[0][0].shape == (2, 15, D)


@pytest.mark.parametrize(
    "folds, error, words",
    [
        (5, TypeError, "`folds` must be pairs"),
        ([], ValueError, "`folds` has 0 split"),
        ([([0, 1], [2])], ValueError, "`folds` has 1 split"),
        ([([0, 1], [2]), ([0, 2], [2])], ValueError, r"`folds\[1\]` trains on example 2"),
        ([([0, 1], [2]), ([0], [2])], ValueError, "do not partition the examples: example 2 is te"),
        ([([0, 1], [3]), ([0], [1])], ValueError, "do not partition the examples: example 0 is ne"),
        ([([1, 7], [0]), ([0], [1])], ValueError, "do not partition the examples: example 7 is tr"),
        ([([0.5], [1]), ([1], [0])], TypeError, r"`folds\[0\]\[0\]` must be one array of whole"),
        ([([], [1]), ([1], [0])], ValueError, r"`folds\[0\]\[0\]` is empty"),
        ([([-1], [1]), ([1], [0])], ValueError, r"`folds\[0\]\[0\]` has the index -1"),
        ([[0, 1, 2], ([1], [0])], TypeError, r"`folds\[0\]` must be a pair"),
    ],
)
def test_folds_that_are_none_are_refused_in_words(folds, error, words):
    with pytest.raises(error, match=words):
        CrossValidation(folds, squares, ridge)


def test_bad_data_and_params_are_refused():
    with pytest.raises(ValueError, match="has shape .* but the folds are of 23 examples"):
        CV.inner_batch((X[:-1], Y))
    with pytest.raises(ValueError, match="expected the same number in every array"):
        HeldOut(([0], [1]), squares, ridge).inner_batch((X, Y[:-1]))
    with pytest.raises(ValueError, match="`data` has no arrays"):
        CV.inner_batch(())
    with pytest.raises(ValueError, match="`params` of 5 folds have a leading axis of 5"):
        CV.outer(START, -1.0, OUTER)
    with pytest.raises(ValueError, match="the batch is not one of these folds"):
        CV.outer(CV.init(START), -1.0, DATA[:1])
    with pytest.raises(ValueError, match="`folds`=5 is more than the 3 examples"):
        k_folds(3, 5)
    with pytest.raises(TypeError, match="`solve` must be a function of a single fit"):
        CV.each(3)
