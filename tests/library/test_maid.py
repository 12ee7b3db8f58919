"""MAID: certified errors and certain decrease on closed forms, adaptive accuracy, odd inputs."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Certificate, Status, maid

DESCENT = 1e-4


class Quadratic(NamedTuple):
    """Lower level |A2 x + A3 t - b2|^2 / 2, upper level |A1 x - b1|^2 / 2, all in closed form."""

    a1: Any
    a2: Any
    a3: Any
    b1: Any
    b2: Any

    def inner(self, x, t, batch):
        return 0.5 * jnp.sum((self.a2 @ x + self.a3 @ t - self.b2) ** 2)

    def outer(self, x, t, batch):
        return 0.5 * jnp.sum((self.a1 @ x - self.b1) ** 2)

    def solution(self, t):
        return jnp.linalg.solve(self.a2.T @ self.a2, self.a2.T @ (self.b2 - self.a3 @ t))

    def value(self, t):
        return self.outer(self.solution(t), t, None)

    @property
    def jacobian(self):
        return -self.a1 @ jnp.linalg.solve(self.a2.T @ self.a2, self.a2.T @ self.a3)

    def gradient(self, t):
        return self.jacobian.T @ (self.a1 @ self.solution(t) - self.b1)

    def optimum(self):
        d = self.jacobian
        return -jnp.linalg.solve(d.T @ d, d.T @ (self.a1 @ self.solution(jnp.zeros(M)) - self.b1))

    @property
    def certificate(self):
        a1, a2, a3 = (np.asarray(a) for a in (self.a1, self.a2, self.a3))
        return Certificate(
            float(np.linalg.eigvalsh(a2.T @ a2)[0]),
            float(np.linalg.norm(a1, 2)) ** 2,
            float(np.linalg.norm(a2.T @ a3, 2)),
        )


ROWS, M = 1000, 10


@functools.cache
def quadratic():
    r = np.random.RandomState(29)
    a1, a2 = r.standard_normal((2, ROWS, M))
    a3 = r.standard_normal((ROWS, M)) + a2
    b1 = a1 @ r.standard_normal(M) + 0.01 * r.standard_normal(ROWS)
    b2 = a2 @ r.standard_normal(M) + a3 @ r.standard_normal(M) + 0.01 * r.standard_normal(ROWS)
    return Quadratic(*map(jnp.asarray, (a1, a2, a3, b1, b2)))


# Of the closed forms: solutions of length one, and sums of a thousand squares.
ROUNDING = 1e-13
NOTHING = dict(inner_batches=jnp.zeros((1, 1)), outer_batch=jnp.zeros(1))


def run(algorithm, params, hparams, steps, **batches):
    state, step = algorithm.init(params, hparams), jax.jit(algorithm.step)
    states, infos = [state], []
    for _ in range(steps):
        state, info = step(state, **(batches or NOTHING))
        states.append(state)
        infos.append(info)
    return states, infos


def tune(accuracy, steps=150, **rest):
    q = quadratic()
    algorithm = maid(
        q.outer,
        q.inner,
        q.certificate,
        accuracy=accuracy,
        descent=DESCENT,
        **{"loosen": 1.25, **rest},
    )
    return run(algorithm, jnp.zeros(M), jnp.zeros(M), steps)


@functools.cache
def tuned(accuracy, accelerated=False):
    """A run with L-BFGS inside, or with accelerated steps that know the largest curvature."""
    largest = float(jnp.linalg.norm(quadratic().a2, 2)) ** 2
    return tune(accuracy, smoothness=largest if accelerated else None)


@jax.jit
def known(x, state):
    """The outer loss, and by how much it can differ from the true value, by hand."""
    q, c = quadratic(), quadratic().certificate
    distance = jnp.linalg.norm(jax.grad(q.inner)(x, state.hparams, None)) / c.convexity
    slope = jnp.linalg.norm(jax.grad(q.outer)(x, state.hparams, None))
    slack = slope * distance + 0.5 * c.outer_smoothness * distance**2
    return q.outer(x, state.hparams, None), slack


@pytest.mark.parametrize("run", [(1e-1,), (1e-3,), (1e-5,), (1e-3, True)])
def test_every_accepted_step_decreases_the_true_value_and_the_error_is_below_its_bound(run):
    q = quadratic()
    states, infos = tuned(*run)
    accepted = 0
    for old, new, info in zip(states, states[1:], infos, strict=False):
        before, true = float(q.value(old.hparams)), q.gradient(old.hparams)
        if info.stats["certified"]:
            moved = old.hparams - new.hparams
            norm, bound = float(info.hypergrad_norm), float(info.stats["error_bound"])
            assert bound <= (1 - DESCENT) * norm
            distance = float(jnp.linalg.norm(new.params - q.solution(old.hparams)))
            assert distance <= float(info.stats["distance"]) + ROUNDING
        if not info.stats["accepted"]:
            np.testing.assert_array_equal(old.hparams, new.hparams)
            continue
        accepted += 1
        length = float(info.stats["step_size"])
        found = moved / length
        # Subtracting two hyperparameters that are close leaves their rounding over the step size.
        rounding = 1e-15 * float(jnp.linalg.norm(old.hparams)) / length
        assert float(jnp.linalg.norm(found - true)) <= bound + rounding
        # What was compared: the worst value after the step with the best one before it.
        (value, slack), (ahead, more) = known(new.params, old), known(new.ahead, new)
        change = float(ahead + more - value + slack)
        assert change <= -(DESCENT**2) * length * norm**2 + ROUNDING * (1 + before)
        decrease = before - float(q.value(new.hparams))
        assert decrease >= DESCENT**2 * length * norm**2 - ROUNDING * (1 + before)
    assert accepted >= 20


def test_three_starting_accuracies_reach_the_same_value_at_the_same_work():
    q = quadratic()
    least = float(q.value(q.optimum()))
    spent = []
    for run in ((1e-1,), (1e-3,), (1e-5,), (1e-3, True)):
        states, infos = tuned(*run)
        assert float(q.value(states[-1].hparams)) - least <= 1e-8 * (1 + least)
        costs = np.cumsum([float(info.cost.total) for info in infos])
        values = np.array([float(q.value(s.hparams)) for s in states[1:]])
        spent.append(costs[np.argmax(values - least <= 1e-8 * (1 + least))])
    assert max(spent) <= 10 * min(spent)


def test_the_accuracy_finds_itself():
    """It is tightened from above and loosened from below until both runs ask for the same."""
    from_above, from_below = (
        [float(i.stats["accuracy"]) for i in tuned(e)[1]] for e in (0.1, 1e-5)
    )
    assert min(from_above) < 1e-3 and max(from_below[:30]) >= 4e-5
    assert max(from_above[40], from_below[40]) <= 30 * min(from_above[40], from_below[40])


def test_what_cannot_be_certified_moves_nothing_and_the_status_says_so():
    q = quadratic()
    vague = dataclasses.replace(q.certificate, hessian_lipschitz=1e30)
    states, infos = run(maid(q.outer, q.inner, vague), jnp.zeros(M), jnp.zeros(M), 2)
    for info in infos:
        assert int(info.result) == Status.stagnated
        assert not info.stats["certified"] and not info.stats["accepted"]
        assert int(info.stats["num_trials"]) == 0
    np.testing.assert_array_equal(states[-1].hparams, states[0].hparams)
    assert float(states[-1].accuracy) > 0


# Ridge and logistic regression with a penalty a weight: constants that depend on the point.

K = jax.random.split(jax.random.key(0), 5)
X, V = jax.random.normal(K[0], (60, 5)), jax.random.normal(K[1], (40, 5))
TRUTH = jax.random.normal(K[2], (5,))
Y = jnp.sign(X @ TRUTH + jax.random.normal(K[3], (60,)))
Z = jnp.sign(V @ TRUTH + jax.random.normal(K[4], (40,)))
DATA: Any = dict(inner_batches=(X[None], Y[None]), outer_batch=(V, Z))


def fit_of(w, batch):
    return jnp.mean(jnp.logaddexp(0, -batch[1] * (batch[0] @ w)))


def logistic(w, lam, batch):
    return fit_of(w, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def held_out(w, lam, batch):
    return fit_of(w, batch)


SMOOTH = float(jnp.linalg.norm(V, 2)) ** 2 / 4 / 40
THIRD = float(jnp.mean(jnp.linalg.norm(X, axis=1) ** 3)) / (6 * 3**0.5)
LOGISTIC = Certificate.of_log_decays(SMOOTH, THIRD)


@jax.jit
def truth(lam):
    w = bilevel.minimize(logistic, jnp.zeros(5), lam, (X, Y), tol=1e-12).params
    return bilevel.value_and_hypergrad(held_out, logistic, bilevel.Implicit(bilevel.Dense()))(
        w, lam, inner_batch=(X, Y), outer_batch=(V, Z)
    )


def check_logistic(states, infos):
    """The bound and the decrease, on the true function of what the losses read."""
    for old, new, info in zip(states, states[1:], infos, strict=False):
        if not info.stats["accepted"]:
            continue
        before, grads = truth(old.hparams)
        after, _ = truth(new.hparams)
        length, norm = float(info.stats["step_size"]), float(info.hypergrad_norm)
        assert float(before - after) >= DESCENT**2 * length * norm**2 - 1e-14
        found = (old.outer.moving - new.outer.moving) / length
        if old.outer.raw is not None:
            grads = SPACE_PULL(old.outer.raw, grads)
        error = float(jnp.linalg.norm(found - grads))
        assert error <= float(info.stats["error_bound"]) + 1e-12 / length


SPACE = bilevel.Space(bilevel.Interval(-4.0, 2.0))


def SPACE_PULL(raw, grads):
    return jax.vjp(SPACE.constrain, raw)[1](grads)[0]


@pytest.mark.parametrize("space", [None, SPACE], ids=["free", "bounded"])
def test_a_penalty_a_weight_keeps_both_guarantees(space):
    algorithm = maid(held_out, logistic, LOGISTIC, descent=DESCENT, constrain=space)
    states, infos = run(algorithm, jnp.zeros(5), jnp.full(5, -1.0), 25, **DATA)
    assert sum(bool(info.stats["accepted"]) for info in infos) >= 15
    check_logistic(states, infos)
    assert float(truth(states[-1].hparams)[0]) < float(truth(states[0].hparams)[0])


def test_a_simplex_stretches_by_half_at_most():
    """The softmax of equal entries has slope 1/n in sums, but 1/n in differences too: not zero."""
    space = bilevel.Space(bilevel.Simplex())

    def weighted(w, lam, batch):  # of several curvatures, so that the first solves are not exact
        return 0.5 * jnp.sum(jnp.array([1.0, 1.2, 1.5]) * (w - lam) ** 2)

    def target(w, lam, batch):
        return 0.5 * jnp.sum((w - jnp.array([0.7, 0.2, 0.1])) ** 2)

    algorithm = maid(target, weighted, Certificate(1.0, 1.0, 1.0), constrain=space)
    states, infos = run(algorithm, jnp.zeros(3), jnp.full(3, 1 / 3), 60)
    first = infos[0].stats
    expected = 0.5 * (float(first["residual_norm"]) + float(first["distance"]))
    assert expected > 1e-8
    np.testing.assert_allclose(first["error_bound"], expected, rtol=1e-9)
    np.testing.assert_allclose(states[-1].hparams, [0.7, 0.2, 0.1], atol=1e-3)


def test_constants_of_log_decays():
    w, tree = jnp.array([3.0, -4.0]), {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    one = LOGISTIC.at(w, jnp.log(2.0))
    np.testing.assert_allclose(one[:4], (2, SMOOTH, 10, 2))
    each = LOGISTIC.at(w, jnp.log(jnp.array([2.0, 0.5])))
    np.testing.assert_allclose((each.convexity, each.mixed_norm, each.mixed_lipschitz), (0.5, 6, 2))
    leaf = LOGISTIC.at(tree, {"a": jnp.log(3.0), "b": jnp.log(0.25)})
    np.testing.assert_allclose((leaf.convexity, leaf.mixed_norm), (0.25, 3 * 5**0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="`of_log_decays` needs `hparams` that are one number"):
        LOGISTIC.at(tree, {"a": jnp.zeros(()), "c": jnp.zeros(())})


def test_a_direct_term_is_part_of_the_hypergradient_and_of_the_bound():
    def outer(w, lam, batch):
        return 0.5 * jnp.sum(w**2) + jnp.sum(lam * w)

    def inner(w, lam, batch):
        return 0.5 * jnp.sum((w - lam) ** 2)

    # F = 3/2 |lam|^2; B = -I.
    algorithm = maid(outer, inner, Certificate(1.0, 1.0, 1.0, direct_lipschitz=1.0), accuracy=10.0)
    states, infos = run(algorithm, jnp.zeros(2), jnp.array([1.0, -2.0]), 20)
    for old, new, info in zip(states, states[1:], infos, strict=False):
        if info.stats["accepted"]:
            z = (old.hparams - new.hparams) / info.stats["step_size"]
            error = float(jnp.linalg.norm(z - 3 * old.hparams))
            assert error <= float(info.stats["error_bound"]) + 1e-12
    assert float(jnp.linalg.norm(states[-1].hparams)) < 1e-3


def test_the_cost_is_what_was_evaluated():
    """Forward passes of both losses, counted where they are made."""
    q, seen, looked = quadratic(), [], []

    def inner(x, t, batch):
        jax.debug.callback(lambda: seen.append(None))
        return q.inner(x, t, batch)

    def outer(x, t, batch):
        jax.debug.callback(lambda: looked.append(None))
        return q.outer(x, t, batch)

    algorithm = maid(outer, inner, q.certificate, accuracy=0.1)
    state, step = algorithm.init(jnp.zeros(M), jnp.zeros(M)), jax.jit(algorithm.step)
    for _ in range(4):
        seen.clear(), looked.clear()
        state, info = step(state, **NOTHING)
        jax.block_until_ready(state)
        jax.effects_barrier()
        trials = int(info.stats["num_trials"])
        attempts = int(info.cost.outer_gradients) - trials
        assert attempts >= 1 and len(looked) == int(info.cost.outer_gradients)
        # Each attempt linearizes the gradient and makes a mixed product besides.
        extra = len(seen) - int(info.cost.inner_gradients)
        assert extra % attempts == 0 and extra // attempts <= 3
        assert float(info.cost.products) >= attempts


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(convexity=0.0), ValueError, "`convexity` must be greater than 0, got 0.0: no error"),
        (dict(convexity=-1.0), ValueError, "Add a penalty to it"),
        (dict(convexity=np.nan), ValueError, "`convexity` must be finite"),
        (dict(convexity="large"), TypeError, "`convexity` must be a real number"),
        (dict(convexity=lambda w: 1.0), TypeError, "`convexity` cannot be called as"),
        (dict(outer_smoothness=-1.0), ValueError, "`outer_smoothness` must be at least 0"),
        (dict(mixed_norm=jnp.ones(3)), ValueError, "`mixed_norm` has shape"),
    ],
)
def test_constants_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        Certificate(**{"convexity": 1.0, "outer_smoothness": 1.0, "mixed_norm": 1.0, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(certificate=1.0), TypeError, "`certificate` must be a `Certificate"),
        (dict(accuracy=0), ValueError, "`accuracy` must be greater than 0"),
        (dict(descent=1.0), ValueError, "`descent` must be less than 1"),
        (dict(backtrack=0.0), ValueError, "`backtrack` must be greater than 0"),
        (dict(tighten=1.5), ValueError, "`tighten` must be less than 1"),
        (dict(loosen=0.9), ValueError, "`loosen` must be at least 1"),
        (dict(trials=0), ValueError, "`trials` must be at least 1"),
        (dict(smoothness=0.0), ValueError, "`smoothness` must be greater than 0"),
        (dict(smoothness=lambda w: 1.0), TypeError, "`smoothness` cannot be called as"),
    ],
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        maid(held_out, logistic, **{"certificate": LOGISTIC, **settings})


def test_convexity_that_is_computed_and_not_positive():
    def none(w, lam):
        return jnp.max(lam)

    algorithm = maid(held_out, logistic, Certificate(none, SMOOTH, 1.0))
    with pytest.raises(ValueError, match="`convexity` must be greater than 0, got -1.0"):
        algorithm.init(jnp.zeros(5), jnp.full(5, -1.0))
    state = algorithm.init(jnp.zeros(5), jnp.full(5, 1.0))
    state = state._replace(outer=state.outer._replace(hparams=jnp.full(5, -1.0)))
    new, info = jax.jit(algorithm.step)(state, **DATA)
    assert int(info.result) == Status.invalid_setting
    np.testing.assert_array_equal(new.hparams, state.hparams)
    assert not info.stats["certified"] and not info.stats["accepted"]


def test_single_precision_where_double_is_enabled():
    """A power of a count takes the widest float there is; the state keeps its own."""
    w, lam, y = jnp.ones(3, jnp.float32), jnp.float32(0.0), jnp.ones((1, 3), jnp.float32)

    def train(w, lam, y):
        return 0.5 * jnp.sum((w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)

    alg = maid(train, train, Certificate.of_log_decays(1.0))
    state = alg.init(w, lam)
    new, _ = jax.eval_shape(lambda s: alg.step(s, inner_batches=y, outer_batch=y[0]), state)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
