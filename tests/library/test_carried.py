"""What solvers carry from call to call: products counted, estimates that follow the matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Hessian, Implicit, Neumann, Status
from bilevel.hypergradient import hypergrad_init, hypergrad_solve
from bilevel.linear import CarryingSolver, LinearMap
from bilevel.testing import relative_error

N = 6
EIGENVALUES = np.array([0.4, 0.9, 1.3, 2.0, 3.1, 5.0])
BASIS = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
G = np.random.default_rng(1).standard_normal(N)


def matrix(eigenvalues, basis=BASIS):
    return jnp.asarray((basis * eigenvalues) @ basis.T)


@jax.jit
def warm(solver, a, g, state):
    return solver.solve_from(lambda v: a @ v, g, state)


def calls(solver, matrices, g=G):
    """The solutions of a loop over ``matrices``, from no state."""
    state, solutions = solver.init_state(jnp.asarray(g)), []
    for a in matrices:
        solution, state = warm(solver, a, jnp.asarray(g), state)
        solutions.append(solution)
    return solutions


def top(a):
    return float(jnp.linalg.eigvalsh(a)[-1])


@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_warm_series_makes_one_product_more_than_it_has_terms(k):
    """Reported and really made, the residual's product left out."""
    made = []

    def product(v):
        jax.debug.callback(lambda: made.append(1), ordered=True)
        return matrix(EIGENVALUES) @ v

    solver = Neumann(k, power_steps=4)
    state = solver.init_state(jnp.asarray(G))
    step = jax.jit(lambda state: solver.solve_from(product, jnp.asarray(G), state, certify=False))
    for expected in (k + 4, k + 1, k + 1):
        made.clear()
        solution, state = step(state)
        jax.effects_barrier()
        assert len(made) == int(solution.stats["num_matvecs"]) == expected


def test_the_default_series_of_five_makes_six_products_in_a_loop():
    told = [int(s.stats["num_matvecs"]) for s in calls(Neumann(5), [matrix(EIGENVALUES)] * 4)]
    assert told == [15, 6, 6, 6]


def test_the_carried_direction_is_power_iteration_with_some_of_the_right_side():
    """In NumPy, step by step: start at g, then one product a call."""
    a, solver = np.asarray(matrix(EIGENVALUES)), Neumann(2, power_steps=3)

    def unit(v):
        return v / np.linalg.norm(v)

    v = unit(G)
    for _ in range(2):
        v = unit(a @ v)
    for solution in calls(solver, [a] * 3):
        image = a @ v
        step = 1 / np.linalg.norm(image)
        term = total = G
        for _ in range(2):
            term = term - step * a @ term
            total = total + term
        assert float(solution.stats["step_size"]) == pytest.approx(step, rel=1e-13)
        assert relative_error(solution.value, step * total) < 1e-13
        v = unit(unit(image) + 0.1 * unit(G))


def test_a_warm_series_tends_to_the_inverse():
    """At the rate its own step promises, after the step was found in earlier calls."""
    a = matrix(EIGENVALUES)
    exact = np.linalg.solve(np.asarray(a), G)
    for k in (5, 20, 80, 320):
        solution = calls(Neumann(k), [a] * 3)[-1]
        rho = np.max(np.abs(1 - float(solution.stats["step_size"]) * EIGENVALUES))
        bound = rho ** (k + 1) * np.linalg.norm(G) / EIGENVALUES[0]
        assert np.linalg.norm(solution.value - exact) <= bound * (1 + 1e-9) + 1e-13
    assert relative_error(solution.value, exact) < 1e-10


def drifting(count):
    """Matrices whose eigenvectors turn by 0.1 a call and whose curvatures swell and shrink."""
    rng = np.random.default_rng(7)
    turn = rng.standard_normal((N, N))
    turn = np.linalg.qr(np.eye(N) + 0.05 * (turn - turn.T))[0]
    basis = BASIS
    for i in range(count):
        basis = basis @ turn
        yield matrix(EIGENVALUES * np.exp(0.8 * np.sin(0.2 * i + np.arange(N))), basis)


def test_the_carried_estimate_follows_a_drifting_matrix():
    """Above a half of the largest eigenvalue, down to which the series converges."""
    matrices = list(drifting(60))
    for a, solution in zip(matrices, calls(Neumann(10), matrices), strict=True):
        assert 0.5 * top(a) < 1 / float(solution.stats["step_size"]) <= top(a) * (1 + 1e-12)
        assert Status(int(solution.result)) not in (Status.diverged, Status.worse_than_zero)


