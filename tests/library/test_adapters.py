"""Models of flax.nnx, flax.linen and equinox, and the solvers of lineax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel import CG, Dense, Hessian, Implicit

KEY = jax.random.key(7)


def data():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 12, 3)), rng.integers(0, 2, (2, 12))
    return (x[0], y[0], KEY), (x[1], y[1], KEY)


def classify(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def decay(params, lam):
    return 0.5 * jnp.exp(lam) * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def check_against_finite_differences(inner, outer, params, rest, lam=0.3):
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def newton(v, lam, tr, rest):
        def loss(v):
            return inner(unravel(v), lam, tr, rest)[0]

        return v - jnp.linalg.solve(jax.hessian(loss)(v), jax.grad(loss)(v))

    def trained(v, lam):
        """To a stationary point of the frozen loss, which a strong decay makes easy."""
        for _ in range(8):
            v = newton(v, lam, tr, rest)
        return v

    tr, va = data()
    lam = jnp.asarray(lam, jnp.float64)
    w = trained(flat, lam)

    @jax.jit
    def solve(w, lam, tr, va, rest):
        return bilevel.hypergrad_solve(
            outer, inner, Implicit(CG(100, rtol=1e-12)), w, lam, inner_batch=tr, outer_batch=va,
            has_state=True, model_state=rest,
        )  # fmt: skip

    sol = solve(unravel(w), lam, tr, va, rest)
    assert float(sol.stats["stationarity"]) < 1e-10
    step = 1e-4
    values, outer_value = [], jax.jit(lambda w, lam: outer(w, lam, va, rest)[0])
    for side in (step, -step):
        moved = unravel(trained(w, lam + side))
        values.append(float(outer_value(moved, lam + side)))
    difference = (values[0] - values[1]) / (2 * step)
    # Truncation of order step**2 = 1e-8 and rounding of order 1e-16 / step = 1e-12.
    np.testing.assert_allclose(float(sol.grads), difference, rtol=1e-6)
    assert abs(difference) > 1e-4


class Net(nnx.Module):
    def __init__(self, rngs):
        kind = {"rngs": rngs, "param_dtype": jnp.float64}
        self.first = nnx.Linear(3, 4, **kind)
        self.norm = nnx.BatchNorm(4, use_running_average=False, **kind)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.second = nnx.Linear(4, 2, **kind)

    def __call__(self, x):
        return self.second(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def test_nnx_with_batch_norm_and_dropout():
    model = Net(nnx.Rngs(params=0, dropout=1))
    params, rest, merge = bilevel.split_nnx(model)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((params, rest)))
    # flax keeps batch statistics in float32 whatever `param_dtype` says.
    rest = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, rest)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(params))

    def inner(params, lam, batch, rest):
        x, y, _ = batch
        module = merge(params, rest)
        return classify(module(x), y) + decay(params, lam), merge.rest(module)

    def outer(params, lam, batch, rest):
        x, y, _ = batch
        module = merge(params, rest)
        module.eval()
        return classify(module(x), y), merge.rest(module)

    check_against_finite_differences(inner, outer, params, rest)

    tr, _ = data()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    run = jax.jit(inner)
    value, advanced = run(params, jnp.zeros(()), tr, rest)
    again, _ = run(params, jnp.zeros(()), tr, rest)
    moved, _ = run(params, jnp.zeros(()), tr, advanced)
    assert float(value) == float(again)  # a frozen state is a frozen mask, and nothing is aliased
    assert float(value) != float(moved)  # the advanced one draws another
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert jax.tree.structure(advanced) == jax.tree.structure(rest)
    nnx.update(model, params, advanced)  # the way back


def test_linen_with_batch_norm_and_dropout():
    class LinenNet(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            kind = {"param_dtype": jnp.float64}
            x = linen.Dense(4, **kind)(x)
            x = jnp.tanh(linen.BatchNorm(use_running_average=not train, **kind)(x))
            return linen.Dense(2, **kind)(linen.Dropout(0.3, deterministic=not train)(x))

    module = LinenNet()
    tr, _ = data()
    variables = module.init(jax.random.key(0), tr[0], False)
    params, rest, merge = bilevel.split_linen(variables)
    assert list(rest) == ["batch_stats"]

    def inner(params, lam, batch, rest):
        x, y, key = batch
        logits, rest = module.apply(
            merge(params, rest), x, True, rngs={"dropout": key}, mutable=list(rest)
        )
        return classify(logits, y) + decay(params, lam), rest

    def outer(params, lam, batch, rest):
        x, y, _ = batch
        return classify(module.apply(merge(params, rest), x, False), y), rest

    check_against_finite_differences(inner, outer, params, rest)


def test_equinox_keeps_static_parts_and_gives_the_pure_twins_number():
    model = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0), dtype=jnp.float64)
    params, rest, merge = bilevel.split_equinox(model)
    tr, va = data()

    def inner(params, lam, batch):
        x, y, _ = batch
        return classify(jax.vmap(merge(params, rest))(x), y) + decay(params, lam)

    def outer(params, lam, batch):
        x, y, _ = batch
        return classify(jax.vmap(merge(params, rest))(x), y)

    def pure(w, x):
        return jnp.tanh(x @ w[0].T + w[1][None]) @ w[2].T + w[3][None]

    flat = jax.tree.leaves(params)
    options = {"inner_batch": tr, "outer_batch": va}
    response = Implicit(Dense(), Hessian(1.0))
    lam = jnp.zeros(())
    got = jax.jit(
        lambda p, lam: bilevel.hypergrad(outer, inner, response)(p, lam, **options)
    )(params, lam)  # fmt: skip
    want = jax.jit(
        lambda p, lam: bilevel.hypergrad(
            lambda w, lam, b: classify(pure(w, b[0]), b[1]),
            lambda w, lam, b: classify(pure(w, b[0]), b[1]) + decay(w, lam),
            response,
        )(p, lam, **options)
    )(flat, lam)
    np.testing.assert_allclose(got, want, rtol=1e-10)


def quadratic(n=12, dtype=jnp.float64, scale=1.0):
    rng = np.random.default_rng(1)
    root = rng.standard_normal((n, n))
    matrix = jnp.asarray(scale * (root @ root.T + n * np.eye(n)), dtype)
    return matrix, jnp.asarray(rng.standard_normal(n), dtype)


@pytest.mark.parametrize(
    "solver",
    [
        lx.CG(1e-11, 0.0),
        lx.GMRES(1e-11, 0.0, restart=12),
        lx.BiCGStab(1e-11, 0.0),
        lx.Normal(lx.CG(1e-11, 0.0)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_lineax_solvers_solve(solver):
    matrix, g = quadratic()
    jitted = jax.jit(lambda s, m, g, x0: s.solve(lambda v: m @ v, g, x0))
    exact = np.linalg.solve(matrix, g)
    cold = jitted(bilevel.Lineax(solver), matrix, g, None)
    np.testing.assert_allclose(cold.value, exact, rtol=1e-8)
    assert int(cold.result) == 0
    assert float(cold.stats["residual_norm"]) <= 1e-8 * float(cold.stats["rhs_norm"])
    warm = jitted(bilevel.Lineax(solver), matrix, g, jnp.asarray(exact))
    np.testing.assert_allclose(warm.value, exact, rtol=1e-8)


def test_lineax_is_told_of_a_scale_where_it_finds_small_curvature():
    """A mean loss in float32: curvature of 1e-6 with n = 2000 is a breakdown for `lineax.CG`."""
    n = 2000
    curvature = jnp.linspace(1e-6, 1e-5, n, dtype=jnp.float32)
    g = jnp.ones(n, jnp.float32)
    solution = jax.jit(
        lambda g: bilevel.Lineax(lx.CG(1e-5, 0.0)).solve(lambda v: curvature * v, g)
    )(g)
    assert int(solution.result) == 0
    np.testing.assert_allclose(solution.value, g / curvature, rtol=1e-4)
    bare = lx.linear_solve(
        lx.FunctionLinearOperator(
            lambda v: curvature * v, jax.eval_shape(lambda: g), lx.positive_semidefinite_tag
        ),
        g,
        lx.CG(1e-5, 0.0),
        throw=False,
    )
    assert not np.isfinite(bare.value).all()  # what the adapter is for


def test_lineax_outcome_becomes_a_status_and_tolerances_are_traced():
    matrix, g = quadratic()
    jitted = jax.jit(lambda s, m: s.solve(lambda v: m @ v, g))
    out = [jitted(bilevel.Lineax(lx.CG(t, 0.0, max_steps=8)), matrix) for t in (0.5, 1e-12)]
    assert jitted._cache_size() == 1
    assert [int(o.result) for o in out] == [bilevel.Status.ok, bilevel.Status.max_steps]
    indefinite = jitted(bilevel.Lineax(lx.CG(0.5, 0.0, max_steps=8)), -matrix)
    assert int(indefinite.result) == bilevel.Status.negative_curvature
    bad = jitted(bilevel.Lineax(lx.CG(1e-3, 0.0, max_steps=8)), matrix * jnp.nan)
    assert int(bad.result) >= bilevel.Status.nonfinite_input


def test_lineax_inside_hypergrad():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 20, 4)), rng.standard_normal((2, 20))
    w, lam = {"a": rng.standard_normal(4)}, rng.standard_normal(4)

    def inner(w, lam, b):
        return 0.5 * jnp.mean((b[0] @ w["a"] - b[1]) ** 2) + jnp.sum(jnp.exp(lam) * w["a"] ** 2)

    def outer(w, lam, b):
        return 0.5 * jnp.mean((b[0] @ w["a"] - b[1]) ** 2)

    @jax.jit
    def both(w, lam):
        args = {"inner_batch": (x[0], y[0]), "outer_batch": (x[1], y[1])}
        return [
            bilevel.hypergrad(outer, inner, Implicit(s))(w, lam, **args)
            for s in (bilevel.Lineax(lx.CG(1e-12, 0.0)), Dense())
        ]

    got, want = both(w, lam)
    np.testing.assert_allclose(got, want, rtol=1e-9)
