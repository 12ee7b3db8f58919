"""Finite-difference hypergradients against the exact products they stand for (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import FiniteDifference, Unroll

X = jax.random.normal(jax.random.key(0), (30, 4))
Y = jnp.sign(X @ jnp.asarray([1.0, -2.0, 0.5, 0.0]) + 0.1)
W = jnp.asarray([0.3, -0.6, 0.2, 0.4])
LAM = jax.random.normal(jax.random.key(1), (30,))


def weighted(w, lam, batch):
    """Logistic regression with a weight an example: its cross derivative is not linear in w."""
    x, y = batch
    return jnp.mean(jax.nn.sigmoid(lam) * jnp.logaddexp(0, -y * (x @ w))) + 0.05 * w @ w


def decayed(w, lam, batch):
    x, y = batch
    return jnp.mean(jnp.logaddexp(0, -y * (x @ w))) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def outer(w, lam, batch):
    return jnp.sum(jnp.sin(w)) + 0.1 * jnp.sum(lam**2)


def solve(response, inner, lam, **kwargs):
    return bilevel.hypergrad_solve(
        outer, inner, response, W, lam, inner_batch=(X, Y), outer_batch=None, **kwargs
    )


def exact(tx, inner, lam):
    one = jax.tree.map(lambda x: x[None], (X, Y))
    return bilevel.hypergrad_solve(
        outer, inner, Unroll(tx, 1), W, lam, inner_batch=one, outer_batch=None
    )


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.3), optax.adam(0.1, eps=1e-3), optax.clip_by_global_norm(0.1)]
)
def test_exact_where_the_hyperparameter_gradient_is_quadratic(tx):
    """DARTS (SGD) and SAMA (Adam): with a decay a weight the central difference has no error."""
    lam = jnp.asarray([-1.0, 0.2, 0.5, -0.3])
    sol, reference = solve(FiniteDifference(tx, radius=1.0), decayed, lam), exact(tx, decayed, lam)
    np.testing.assert_allclose(sol.grads, reference.grads, rtol=1e-8)
    np.testing.assert_allclose(sol.params, reference.params, rtol=1e-14)
    assert sol.result == bilevel.Status.ok
    for name in ("stationarity", "inner_loss", "direct_norm", "indirect_norm"):
        np.testing.assert_allclose(sol.stats[name], reference.stats[name], rtol=1e-8)


def test_error_is_quadratic_in_the_radius():
    tx = optax.adam(0.1, eps=1e-3)
    reference = exact(tx, weighted, LAM).grads
    radii = (0.4, 0.2, 0.1)
    errors = [
        float(jnp.linalg.norm(solve(FiniteDifference(tx, r), weighted, LAM).grads - reference))
        for r in radii
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.5 <= coarse / fine <= 4.5
    small = solve(FiniteDifference(tx, 1e-4), weighted, LAM).grads
    np.testing.assert_allclose(small, reference, rtol=1e-6, atol=1e-9)


def test_without_lookahead_it_is_the_mixed_product_here():
    sol = solve(FiniteDifference(optax.sgd(0.7), 1e-4, lookahead=False), weighted, LAM)
    problem = bilevel.Problem(outer, weighted)
    product = problem.cross_vjp(W, LAM, (X, Y), 0.7 * jnp.cos(W))
    np.testing.assert_allclose(sol.indirect, -product, rtol=1e-5, atol=1e-10)
    np.testing.assert_array_equal(sol.params, W)


def test_settings_of_the_optimizer_state_and_zero_outer_gradient():
    def tx(lam):
        return optax.inject_hyperparams(optax.sgd)(lam["lr"], momentum=0.5)

    inner = lambda w, lam, batch: decayed(w, lam["decay"], batch)  # noqa: E731
    plain = lambda w, lam, batch: jnp.sum(jnp.sin(w))  # noqa: E731
    flat = lambda w, lam, batch: 0.0 * jnp.sum(w)  # noqa: E731
    lam = {"lr": jnp.asarray(0.2), "decay": jnp.zeros(4)}
    one = jax.tree.map(lambda x: x[None], (X, Y))

    def steps(response, batch):
        state, w, grads = None, W, []
        for rate in (0.2, 0.3):  # the second call must see the second rate, not the carried one
            sol = bilevel.hypergrad_solve(
                plain, inner, response, w, {**lam, "lr": jnp.asarray(rate)},
                inner_batch=batch, outer_batch=None, state=state,
            )  # fmt: skip
            w, state = sol.params, sol.state
            grads.append(sol.grads)
        return w, grads

    w, grads = steps(FiniteDifference(tx, 0.1), (X, Y))
    w_exact, grads_exact = steps(Unroll(tx, 1), one)
    np.testing.assert_allclose(w, w_exact, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), grads, grads_exact)
    assert grads[1]["lr"] != 0

    sol = bilevel.hypergrad_solve(
        flat, inner, FiniteDifference(tx), W, lam, inner_batch=(X, Y), outer_batch=None
    )
    assert sol.result == bilevel.Status.ok and not np.any(sol.grads["decay"])


def test_bad_input():
    with pytest.raises(ValueError, match="`radius` must be greater than 0"):
        FiniteDifference(optax.sgd(0.1), radius=0.0)
    with pytest.raises(TypeError, match="`inner_tx` must be an optax transformation"):
        FiniteDifference(0.1)
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['lr'\]"):
        bilevel.hypergrad_solve(
            lambda w, lam, b: jnp.sum(w), lambda w, lam, b: decayed(w, lam["decay"], b),
            FiniteDifference(optax.sgd(0.1)), W, {"decay": jnp.zeros(4), "lr": 0.1},
            inner_batch=(X, Y), outer_batch=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "radius", "status"),
    [
        (jnp.float32, 1e-30, bilevel.Status.rounding),  # w + eps v is w: the difference is zero
        (jnp.float32, 1e-7, bilevel.Status.rounding),  # some entries move, by one unit of rounding
        (jnp.float32, 1e-2, bilevel.Status.ok),
        (jnp.bfloat16, 1e-2, bilevel.Status.rounding),
        (jnp.bfloat16, 1.0, bilevel.Status.ok),
        (jnp.float64, 1e-8, bilevel.Status.ok),
    ],
)
def test_a_radius_below_rounding_is_marked(dtype, radius, status):
    lam = jnp.zeros(4, dtype)
    sol = bilevel.hypergrad_solve(
        lambda w, lam, b: jnp.sum(jnp.sin(w)), decayed, FiniteDifference(optax.sgd(0.3), radius),
        W.astype(dtype), lam, inner_batch=(X.astype(dtype), Y.astype(dtype)), outer_batch=None,
    )  # fmt: skip
    assert sol.result == status
    if status == bilevel.Status.rounding:
        with pytest.raises(bilevel.HypergradientError, match="raise `radius`"):
            bilevel.raise_for_status(sol)


def test_a_traced_radius_is_judged_by_lane():
    lam = jnp.zeros(4)

    def result(radius):
        return solve(FiniteDifference(optax.sgd(0.3), radius), decayed, lam).result

    results = jax.vmap(result)(jnp.asarray([1e-30, 1e-3]))
    assert results.tolist() == [bilevel.Status.rounding, bilevel.Status.ok]
