"""A Krylov subspace carried along a sequence of systems: CG if it stands still, drifts followed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, DynamicLanczos, FixedPoint, Implicit, Neumann, Status
from bilevel.linear import CarryingSolver

N = 12


def spd(seed: int = 0, condition: float = 30.0, n: int = N) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return basis @ np.diag(np.geomspace(1, condition, n)) @ basis.T


def vector(seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(100 + seed).standard_normal(n)


def sequence(solver, matrices, sides):
    """The solutions of a sequence of systems, the state carried from one to the next."""

    @jax.jit
    def step(state, a, g):
        return solver.solve_from(lambda v: a @ v, g, state)

    state, found = solver.init_state(jnp.zeros(N)), []
    for a, g in zip(matrices, sides, strict=True):
        solution, state = step(state, jnp.asarray(a), jnp.asarray(g))
        found.append(solution)
    return found


def error(solution, a, g):
    exact = np.linalg.solve(a, g)
    return np.linalg.norm(np.asarray(solution.value) - exact) / np.linalg.norm(exact)


def test_a_system_that_stands_still_gives_the_iterates_of_cg():
    a, g, m = spd(), vector(0), 8
    found = sequence(DynamicLanczos(m), [a] * m, [g] * m)
    for j, solution in enumerate(found, start=1):
        cg = CG(max_steps=j).solve(lambda v: a @ v, jnp.asarray(g))
        np.testing.assert_allclose(solution.value, cg.value, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(
            solution.stats["residual_norm"], np.linalg.norm(g - a @ solution.value), rtol=1e-8
        )
        assert int(solution.stats["num_matvecs"]) == (2 if j == 1 else 1)
        assert int(solution.stats["subspace"]) == j


def test_a_full_subspace_begins_anew_at_the_value_it_reached():
    a, g, m = spd(), vector(0), 4
    found = sequence(DynamicLanczos(m), [a] * 13, [g] * 13)
    made = [int(s.stats["num_matvecs"]) for s in found]
    assert made == [2, 1, 1, 1] * 3 + [2]
    # Restarted CG: m iterations from where the last m ended.
    x = jnp.zeros(N)
    for k in range(3):
        x = x + CG(max_steps=m).solve(lambda v: a @ v, jnp.asarray(g - a @ x)).value
        np.testing.assert_allclose(found[m * (k + 1) - 1].value, x, rtol=1e-7, atol=1e-9)
    assert error(found[12], a, g) < error(found[3], a, g) / 10


def test_a_subspace_of_all_dimensions_is_exact_and_its_curvatures_the_eigenvalues():
    a, g = spd(), vector(0)
    last = sequence(DynamicLanczos(N), [a] * N, [g] * N)[-1]
    assert error(last, a, g) < 1e-10
    assert int(last.result) == Status.ok
    values = np.linalg.eigvalsh(a)
    np.testing.assert_allclose(last.stats["min_curvature"], values[0], rtol=1e-8)
    np.testing.assert_allclose(last.stats["max_curvature"], values[-1], rtol=1e-8)


def test_an_exhausted_krylov_space_goes_on_without_noise():
    a = np.diag([1.0, 2.0] * (N // 2))  # two different eigenvalues: two vectors are all there is
    g = vector(0)
    found = sequence(DynamicLanczos(6), [a] * 7, [g] * 7)
    assert all(error(s, a, g) < 1e-12 for s in found[1:])
    assert all(np.isfinite(np.asarray(s.value)).all() for s in found)


def drifting(steps: int, speed: float):
    """Matrices and right sides that turn by ``speed`` a step."""
    a, b, g, h = spd(0), spd(1), vector(0), vector(1)
    times = speed * np.arange(steps)
    return (
        [np.cos(t) ** 2 * a + np.sin(t) ** 2 * b for t in times],
        [np.cos(t) * g + np.sin(t) * h for t in times],
    )


def test_a_drift_is_followed_closer_the_slower_it_is():
    ends = []
    for speed in (1e-2, 1e-3, 1e-4):
        matrices, sides = drifting(60, speed)
        found = sequence(DynamicLanczos(6), matrices, sides)
        last = list(zip(found, matrices, sides, strict=True))[-12:]
        ends.append(max(error(s, a, g) for s, a, g in last))
    assert ends[1] < ends[0] / 4 and ends[2] < ends[1] / 4, ends
    assert ends[1] < 0.05


def test_the_residual_shrinks_with_the_subspace():
    matrices, sides = drifting(60, 1e-5)  # on a faster drift the oldest vectors are outdated
    left = []
    for m in (1, 2, 4, 12):
        found = sequence(DynamicLanczos(m), matrices, sides)[-24:]
        left.append(np.mean([float(s.stats["residual_norm"] / s.stats["rhs_norm"]) for s in found]))
    assert all(b < 0.3 * a for a, b in zip(left, left[1:], strict=False)), left


def test_one_product_a_call_beats_a_series_of_as_many_products():
    """A Neumann series cannot go on from where it was: two products a call, begun at zero."""
    matrices, sides = drifting(60, 1e-3)
    found = sequence(DynamicLanczos(6), matrices, sides)
    made = np.mean([float(s.stats["num_matvecs"]) for s in found])
    assert made == pytest.approx(1 + 1 / 6)
    a, g = matrices[-1], sides[-1]
    series = Neumann(2, step_size=1 / 30).solve(lambda v: a @ v, jnp.asarray(g))
    assert error(found[-1], a, g) < 0.1 * error(series, a, g)


def test_statuses_are_honest():
    a, g = spd(), vector(0)
    found = sequence(DynamicLanczos(8), [a] * 8, [g] * 8)
    assert int(found[0].result) == Status.truncated  # one step of steepest descent
    assert int(found[-1].result) == Status.ok
    for s in found:
        ratio = float(s.stats["residual_norm"] / s.stats["rhs_norm"])
        assert (ratio > 0.1) == (int(s.result) == Status.truncated)
    # A matrix that jumps: the old subspace is worse than nothing, and says so.
    jumped = sequence(DynamicLanczos(8), [a] * 7 + [500 * spd(3)], [g] * 8)[-1]
    assert int(jumped.result) == Status.worse_than_zero
    # Negative curvature: told, and left out of the value.
    b = a - 2 * np.eye(N)
    indefinite = sequence(DynamicLanczos(N), [b] * N, [g] * N)
    assert int(indefinite[-1].result) == Status.negative_curvature
    np.testing.assert_allclose(
        indefinite[-1].stats["min_curvature"], np.linalg.eigvalsh(b)[0], rtol=1e-6
    )
    bad = sequence(DynamicLanczos(4), [a] * 2, [g * np.nan, g])
    assert int(bad[0].result) == Status.nonfinite_input
    # A spoilt state counts as none.
    first = sequence(DynamicLanczos(4), [a], [g])[0]
    np.testing.assert_array_equal(bad[1].value, first.value)


def test_a_right_side_of_zero_gives_zero():
    a = spd()
    found = sequence(DynamicLanczos(4), [a] * 3, [np.zeros(N)] * 2 + [vector(0)])
    assert not np.any(found[1].value) and int(found[1].result) == Status.ok
    cg = CG(max_steps=1).solve(lambda v: a @ v, jnp.asarray(vector(0)))
    np.testing.assert_allclose(found[2].value, cg.value, rtol=1e-10)


def test_a_call_without_a_state_is_a_first_one():
    a, g = spd(), jnp.asarray(vector(0))
    solver = DynamicLanczos(4)
    assert isinstance(solver, CarryingSolver)
    cold = solver.solve(lambda v: a @ v, g)
    np.testing.assert_array_equal(cold.value, sequence(solver, [a], [g])[0].value)
    assert "residual_norm" not in solver.solve(lambda v: a @ v, g, certify=False).stats


def test_trees_dtypes_and_lanes():
    like = {"a": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(2)}
    solver = DynamicLanczos(3)
    state = solver.init_state(like)
    assert state.basis["a"].dtype == jnp.float32 and state.basis["b"].dtype == jnp.float64

    def double(v):
        return jax.tree.map(lambda x: 2 * x, v)

    ones = jax.tree.map(jnp.ones_like, like)
    solution, new = solver.solve_from(double, ones, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]
    np.testing.assert_allclose(solution.value["b"], 0.5)
    matrices, sides = drifting(9, 1e-2)
    plain = sequence(solver, matrices, sides)
    states = jax.vmap(lambda _: solver.init_state(jnp.zeros(N)))(jnp.arange(2))
    for a, g, want in zip(matrices, sides, plain, strict=True):
        both = jnp.stack([jnp.asarray(g), 2 * jnp.asarray(g)])
        found, states = jax.vmap(lambda g, s, a=a: solver.solve_from(lambda v: a @ v, g, s))(
            both, states
        )
        np.testing.assert_allclose(found.value[0], want.value, rtol=1e-9)
        np.testing.assert_allclose(found.value[1], 2 * want.value, rtol=1e-9)


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="`subspace` must be at least 1"):
        DynamicLanczos(0)
    step = FixedPoint(lambda w, lam, x: 0.5 * w + lam)
    with pytest.raises(ValueError, match="DynamicLanczos needs a symmetric matrix"):
        bilevel.hypergrad_solve(
            lambda w, lam, x: jnp.sum(w), step, Implicit(DynamicLanczos()), jnp.ones(2),
            jnp.ones(2), inner_batch=(), outer_batch=(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="`fresh_batches=True` needs a solver for random"):
        bilevel.hypergrad_solve(
            lambda w, lam, x: jnp.sum(w), lambda w, lam, x: jnp.sum((w - lam) ** 2),
            Implicit(DynamicLanczos(), fresh_batches=True), jnp.ones(2), jnp.ones(2),
            inner_batch=jnp.ones((2, 1)), outer_batch=(),
        )  # fmt: skip


def test_an_outer_loop_finds_the_optimum_with_it():
    """Ridge with a decay per feature: as near the optimum as CG, for a fraction of its products."""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 40, N)) * np.geomspace(1, 5, N)
    truth = rng.standard_normal(N) * (np.arange(N) < 6)
    data, held_out = ((z, z @ truth + rng.standard_normal(40)) for z in (x, v))

    def train(w, lam, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def valid(w, lam, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)

    stack = jax.tree.map(lambda z: jnp.broadcast_to(z, (20, *z.shape)), data)

    def run(solver):
        loop = bilevel.alternate(
            valid, train, Implicit(solver), optax.sgd(0.015), optax.adam(0.05), 20
        )
        state = loop.init(jnp.zeros(N), jnp.zeros(N))

        def step(s, _):
            return loop.step(s, inner_batches=stack, outer_batch=held_out)

        return jax.jit(lambda s: jax.lax.scan(step, s, length=100))(state)[1]

    ours, cg = run(DynamicLanczos(6)), run(CG(rtol=1e-8))
    assert float(ours.value[-1]) == pytest.approx(float(cg.value[-1]), rel=0.02)
    products = ours.stats["num_matvecs"].sum(), cg.stats["num_matvecs"].sum()
    assert products[0] <= 0.2 * products[1]
    ratio = ours.stats["residual_norm"] / ours.stats["rhs_norm"]
    assert float(jnp.median(ratio[-20:])) < 0.1 < float(ratio[0])
    assert float(ratio[-20:].max()) < 0.3
