"""What solvers carry from call to call: products counted, preconditioners that serve again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import (
    CG,
    Diagonal,
    GaussNewton,
    Hessian,
    Implicit,
    LinearModel,
    Neumann,
    Nystrom,
    Status,
)
from bilevel.hypergradient import hypergrad_init, hypergrad_solve
from bilevel.linear import LinearMap
from bilevel.linear.precondition import _pooled
from bilevel.problem.two_losses import Problem
from bilevel.testing import relative_error

N = 6
EIGENVALUES = np.array([0.4, 0.9, 1.3, 2.0, 3.1, 5.0])
BASIS = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
G = np.random.default_rng(1).standard_normal(N)


def matrix(eigenvalues, basis=BASIS):
    return jnp.asarray((basis * eigenvalues) @ basis.T)


# ---- through a hypergradient -----------------------------------------------------------------


def inner(w, lam, x):
    residual = x @ w["a"] + w["b"] - 1
    return 0.5 * jnp.mean(residual**2) + 0.5 * jnp.exp(lam) * jnp.sum(w["a"] ** 2)


def outer(w, lam, x):
    return 0.5 * jnp.mean((x @ w["a"] - w["b"]) ** 2)


X = jnp.asarray(np.random.default_rng(3).standard_normal((12, 4)))


def arguments(dtype):
    w = {"a": jnp.asarray(np.linspace(-1, 1, 4), dtype), "b": jnp.asarray(0.3, dtype)}
    return w, jnp.asarray(-0.5, dtype), X.astype(dtype)


def step(response, state, w, lam, x):
    return hypergrad_solve(
        outer, inner, response, w, lam, inner_batch=x, outer_batch=x, state=state
    )


def test_without_certificate_the_numbers_are_the_same_and_the_residual_is_absent():
    w, lam, x = arguments(jnp.float64)
    for solver in (Neumann(40), CG(20)):
        certified, bare = (
            jax.jit(functools.partial(step, Implicit(solver, Hessian(0.1), certify=flag)))(
                None, w, lam, x
            )
            for flag in (True, False)
        )
        assert relative_error(bare.grads, certified.grads) < 1e-14
        assert set(certified.stats) - set(bare.stats) == {"residual_norm"}


# ---- preconditioners -------------------------------------------------------------------------


def diagonal_calls(solver, matrices):
    """Products told and made, and the solutions, of a loop over ``matrices``."""
    made = []

    def product(a, v):
        jax.debug.callback(lambda: made.append(1), ordered=True)
        return a @ v

    @jax.jit
    def call(a, state):
        return solver.solve_from(
            lambda v: product(a, v), jnp.asarray(G), state, key=jax.random.key(4), certify=False
        )

    state, told = solver.init_state(jnp.asarray(G)), []
    for a in matrices:
        made.clear()
        solution, state = call(a, state)
        jax.effects_barrier()
        assert len(made) == int(solution.stats["num_matvecs"])
        told.append(solution)
    return told


def test_an_estimated_diagonal_serves_as_many_calls_as_it_is_asked_to():
    """Products made and told; the solution to its tolerance whatever the diagonal's age."""
    probes, every = 7, 3
    solver = CG(rtol=1e-11, preconditioner=Diagonal(num_probes=probes, refresh_every=every))
    fresh = CG(rtol=1e-11, preconditioner=Diagonal(num_probes=probes))
    assert fresh.init_state(jnp.asarray(G)) is None and CG().init_state(jnp.asarray(G)) is None
    matrices = [matrix(EIGENVALUES * (1 + 0.1 * i)) for i in range(2 * every)]
    for i, (solution, a) in enumerate(zip(diagonal_calls(solver, matrices), matrices, strict=True)):
        steps = int(solution.stats["num_matvecs"]) - (probes if i % every == 0 else 0)
        assert N - 2 <= steps <= N + 2
        assert relative_error(solution.value, np.linalg.solve(np.asarray(a), G)) < 1e-10


