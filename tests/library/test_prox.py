"""Proximal operators: what defines them, their Jacobians, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import prox

RNG = np.random.default_rng(3)
V = jnp.asarray(RNG.normal(size=(5, 3)))

# Each with a strength for all and one per weight or group, and the penalty itself.
OPERATORS = {
    "l1": (prox.l1, 0.4, lambda w, a: jnp.sum(a * jnp.abs(w))),
    "l1, per weight": (prox.l1, jnp.abs(V) * 0.7 + 0.1, lambda w, a: jnp.sum(a * jnp.abs(w))),
    "l1, per unit": (
        prox.l1, jnp.array([0.0, 0.3, 2.0]), lambda w, a: jnp.sum(a[None] * jnp.abs(w)),
    ),
    "elastic net": (
        prox.elastic_net, (0.4, 0.8), lambda w, a: jnp.sum(a[0] * jnp.abs(w) + a[1] * w**2 / 2),
    ),
    "elastic net, per weight": (
        prox.elastic_net, (jnp.abs(V), jnp.linspace(0.0, 1.0, 3)),
        lambda w, a: jnp.sum(a[0] * jnp.abs(w) + a[1][None] * w**2 / 2),
    ),
    "group lasso": (
        prox.group_lasso, 1.1, lambda w, a: jnp.sum(a * jnp.linalg.norm(w, axis=1)),
    ),
    "group lasso, per group": (
        prox.group_lasso, jnp.linspace(0.0, 2.0, 5),
        lambda w, a: jnp.sum(a * jnp.linalg.norm(w, axis=1)),
    ),
    "group lasso, columns": (
        functools.partial(prox.group_lasso, axis=0), jnp.array([0.5, 9.0, 0.0]),
        lambda w, a: jnp.sum(a * jnp.linalg.norm(w, axis=0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_the_result_minimizes_the_penalty_and_half_the_squared_distance(name):
    operator, strength, penalty = OPERATORS[name]
    s = 0.6

    def objective(w):
        return jnp.sum((w - V) ** 2) / 2 + s * penalty(w, strength)

    best = operator(V, strength, s)
    assert best.shape == V.shape and best.dtype == V.dtype
    # Strongly convex: F(w) - F(best) >= |w - best|^2 / 2 for every w, and only for the minimum.
    for scale in (1e-3, 0.1, 3.0):
        for _ in range(50):
            d = scale * RNG.normal(size=V.shape) * (RNG.uniform(size=V.shape) < 0.5)
            assert objective(best + d) - objective(best) >= np.sum(d**2) / 2 - 1e-12


def test_closed_forms_of_single_numbers_and_of_trees():
    v = {"a": jnp.array([2.0, -0.3, 0.0]), "b": jnp.array([[3.0, 4.0]])}
    got = prox.l1(v, {"a": 0.5, "b": jnp.array([1.0, 4.0])}, 2.0)
    np.testing.assert_array_equal(got["a"], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(got["b"], [[1.0, 0.0]])
    got = prox.elastic_net(v, (0.5, {"a": 1.5, "b": 0.0}), 2.0)
    np.testing.assert_array_equal(got["a"], [0.25, 0.0, 0.0])
    np.testing.assert_array_equal(got["b"], [[2.0, 3.0]])
    np.testing.assert_allclose(prox.group_lasso(v["b"], 1.0, 2.0), [[1.8, 2.4]], rtol=1e-15)
    np.testing.assert_array_equal(prox.group_lasso(v["b"], 5.0), [[0.0, 0.0]])
    np.testing.assert_array_equal(prox.l1(v["a"], 0.0), v["a"])
    half = prox.l1(v["a"].astype(jnp.bfloat16), jnp.float32(0.5))
    assert half.dtype == jnp.bfloat16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_operators_are_firmly_nonexpansive(data):
    name = data.draw(st.sampled_from(sorted(OPERATORS)))
    operator, strength, _ = OPERATORS[name]
    number = st.floats(-4, 4, width=32)
    numbers = st.lists(number, min_size=30, max_size=30)
    x, y = np.array(data.draw(numbers)).reshape(2, 5, 3)
    s = data.draw(st.floats(0.01, 3))
    px, py = (np.asarray(operator(jnp.asarray(v), strength, s)) for v in (x, y))
    d = px - py
    assert np.sum(d * d) <= np.sum(d * (x - y)) + 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_jacobians_are_symmetric_with_eigenvalues_from_zero_to_one(name):
    operator, strength, _ = OPERATORS[name]

    def flat(v):
        return operator(v.reshape(V.shape), strength, 0.6).ravel()

    for v in (V.ravel(), jnp.zeros(V.size)):
        j = jax.jit(jax.jacfwd(flat))(v)
        np.testing.assert_allclose(j, j.T, atol=1e-15)
        values = jnp.linalg.eigvalsh(j)
        assert values[0] >= -1e-15 and values[-1] <= 1 + 1e-15
    j = jax.jit(jax.jacfwd(flat))(V.ravel())
    e = 1e-6 * jnp.eye(V.size)
    differences = (
        jax.vmap(flat)(V.ravel()[None] + e) - jax.vmap(flat)(V.ravel()[None] - e)
    ).T / 2e-6
    np.testing.assert_allclose(j, differences, atol=1e-8)


def test_derivatives_at_a_threshold_are_those_of_one_side():
    for v, slope in ((0.5, 0.0), (-0.5, 0.0), (0.5 + 1e-12, 1.0), (0.5 - 1e-12, 0.0)):
        assert jax.grad(lambda v: prox.l1(v, 0.5))(jnp.asarray(v)) == slope
    # Without a threshold nothing is held.
    assert jax.grad(lambda v: prox.l1(v, 0.0))(0.0) == 1.0
    np.testing.assert_array_equal(
        jax.jacobian(lambda v: prox.group_lasso(v, 0.0))(jnp.zeros(2)), jnp.eye(2)
    )
    in_strength = jax.jacobian(lambda a: prox.l1(jnp.array([2.0, -3.0, 0.1]), a, 0.5))(0.6)
    np.testing.assert_array_equal(in_strength, [-0.5, 0.5, 0.0])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`strength` must lie in \[0, inf\), got -1"):
        prox.l1(V, -1.0)
    with pytest.raises(ValueError, match=r"`strength` has shape \(4,\), expected one of"):
        prox.l1(V, jnp.ones(4))
    with pytest.raises(ValueError, match=r"`strength` has shape \(3,\), expected one of \(\), \(5"):
        prox.group_lasso(V, jnp.ones(3))
    with pytest.raises(ValueError, match="`strength` must be a pair"):
        prox.elastic_net(V, 0.1)
    with pytest.raises(ValueError, match=r"`strength\[1\]` must be a scalar or have the tree"):
        prox.elastic_net({"a": V}, (0.1, {"b": 0.1}))
    with pytest.raises(TypeError, match=r"`strength` must be a real number"):
        prox.l1(V, "much")
    with pytest.raises(TypeError, match=r"`params\['a'\]` must be an array of real floating"):
        prox.l1({"a": jnp.arange(3)}, 1.0)
    assert jnp.all(jnp.isnan(jax.jit(prox.l1)(V, -1.0)))
    assert jnp.isnan(jax.grad(lambda a: jnp.sum(prox.group_lasso(V, a)))(-1.0))