@pytest.mark.parametrize("grown", ["all", "another"])
def test_a_sudden_growth_is_marked_and_recovered_from_in_the_next_call(grown):
    """Ten times the curvature everywhere, or in a direction the estimate knew nothing of."""
    a = matrix(EIGENVALUES)
    b = 10 * a if grown == "all" else a + 50 * jnp.outer(BASIS[:, 0], BASIS[:, 0])
    solutions = calls(Neumann(20), [a] * 30 + [b] * 3)
    status = [Status(int(s.result)) for s in solutions[30:]]
    if grown == "another":
        assert float(solutions[30].stats["step_size"]) * top(b) > 2  # the power iteration was blind
        assert status[0] == Status.diverged
    else:  # the refreshed estimate has seen it
        assert status[0] == Status(int(solutions[29].result))
    for solution, told in zip(solutions[31:], status[1:], strict=True):
        assert 0.9 <= float(solution.stats["step_size"]) * top(b) <= 1.2
        assert told in (Status.ok, Status.truncated)
        assert int(solution.stats["num_matvecs"]) == 21


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, 0.0])
def test_a_spoilt_state_is_a_cold_start(spoilt):
    solver, a = Neumann(3), matrix(EIGENVALUES)
    state = jax.tree.map(lambda x: jnp.full_like(x, spoilt), solver.init_state(jnp.asarray(G)))
    solution, _ = warm(solver, a, jnp.asarray(G), state)
    cold = jax.jit(lambda: solver.solve(lambda v: a @ v, jnp.asarray(G)))()
    assert int(solution.stats["num_matvecs"]) == int(cold.stats["num_matvecs"]) == 13
    assert relative_error(solution.value, cold.value) < 1e-13


def test_nothing_is_carried_where_the_step_is_given():
    assert isinstance(Neumann(), CarryingSolver)
    assert Neumann(5, 0.1).init_state(jnp.ones(3)) is None
    problem = (lambda w, lam, b: jnp.sum((w - 1) ** 2), lambda w, lam, b: jnp.sum(lam * w**2))
    for response in (Implicit(Neumann(5, 0.1)), Implicit(Neumann(5), warm_start=False)):
        assert hypergrad_init(*problem, response, jnp.ones(3), jnp.ones(3)) is None


def test_a_right_side_of_zero_stays_cold_and_a_zero_matrix_gives_a_step_of_one():
    zero = calls(Neumann(2), [matrix(EIGENVALUES)] * 2, np.zeros(N))
    assert [int(s.stats["num_matvecs"]) for s in zero] == [12, 12]
    assert all(np.all(np.asarray(s.value) == 0) for s in zero)
    flat = calls(Neumann(2), [jnp.zeros((N, N))] * 2)[-1]
    assert float(flat.stats["step_size"]) == 1


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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_state_of_a_series_keeps_its_type_and_counts_under_scan(dtype):
    """From `hypergrad_init` and from None; float32 vectors for bfloat16 parameters."""
    response, (w, lam, x) = Implicit(Neumann(3), Hessian(0.1)), arguments(dtype)
    state = hypergrad_init(outer, inner, response, w, lam)

    @jax.jit
    def run(state):
        def body(state, _):
            solution = step(response, state, w, lam, x)
            return solution.state, (solution.stats["num_matvecs"], solution.grads)

        return jax.lax.scan(body, state, length=3)

    last, (counts, grads) = run(state)
    assert counts.tolist() == [13, 4, 4]
    assert jax.tree.map(jnp.result_type, last) == jax.tree.map(jnp.result_type, state)
    assert last.solver["a"].dtype == jnp.promote_types(dtype, jnp.float32)
    first = jax.jit(lambda: step(response, None, w, lam, x))()
    assert jax.tree.map(jnp.result_type, first.state) == jax.tree.map(jnp.result_type, state)
    limit = {jnp.bfloat16: 2e-2, jnp.float32: 1e-5, jnp.float64: 1e-12}[dtype]
    assert relative_error(first.grads, grads[0]) < limit


def test_populations_carry_their_own_directions():
    """`vmap` of a warm and a cold member: each counts its own products."""
    response, (w, lam, x) = Implicit(Neumann(3)), arguments(jnp.float64)
    cold = hypergrad_init(outer, inner, response, w, lam)
    one = jax.jit(functools.partial(step, response))
    known = one(cold, w, lam, x).state
    both = jax.tree.map(lambda *s: jnp.stack(s), cold, known)
    out = jax.jit(jax.vmap(lambda s: step(response, s, w, lam, x)))(both)
    assert out.stats["num_matvecs"].tolist() == [13, 4]
    for i, state in enumerate((cold, known)):
        assert relative_error(out.grads[i], one(state, w, lam, x).grads) < 1e-12


def test_fresh_batches_go_on_from_the_carried_direction():
    """The last batch of the power iteration refreshes it; the series reads those after."""
    stack = np.stack([np.asarray(matrix(EIGENVALUES * s)) for s in (1.0, 1.1, 0.9, 1.2)])
    amap = LinearMap(lambda v: stack[0] @ v, fresh=lambda v, i: jnp.asarray(stack)[i] @ v)
    solver, v = Neumann(2, power_steps=2), BASIS[:, -1]
    solution, _ = jax.jit(lambda s: solver.solve_from(amap, jnp.asarray(G), s))(jnp.asarray(v))
    step = 1 / np.linalg.norm(stack[1] @ v)
    term = total = G
    for a in stack[2:]:
        term = term - step * a @ term
        total = total + term
    assert relative_error(solution.value, step * total) < 1e-13
    assert int(solution.stats["num_matvecs"]) == 3
