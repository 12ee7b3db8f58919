"""A prior on many hyperparameters: what it adds, its limits, its choice of strength."""

import doctest
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Dense, Implicit
from bilevel.objectives import SURE, CrossValidation, HyperPrior, choose_strength, k_folds

RNG = np.random.default_rng(3)
H = {"a": jnp.asarray(RNG.normal(size=(2, 3))), "b": jnp.asarray(RNG.normal(size=4))}
FLAT = np.concatenate([np.ravel(H["a"]), H["b"]])


def around(values):
    return 0.5 * np.sum((values - np.mean(values)) ** 2)


LABELS = {"a": np.array([[0, 0, 1], [0, 1, 1]]), "b": np.array([1, 0, 0, 1])}
ALL = np.concatenate([LABELS["a"].ravel(), LABELS["b"]])


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("all", around(FLAT)),
        ("tensor", around(H["a"]) + around(H["b"])),
        ("unit", sum(around(H["a"][:, j]) for j in range(3))),
        (LABELS, around(FLAT[ALL == 0]) + around(FLAT[ALL == 1])),
    ],
)
def test_penalty_is_the_distance_to_the_mean_of_the_group(groups, expected):
    prior = HyperPrior(H, 0.7, groups)
    moved = prior.init(H)
    np.testing.assert_allclose(prior.penalty(moved), 0.7 * expected, rtol=1e-12)
    back = prior.hparams(moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), back, H)
    # The mean is free: at a given lambda it is where the penalty is least.
    slope = jax.grad(lambda shift: prior.penalty(shifted(prior, moved, shift)))(0.0)
    np.testing.assert_allclose(slope, 0, atol=1e-12)


def shifted(prior, moved, shift):
    """Other means for the same hyperparameters."""
    root = jnp.sqrt(1 + prior.strength)
    mean = jax.tree.map(lambda m: m + shift, moved.mean)
    return moved._replace(
        mean=mean, deviation=jax.tree.map(lambda d: d - shift * root, moved.deviation)
    )


def test_limits_of_the_strength():
    shared = HyperPrior(H, math.inf)
    lam = shared.hparams(shared.init(H))
    np.testing.assert_array_equal(lam["b"], np.full(4, np.mean(H["b"])))
    moved = shared.init(H)._replace(deviation=jax.tree.map(jnp.ones_like, shared.init(H).deviation))
    np.testing.assert_array_equal(shared.hparams(moved)["b"], lam["b"])  # they reach nothing
    grads = jax.grad(lambda m: jnp.sum(shared.hparams(m)["b"] ** 3) + shared.penalty(m))(moved)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    free = HyperPrior(H, 0.0)
    assert float(free.penalty(free.init(H))) == 0
    values = jax.vmap(lambda t: free.at(t).hparams(free.at(t).init(H))["b"])(
        jnp.array([0.0, 1.0, math.inf])
    )
    np.testing.assert_allclose(values[1], H["b"], rtol=1e-12)
    np.testing.assert_allclose(values[2], lam["b"], rtol=1e-12)


def test_student_is_heavy_tailed_and_gaussian_in_the_limit():
    moved = HyperPrior(H, 2.0).init(H)
    student = HyperPrior(H, 2.0, degrees=3.0)
    d2 = sum(2.0 * (H[k] - np.mean(H[k])) ** 2 for k in ["b"])
    d2 = np.concatenate([d2, np.ravel(2.0 * (H["a"] - np.mean(H["a"])) ** 2)])
    np.testing.assert_allclose(student.penalty(moved), 2 * np.sum(np.log1p(d2 / 3)), rtol=1e-12)
    wide = HyperPrior(H, 2.0, degrees=1e9)
    np.testing.assert_allclose(wide.penalty(moved), HyperPrior(H, 2.0).penalty(moved), rtol=1e-6)


N, D = 16, 3
X = RNG.normal(size=(N, D))
Y = X @ np.array([1.0, -1.0, 0.0]) + 0.5 * RNG.normal(size=N)