def test_a_diagonal_is_built_anew_where_the_carried_one_is_spoilt():
    solver = CG(rtol=1e-11, preconditioner=Diagonal(num_probes=4, refresh_every=9))
    a, state = matrix(EIGENVALUES), solver.init_state(jnp.asarray(G))
    solve = jax.jit(
        lambda state: solver.solve_from(
            lambda v: a @ v, jnp.asarray(G), state, key=jax.random.key(4)
        )
    )
    first, state = solve(state)
    spoilt = state._replace(built=state.built.at[2].set(jnp.nan))
    again, after = solve(spoilt)
    assert int(again.stats["num_matvecs"]) == int(first.stats["num_matvecs"])
    assert np.array_equal(after.built, state.built) and int(after.age) == 1


def test_warm_start_and_diagonal_are_carried_together():
    """Both in one state of the response: its type is kept, and each is used."""
    w, lam, x = arguments(jnp.float32)
    solver = CG(30, rtol=1e-5, preconditioner=Diagonal(num_probes=5, refresh_every=2))
    response = Implicit(solver, Hessian(0.1))
    state = hypergrad_init(outer, inner, response, w, lam)

    @jax.jit
    def run(state):
        def body(state, key):
            solution = hypergrad_solve(
                outer, inner, response, w, lam, inner_batch=x, outer_batch=x, state=state, key=key
            )
            return solution.state, (solution.stats["num_matvecs"], solution.result)

        return jax.lax.scan(body, state, jax.random.split(jax.random.key(0), 4))

    last, (counts, results) = run(state)
    assert counts[1] == counts[3] == 1  # the residual of a warm start that was the solution
    assert counts[2] == 6  # and the samples of a new diagonal
    assert set(results.tolist()) == {Status.not_stationary}  # the point is no minimum
    assert jax.tree.map(jnp.result_type, last) == jax.tree.map(jnp.result_type, state)


def pooled_by_hand(mean, variance):
    """The formula of the docstring in NumPy, for estimates that are all positive."""
    product = mean.mean(1, keepdims=True) * mean.mean(0, keepdims=True) / mean.mean()
    noise = np.mean(variance / product**2)
    spread = max(np.mean((mean / product - 1) ** 2) - noise, 0)
    weight = spread / (spread + noise)
    return product + weight * (mean - product), weight * variance


def test_pooled_samples_are_the_empirical_bayes_estimate():
    rng = np.random.default_rng(5)
    mean, variance = rng.uniform(1, 3, (5, 4)), rng.uniform(0.01, 0.4, (5, 4))
    got = jax.jit(_pooled)(mean, variance)
    for value, want in zip(got, pooled_by_hand(mean, variance), strict=True):
        assert relative_error(value, want) < 1e-13
    # Without noise nothing is drawn; without scatter beyond the noise all is.
    assert relative_error(_pooled(jnp.asarray(mean), jnp.zeros((5, 4)))[0], mean) < 1e-13
    product = np.outer(np.arange(1.0, 6), np.arange(1.0, 5))
    noisy = product * (1 + 0.1 * rng.choice([-1, 1], product.shape))
    drawn, left = _pooled(jnp.asarray(noisy), jnp.asarray(0.09 * product**2))
    row, column = noisy.mean(1, keepdims=True), noisy.mean(0, keepdims=True)
    assert relative_error(drawn, row * column / noisy.mean()) < 1e-13
    assert np.all(np.asarray(left) == 0)


def test_dead_inputs_stay_dead_when_samples_are_pooled():
    mean = jnp.asarray([[0.0, 0.0], [2.0, 4.0], [1.0, 2.0]])
    drawn, left = _pooled(mean, jnp.where(mean > 0, 0.1, 0.0))
    assert np.all(np.asarray(drawn[0]) == 0) and np.all(np.isfinite(drawn)) and np.all(left >= 0)


