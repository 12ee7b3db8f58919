"""Knots: a number just at its threshold is told, from both sides, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_conditions import STEP, STEPS, TRAIN, VALID, N, error, solved, valid

import bilevel
from bilevel import CG, Composite, Dense, FixedPoint, Implicit, Root, prox
from bilevel.ground.status import Status
from bilevel.problem.knots import ROUNDINGS, knots
from bilevel.problem.two_losses import Problem

Y = np.array([2.0, -3.0, 0.1, 0.7, -0.7])


def distance(w, lam, y):
    return 0.5 * jnp.sum((w - y) ** 2)


def outer(w, lam, batch):
    return jnp.sum(jnp.arange(1.0, len(Y) + 1) * w)


def soft(w, lam, s):
    return prox.l1(w, lam, s)


def step(w, lam, y):
    return prox.l1(w - 0.5 * (w - y), lam, 0.5)


FORMS = {
    "composite": (Composite(distance, soft), Implicit(CG(rtol=1e-6))),
    "composite, long step": (Composite(distance, soft, 20.0), Implicit(CG(rtol=1e-6))),
    "fixed point": (FixedPoint(step), Implicit(Dense())),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_at_its_threshold_is_told_from_both_sides_and_counted(form, dtype):
    inner, response = FORMS[form]
    y, eps = jnp.asarray(Y, dtype), float(jnp.finfo(dtype).eps)

    @jax.jit
    def told(lam):
        w = prox.l1(y, lam)
        sol = bilevel.hypergrad_solve(outer, inner, response, w, lam, inner_batch=y, outer_batch=y)
        return sol.stats["knots"], sol.result, sol.grads

    def at(threshold):
        count, result, grads = told(jnp.asarray(threshold, dtype))
        return int(count), Status(int(result)), float(grads)

    for nearly in (0.0, 4 * eps, -4 * eps):  # |y| = 0.7 of the last two, and 0.1 of the third
        assert at(0.7 + nearly)[:2] == (2, Status.knot)
        assert at(0.1 + nearly)[:2] == (1, Status.knot)
    assert at(2.0)[:2] == (1, Status.knot)
    # The value is that of one side: with the last two weights, or without.
    one_side = {-1.0 + 2.0 - 4.0 + 5.0, -1.0 + 2.0}
    assert any(abs(at(0.7)[2] - side) < 1e-5 for side in one_side)
    # Not far away: by a thousand roundings, and where zeros are safe.
    far = 40 * ROUNDINGS * eps
    for lam in (0.7 + far, 0.7 - far, 0.5, 0.05, 1e-3):
        assert at(lam)[:2] == (0, Status.ok)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_a_lasso_with_zeros_off_their_threshold_has_no_knots(dtype):
    """Solved by minimize to its default tolerance: what remains decides every weight."""
    rng = np.random.default_rng(5)
    x, true = rng.standard_normal((80, 40)), np.zeros(40)
    true[:5] = 1.0
    y = x @ true + 0.1 * rng.standard_normal(80)
    batch = (jnp.asarray(x, dtype), jnp.asarray(y, dtype))
    condition = Composite(lambda w, lam, b: 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2), soft)
    lam = jnp.asarray(0.1, dtype)
    found = bilevel.minimize(condition, jnp.zeros(40, dtype), lam, batch)
    w = found.params
    assert w.dtype == dtype and int(found.result) == Status.ok and int(jnp.sum(w == 0)) >= 30
    for inner, solver in (
        (condition, CG(rtol=1e-4)),
        (FixedPoint(bilevel.proximal_step(condition.loss, soft, 0.3)), Dense()),
    ):
        sol = bilevel.hypergrad_solve(
            condition.loss, inner, Implicit(solver), w, lam, inner_batch=batch, outer_batch=batch
        )
        assert int(sol.result) == Status.ok and int(sol.stats["knots"]) == 0


@pytest.mark.parametrize("name", STEPS)
def test_none_of_the_oracles_is_at_a_knot(name):
    fixed = Problem(valid, FixedPoint(STEPS[name][0]))
    assert (
        int(jax.jit(lambda w, lam: knots(fixed, w, lam, TRAIN))(solved(name)[0], STEPS[name][1]))
        == 0
    )


@pytest.mark.slow
def test_groups_a_simplex_and_a_bound():
    """Whole groups count; a coordinate that enters a simplex moves all of it."""
    groups = Composite(distance, lambda w, lam, s: prox.group_lasso(w, lam, s))
    y = jnp.array([[3.0, 4.0], [0.6, 0.8], [0.1, 0.1]])

    def count(inner, w, lam, y):
        return int(knots(Problem(outer, inner), w, jnp.float64(lam), y))

    for lam, expected in ((1.0, 2), (5.0, 2), (0.5, 0), (2.0, 0)):
        assert count(groups, prox.group_lasso(y, lam), lam, y) == expected
    simplex = Composite(distance, lambda w, lam, s: optax.projections.projection_simplex(w))
    mean = jnp.array([0.7, 0.6, 0.15, -0.2])  # the third is exactly zero with the mean taken off
    w = optax.projections.projection_simplex(mean)
    assert float(w[2]) == pytest.approx(0.0, abs=1e-15) and count(simplex, w, 0.0, mean) == 3
    assert count(simplex, optax.projections.projection_simplex(mean - 0.1 * jnp.eye(4)[2]), 0.0,
                 mean - 0.1 * jnp.eye(4)[2]) == 0  # fmt: skip
    bounded = Composite(distance, lambda w, lam, s: jnp.clip(w, 0, lam))
    for y, expected in (([0.0, 1.0, 0.5], 2), ([-0.1, 1.2, 0.5], 0)):
        y = jnp.array(y)
        assert count(bounded, jnp.clip(y, 0, 1.0), 1.0, y) == expected


def test_an_unfinished_solve_that_leaves_the_support_open_is_told():
    """The weight will be zero, but the point does not tell yet: what is left is larger."""
    condition, lam = Composite(distance, soft, 0.5), jnp.float64(0.7)
    y = jnp.array([2.0, -3.0, 0.7 + 1e-6])
    for left, expected in ((1e-4, 1), (1e-9, 0)):
        w = prox.l1(y, lam).at[0].add(left)
        assert int(knots(Problem(outer, condition), w, lam, y)) == expected


def test_roots_with_a_kink_count_and_smooth_conditions_do_not():
    def complementary(w, lam, y):  # w >= 0, w - y + lam >= 0, one of them zero
        return jnp.minimum(w, w - y + lam)

    y = jnp.asarray(Y)
    for lam, expected in ((0.7, 1), (0.5, 0)):
        w = jnp.maximum(y - lam, 0)
        assert int(knots(Problem(outer, Root(complementary)), w, jnp.float64(lam), y)) == expected

    def smooth(w, lam, y):
        return jnp.tanh(3 * w + lam * y)

    problem = Problem(outer, FixedPoint(smooth))
    for batch in (y, y.astype(jnp.float32)):
        w = batch
        for _ in range(100):
            w = smooth(w, 0.5, batch)
        assert int(knots(problem, w, jnp.asarray(0.5, w.dtype), batch)) == 0

    # A map that forgets where it starts: the kink is in the hyperparameter alone.
    forgets = Problem(outer, FixedPoint(lambda w, lam, y: prox.l1(y, lam)))
    for lam, expected in ((0.7, 2), (0.5, 0)):
        assert int(knots(forgets, prox.l1(y, lam), jnp.float64(lam), y)) == expected


@pytest.mark.slow
def test_with_response_keeps_one_side_and_tells():
    condition, lam = Composite(distance, soft), jnp.float64(0.7)
    y = jnp.asarray(Y)

    def fit(**options):
        return bilevel.with_response(
            lambda w, lam, y: prox.l1(y, lam), condition, Implicit(CG(rtol=1e-10)), **options
        )

    def value(lam):
        return outer(fit()(y, lam, y), lam, y)

    with pytest.warns(RuntimeWarning, match="^knot: .* just at a threshold"):
        slope = jax.grad(value)(lam)
    assert float(slope) in (pytest.approx(2.0), pytest.approx(1.0))
    _, info = jax.jit(fit(has_status=True))(y, lam, y)
    assert int(info.result) == Status.knot and int(info.stats["knots"]) == 2
    _, info = jax.jit(fit(has_status=True))(y, lam - 0.1, y)
    assert int(info.result) == Status.ok and int(info.stats["knots"]) == 0
    loss = bilevel.with_response(lambda w, lam, y: y, distance, Implicit(CG()), has_status=True)
    assert "knots" not in loss(y, lam, y)[1].stats


def test_the_message_names_the_cause_and_the_number():
    y, w = jnp.asarray(Y), prox.l1(jnp.asarray(Y), 0.7)
    sol = bilevel.hypergrad_solve(
        outer, Composite(distance, soft), Implicit(), w, jnp.float64(0.7),
        inner_batch=y, outer_batch=y,
    )  # fmt: skip
    with pytest.raises(bilevel.HypergradientError, match="knot: .*threshold.*knots=2"):
        bilevel.raise_for_status(sol)


@pytest.mark.slow
def test_a_point_that_is_no_solution_is_told_as_that():
    sol = bilevel.hypergrad_solve(
        valid, FixedPoint(lambda w, lam, b: prox.l1(w - STEP * jax.grad(error)(w, b), lam, STEP)),
        Implicit(Dense()), jnp.ones(N), jnp.float64(0.1), inner_batch=TRAIN, outer_batch=VALID,
    )  # fmt: skip
    assert int(sol.result) == Status.not_stationary