def squares(w, lam, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def ridge(w, lam, batch):
    return squares(w, lam, batch) + 0.5 * jnp.sum(jnp.exp(lam["decay"]) * w**2)


def closed(w, lam, batch):
    x, y = batch
    n = x.shape[0]
    return jnp.linalg.solve(x.T @ x / n + jnp.diag(jnp.exp(lam["decay"])), x.T @ y / n)


START = {"decay": jnp.array([-1.0, 0.0, -2.0])}
CV = CrossValidation(k_folds(N, 4), squares, ridge)
TRAIN, TEST = CV.inner_batch((X, Y)), CV.outer_batch((X, Y))


@pytest.mark.parametrize("strength", [0.3, math.inf])
def test_with_cross_validation_the_hypergradient_is_that_of_the_refitted(strength):
    prior = HyperPrior(START, strength, degrees=4.0)
    outer, inner = prior.outer(CV.outer_and_scores), prior.inner(CV.inner)

    @jax.jit
    def run(moved):
        w = CV.each(closed)(CV.init(jnp.zeros(D)), prior.hparams(moved), TRAIN)
        return bilevel.hypergrad_solve(
            outer, inner, Implicit(Dense()), w, moved, inner_batch=TRAIN, outer_batch=TEST,
            has_aux=True,
        )  # fmt: skip

    name, eps = "['decay']", 1e-5
    moved = prior.init(START)._replace(deviation={name: jnp.array([0.4, -0.3, 0.2])})
    solution = run(moved)
    np.testing.assert_allclose(solution.value, solution.aux.mean + prior.penalty(moved))
    for j in range(D):
        at = moved.deviation[name].at[j]
        up, down = (run(moved._replace(deviation={name: at.add(e)})).value for e in (eps, -eps))
        got = solution.grads.deviation[name][j]
        np.testing.assert_allclose(got, (up - down) / (2 * eps), rtol=1e-6, atol=1e-12)


def test_in_loops_an_infinite_strength_is_one_shared_hyperparameter():
    """The same run as of one number, with alternation; and the prior rides along in self-tuning."""
    prior = HyperPrior(START, math.inf)
    shared = lambda f: lambda w, lam, *rest: f(w, {"decay": jnp.broadcast_to(lam, D)}, *rest)  # noqa: E731
    stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (5, *x.shape)), TRAIN)

    def run(outer, inner, start):
        alg = bilevel.alternate(
            outer, inner, Implicit(Dense()), optax.sgd(0.3), optax.sgd(0.5), inner_steps=5
        )
        step = lambda s, _: alg.step(s, inner_batches=stack, outer_batch=TEST)  # noqa: E731
        return jax.jit(lambda s: jax.lax.scan(step, s, length=8))(
            alg.init(CV.init(jnp.zeros(D)), start)
        )

    state, info = run(prior.outer(CV.outer), prior.inner(CV.inner), prior.init(START))
    _, expected = run(shared(CV.outer), shared(CV.inner), jnp.asarray(-1.0))
    np.testing.assert_allclose(info.value, expected.value, rtol=1e-12)
    assert info.value[-1] != info.value[0]

    tuning = bilevel.self_tuning(
        prior.outer(CV.outer), prior.inner(CV.inner), optax.sgd(0.1), optax.adam(0.1),
        inner_steps=5, groups=1,
    )  # fmt: skip
    state = tuning.init(CV.init(jnp.zeros(D)), prior.at(0.1).init(START))
    _, info = jax.jit(tuning.step)(
        state, inner_batches=stack, outer_batch=TEST, key=jax.random.key(0)
    )
    assert jnp.isfinite(info.value)


def test_with_sure_the_gradient_is_that_of_the_sum():
    sure = SURE(0.5, lambda w, lam, b: b[0] @ w, ridge, response=Implicit(Dense()))
    prior = HyperPrior(START, 0.3)
    moved = prior.init(START)
    outer = prior.outer(sure.outer)
    w = closed(None, START, (X, Y))
    got = jax.jit(jax.grad(outer, argnums=1))(w, moved, (X, Y))
    plain = jax.jit(jax.grad(sure.outer, argnums=1))(w, START, (X, Y))["decay"]
    expected = plain / np.sqrt(1.3) + 0.3 / 1.3 * moved.deviation["['decay']"]
    np.testing.assert_allclose(got.deviation["['decay']"], expected, rtol=1e-10)
    np.testing.assert_allclose(got.mean["['decay']"], jnp.sum(plain), rtol=1e-10)


def test_leaves_that_it_does_not_hold_for_pass_through():
    prior = HyperPrior(H, math.inf, leaves="a")
    lam = prior.hparams(prior.init(H))
    np.testing.assert_array_equal(lam["b"], H["b"])
    np.testing.assert_allclose(lam["a"], np.full((2, 3), np.mean(H["a"])))


SPLITS = [([0, 1], [2]), ([0, 2], [1]), ([1, 2], [0])]


def choose(scores, **settings):
    """Each candidate scores what the table says."""
    calls = iter(np.ravel(scores))
    return choose_strength(
        HyperPrior(H, 0.0), lambda prior, train: prior, lambda prior, test: next(calls), SPLITS,
        strengths=(1.0, math.inf, 0.1), **settings,
    )  # fmt: skip