def test_a_sampled_diagonal_comes_near_the_exact_one_on_a_decaying_spectrum():
    """Ten samples, features of scale 1/sqrt(j): the entries' own error is 45 % before pooling."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 30)) / np.sqrt(np.arange(1, 31))
    batch, w = jnp.asarray(x), jnp.asarray(0.1 * rng.normal(size=(30, 8)))

    def loss(z, lam, batch):
        return jnp.mean(jax.nn.logsumexp(z, axis=-1))

    def mv_of(model):
        operator = GaussNewton(model, loss, 1e-3)
        problem = Problem(operator.loss, operator.loss)
        return operator.bind(problem, w, jnp.zeros(()), batch, fresh=False).mv

    @jax.jit
    def run(key):
        generic, linear = mv_of(lambda w, lam, b: b @ w), mv_of(LinearModel(lambda lam, b: b))
        return (
            Diagonal(10, floor=1e-12).inverse(generic, w, key),
            Diagonal(floor=1e-12).inverse(linear, w, key),
        )

    for seed in range(3):
        sampled, exact = run(jax.random.key(seed))
        ratio = np.asarray(exact) / np.asarray(sampled)
        assert np.sqrt(np.mean((ratio - 1) ** 2)) < 0.25


# ---- the transpose of the features, stored ---------------------------------------------------


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stored_transpose_changes_no_product(columns, bias):
    rng = np.random.default_rng(8)
    shape = (4,) if columns is None else (4, columns)
    kernel = jnp.asarray(rng.normal(size=shape))
    params = (kernel, jnp.asarray(rng.normal(size=shape[1:]))) if bias else kernel
    u = jnp.asarray(rng.normal(size=(12, *shape[1:])))
    kept, thin = (LinearModel(lambda lam, b: b, store_transpose=s) for s in (True, False))
    assert kept.stored(X, u).shape == (4, 12) and thin.stored(X, u) is None
    got = jax.jit(lambda u: kept.transpose(params, X, u, kept.stored(X, u)))(u)
    assert relative_error(got, thin.transpose(params, X, u)) < 1e-14
    want = jax.vjp(lambda w: kept(w, None, X), params)[1](u)[0]
    assert relative_error(got, want) < 1e-14


def test_the_transpose_is_stored_where_products_are_repeated_on_cpu():
    """Read from the traced program: once for a fixed batch, not for each fresh one."""

    def transposes(model, fresh, outputs=(2,)):
        operator = GaussNewton(model, lambda z, lam, b: 0.5 * jnp.mean(z**2), 0.1)
        problem = Problem(operator.loss, operator.loss)
        batch = X[None] if fresh else X

        def run(w, v):
            mv = operator.bind(problem, w, jnp.zeros(()), batch, fresh=fresh).mv
            return mv.fresh(v, 0) if fresh else mv(v)

        text = str(jax.make_jaxpr(run)(jnp.ones((4, *outputs)), jnp.ones((4, *outputs))))
        return text.count("f64[4,12] = transpose")

    def features(lam, b):
        return b

    on_cpu = jax.default_backend() == "cpu"
    assert transposes(LinearModel(features), False) == on_cpu
    assert transposes(LinearModel(features), False, ()) == 0  # one output: nothing to gain
    assert transposes(LinearModel(features, store_transpose=True), False) == 1
    assert transposes(LinearModel(features, store_transpose=False), False) == 0
    # That of the map on the first batch, which is not called, so that the compiler drops it.
    assert transposes(LinearModel(features, store_transpose=True), True) == 1


# ---- sketches --------------------------------------------------------------------------------


@pytest.mark.parametrize("gaussian", [False, True])
def test_a_sketch_serves_as_many_calls_as_it_is_asked_to(gaussian):
    """Of full rank it is exact; an old one is that of the old matrix, which its residual tells."""
    solver = Nystrom(N, gaussian, refresh_every=3)
    assert Nystrom(N).init_state(jnp.asarray(G)) is None
    state, a = solver.init_state(jnp.asarray(G)), matrix(EIGENVALUES)
    b = 2 * a

    @jax.jit
    def call(a, damping, state):
        amap = LinearMap(lambda v: a @ v, damping)
        return solver.solve_from(amap, jnp.asarray(G), state, key=jax.random.key(2))

    for i, (now, sketched) in enumerate([(a, a), (b, a), (b, a), (b, b)]):
        damping = 0.1 * (i + 1)  # that of the call, never that of the sketch
        solution, state = call(now, damping, state)
        assert int(solution.stats["num_matvecs"]) == (N if i % 3 == 0 else 0)
        shifted = np.asarray(sketched) + damping * np.eye(N)
        assert relative_error(solution.value, np.linalg.solve(shifted, G)) < 1e-9
        residual = G - (np.asarray(now) + damping * np.eye(N)) @ np.asarray(solution.value)
        assert float(solution.stats["residual_norm"]) == pytest.approx(
            np.linalg.norm(residual), abs=1e-8
        )


# ---- the residual of a budget, from the recurrence where that is sure --------------------------


def products_with_residual(solver, a, g):
    """What is told and what is made, in one run with the residual read."""
    made = []

    def product(v):
        jax.debug.callback(lambda: made.append(1), ordered=True)
        return a @ v

    solution = jax.jit(lambda: solver.solve(product, g))()
    jax.effects_barrier()
    return solution, len(made)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_budget_of_cg_tells_its_residual_without_a_product(dtype, steps):
    a, g = matrix(EIGENVALUES).astype(dtype), jnp.asarray(G, dtype)
    solution, made = products_with_residual(CG(steps), a, g)
    assert made == int(solution.stats["num_matvecs"]) == steps
    wide = np.asarray(a, np.float64)
    exact = np.linalg.norm(np.asarray(g, np.float64) - wide @ np.asarray(solution.value))
    assert float(solution.stats["residual_norm"]) == pytest.approx(exact, rel=1e-2)


def test_the_residual_told_is_that_of_the_averaged_iterate_where_that_is_returned():
    a, g = jnp.diag(jnp.asarray([1.0, 1000.0])), jnp.asarray([1.0, 0.05])
    solution, made = products_with_residual(CG(1), a, g)
    exact = np.linalg.norm(np.asarray(g) - np.asarray(a) @ np.asarray(solution.value))
    assert made == 1 and exact < np.linalg.norm(g)  # the plain iterate's is fourteen times that
    assert float(solution.stats["residual_norm"]) == pytest.approx(exact, rel=1e-9)


def test_a_recurrence_that_is_not_sure_is_recomputed():
    """At rounding level the recurrence falls on and the residual does not."""
    a, g = matrix(EIGENVALUES).astype(jnp.float32), jnp.asarray(G, jnp.float32)
    solution, made = products_with_residual(CG(9), a, g)
    assert made == int(solution.stats["num_matvecs"]) + 1
    exact = np.linalg.norm(np.asarray(g, np.float64) - np.asarray(a, np.float64) @ solution.value)
    assert abs(float(solution.stats["residual_norm"]) - exact) < 1e-6 * np.linalg.norm(G)
    # With a tolerance it always is.
    solution, made = products_with_residual(CG(3, rtol=1e-3), a, g)
    assert made == int(solution.stats["num_matvecs"]) + 1


def test_the_bound_on_the_recurrence_holds_on_hard_matrices():
    """float32, condition numbers up to 1e6: never sure of a norm that is wrong by 1 %."""
    rng = np.random.default_rng(11)
    sure = 0

    @functools.partial(jax.jit, static_argnums=0)
    def solve(steps, a, g):
        return CG(steps).solve(lambda v: a @ v, g)

    for power in (1, 3, 6):
        basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
        a = ((basis * np.logspace(0, -power, 40)) @ basis.T).astype(np.float32)
        g = rng.standard_normal(40).astype(np.float32)
        for steps in (5, 20, 60):
            solution = solve(steps, a, g)
            value = np.asarray(solution.value, np.float64)
            exact = np.linalg.norm(g - a.astype(np.float64) @ value)
            told = float(solution.stats["residual_norm"])
            # Recomputed in float32 it is wrong by the rounding of one product.
            rounding = 1e-6 * (np.linalg.norm(g) + np.linalg.norm(value))
            assert abs(told - exact) <= max(0.01 * exact, rounding)
            sure += abs(told - exact) <= 0.01 * exact
    assert sure >= 5