def test_the_strength_is_chosen_and_falls_back_to_sharing():
    tied = choose([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    assert tied.strength == math.inf == tied.prior.strength
    np.testing.assert_array_equal(tied.strengths, [math.inf, 1.0, 0.1])
    better = [[1.0, 2.0, 3.0], [0.5, 1.7, 2.9], [9.0, 9.0, math.nan]]
    assert choose(better).strength == 1.0
    assert choose(better, rule="one_standard_error").strength == 1.0
    hardly = [[1.0, 2.0, 3.0], [0.5, 2.3, 2.9], [9.0, 9.0, 9.0]]
    assert choose(hardly).strength == 1.0
    assert choose(hardly, rule="one_standard_error").strength == math.inf
    with pytest.raises(ValueError, match="no strength has finite scores"):
        choose(np.full((3, 3), math.nan))


def test_many_are_taken_only_where_they_are_clearly_better():
    # Gains over sharing of 0.5, 0.5, 0.2: mean 0.4, error 0.1; the other candidate is far behind.
    scores = [[1.0, 2.0, 3.0], [0.5, 1.5, 2.8], [9.0, 9.0, 9.0]]
    for errors, expected in ((3.9, 1.0), (4.1, math.inf)):
        choice = choose(scores, rule="clearly_better", errors=errors)
        assert choice.strength == expected
        np.testing.assert_allclose(choice.gains, [0, 0.4, -7], rtol=1e-12)
        np.testing.assert_allclose(choice.gain_errors[1], 0.1, rtol=1e-12)
    broken = [[math.nan] * 3, *scores[1:]]  # the strongest that can be judged
    assert choose(broken, rule="clearly_better").strength == 1.0


def test_losses_per_example_tell_how_sure_a_gain_is():
    losses = {math.inf: np.array([1.0, 2.0, 3.0, 4.0]), 1.0: np.array([0.9, 1.8, 2.7, 3.8])}
    gains = losses[math.inf] - losses[1.0]

    def choose(errors, splits=(([0, 1], [2, 3, 4, 5]),)):
        return choose_strength(
            HyperPrior(H, 0.0), lambda prior, train: losses[prior.strength],
            lambda tuned, test: tuned, splits, strengths=(math.inf, 1.0),
            rule="clearly_better", errors=errors,
        )  # fmt: skip

    error = gains.std(ddof=1) / 2
    choice = choose(0.99 * gains.mean() / error)
    assert choice.strength == 1.0 and choice.scores.shape == (2, 1)
    np.testing.assert_allclose(choice.gain_errors[1], error, rtol=1e-12)
    assert choose(1.01 * gains.mean() / error).strength == math.inf
    with pytest.raises(ValueError, match="`score` returned an array of shape"):
        choose(1.0, [([0, 1], [2, 3, 4])])


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: HyperPrior(H, -1.0), ValueError, "`strength` must be at least 0"),
        (lambda: HyperPrior(H, math.nan), ValueError, "`strength` must be at least 0"),
        (lambda: HyperPrior(H, jnp.ones(2)), ValueError, "`strength` has shape"),
        (lambda: HyperPrior(H, 1.0, degrees=0.0), ValueError, "`degrees` must be greater"),
        (lambda: HyperPrior(H, 1.0, "layer"), ValueError, "`groups` must be 'all'"),
        (lambda: HyperPrior(H, 1.0, {"a": 0}), ValueError, "`groups`.* must be whole numbers of"),
        (
            lambda: HyperPrior(H, 1.0, {k: v + 1 for k, v in LABELS.items()}),
            ValueError,
            "`groups` must count from 0",
        ),
        (lambda: HyperPrior({}, 1.0), ValueError, "`like` has no leaves"),
        (lambda: HyperPrior(H, 1.0).init(START), ValueError, "`hparams` has other names"),
        (lambda: choose_strength(HyperPrior(H, 1.0), 3, 4, SPLITS), TypeError, "`tune` must be a"),
        (
            lambda: choose_strength(HyperPrior(H, 1.0), max, max, []),
            ValueError,
            "`splits` has 0 pairs",
        ),
        (
            lambda: choose_strength(HyperPrior(H, 1.0), max, max, SPLITS, strengths=()),
            ValueError,
            "`strengths` is empty",
        ),
        (
            lambda: choose_strength(HyperPrior(H, 1.0), max, max, SPLITS, rule="best"),
            ValueError,
            "`rule` must be one of 'least'",
        ),
        (
            lambda: choose_strength(
                HyperPrior(H, 1.0),
                lambda a, b: a,
                lambda a, b: 1.0,
                SPLITS[:1],
                rule="one_standard_error",
            ),
            ValueError,
            "`splits` has 1 pair",
        ),
    ],
)
def test_bad_settings_are_refused_in_words(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("name", sorted(n for n in vars(bilevel.objectives) if n[0].isupper()))
def test_examples_of_objectives_run(name):
    value = getattr(bilevel.objectives, name)
    assert len((inspect.getdoc(value) or "").split()) >= 5
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):  # the reader's defaults
        for test in doctest.DocTestFinder(recurse=False).find(value, name, globs={}):
            runner.run(test)
    assert runner.failures == 0


def test_a_traced_strength_below_zero_gives_nan():
    moved = HyperPrior(jnp.zeros(2), 1.0).init(jnp.arange(2.0))
    read = jax.jit(lambda strength: HyperPrior(jnp.zeros(2), strength).hparams(moved))
    assert jnp.isfinite(read(jnp.inf)).all() and jnp.isnan(read(-0.5)).all()
