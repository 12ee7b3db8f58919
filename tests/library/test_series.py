"""The Neumann series that chooses its step from its own products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Hessian, Implicit, Neumann, Status
from bilevel.hypergradient import hypergrad_init, hypergrad_solve
from bilevel.linear.neumann import KEPT
from bilevel.testing import relative_error

N = 24
BASIS = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
G = np.random.default_rng(1).standard_normal(N)
SPECTRA = {
    "decaying": 10.0 ** -np.linspace(0, 6, N),
    "outlier": np.append(np.linspace(1, 1.3, N - 1), 60.0),
    "singular": np.append(np.zeros(N // 2), np.linspace(0.1, 3, N - N // 2)),
    "indefinite": np.linspace(-0.5, 4, N),
}


def matrix(eigenvalues):
    return (BASIS * eigenvalues) @ BASIS.T


@jax.jit
def solve(solver, a, g):
    return solver.solve(lambda v: a @ v, g)


def terms(a, g, step, k):
    """The terms in NumPy."""
    found = [g]
    for _ in range(k):
        found.append(found[-1] - step * (a @ found[-1]))
    return np.asarray(found)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_series_makes_as_many_products_as_it_tells(k):
    """Really made, the residual's product left out; one for the step where there is none else."""
    made = []

    def product(v):
        jax.debug.callback(lambda: made.append(1), ordered=True)
        return jnp.asarray(matrix(SPECTRA["outlier"])) @ v

    run = jax.jit(lambda g: Neumann(k).solve(product, g, certify=False))
    solution = run(jnp.asarray(G))
    jax.effects_barrier()
    assert len(made) == int(solution.stats["num_matvecs"]) == max(k, 1)


@pytest.mark.parametrize("k", [1, 5, KEPT, KEPT + 7])
def test_the_value_is_the_series_with_the_step_told(k):
    """Term by term in NumPy, whatever the spectrum; the residual by the same products."""
    for name, eigenvalues in SPECTRA.items():
        a = matrix(eigenvalues)
        solution = solve(Neumann(k), jnp.asarray(a), jnp.asarray(G))
        step = float(solution.stats["step_size"])
        expected = step * terms(a, G, step, k).sum(0)
        assert relative_error(solution.value, expected) < 1e-12, name
        low, high = (float(solution.stats[f"{m}_curvature"]) for m in ("min", "max"))
        limit = 1e-12 * np.abs(eigenvalues).max()
        assert eigenvalues.min() - limit <= low <= high <= eigenvalues.max() + limit, name
        bad = (Status.diverged, Status.negative_curvature)
        # One product along a mixture of directions need not meet the negative ones.
        if name != "indefinite" or k > 1:
            assert (Status(int(solution.result)) in bad) == (name == "indefinite"), name


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_step_is_the_largest_under_which_no_term_grows(k):
    r"""``1/a`` is the maximum of ``|Ay|^2 / y'Ay`` over the Krylov space, computed in NumPy."""
    for name in ("decaying", "outlier", "singular"):
        a = matrix(SPECTRA[name])
        krylov = np.linalg.qr(np.stack([np.linalg.matrix_power(a, j) @ G for j in range(k)], 1))[0]
        image = a @ krylov
        root = np.linalg.inv(np.linalg.cholesky(krylov.T @ image))
        largest = np.linalg.eigvalsh(root @ image.T @ image @ root.T)[-1]
        step = float(solve(Neumann(k), jnp.asarray(a), jnp.asarray(G)).stats["step_size"])
        assert step * largest == pytest.approx(1, rel=1e-6), name
        assert step >= (1 - 1e-12) / SPECTRA[name].max()
        lengths = np.linalg.norm(terms(a, G, step, k), axis=1)
        assert (np.diff(lengths) <= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_right_side_without_the_top_direction_does_not_diverge(dtype):
    """With none of it a short series does not see it; a little is found by ten products.

    (With none in float64 a long series meets it by rounding, and tells ``diverged``.)
    """
    eigenvalues = 1 / np.arange(1.0, N + 1) ** 2
    a = matrix(eigenvalues).astype(dtype)
    for share in (0, 1e-6, 1e-3):
        g = (BASIS @ np.append(share, np.ones(N - 1))).astype(dtype)
        for k in (5, 200) if share else (5,):
            solution = solve(Neumann(k), jnp.asarray(a), jnp.asarray(g))
            assert Status(int(solution.result)) in (Status.ok, Status.truncated), (share, k)
            step = float(solution.stats["step_size"])
            # 200 terms would blow any part of it up, and none grows in five.
            assert step * eigenvalues[0] < 2 or k == 5
            lengths = np.linalg.norm(terms(a.astype(float), g.astype(float), step, 5), axis=1)
            assert (np.diff(lengths) <= 0).all()


def test_an_exhausted_space_is_no_direction_of_its_own():
    """An eigenvector, a part of the eigenvectors, one unknown: exact, and the step is right."""
    a = matrix(SPECTRA["outlier"])
    for vectors, limit in (((0,), 1e-13), ((0, N - 1), 1e-12)):
        g = BASIS[:, list(vectors)].sum(1)
        solution = solve(Neumann(9), jnp.asarray(a), jnp.asarray(g))
        top = SPECTRA["outlier"][vectors[-1]]
        assert float(solution.stats["step_size"]) * top == pytest.approx(1, rel=1e-9)
        step = float(solution.stats["step_size"])
        series = sum(
            BASIS[:, i] * (1 - (1 - step * SPECTRA["outlier"][i]) ** 10) / SPECTRA["outlier"][i]
            for i in vectors
        )
        assert relative_error(solution.value, series) < limit
        low = float(solution.stats["min_curvature"])
        assert low == pytest.approx(SPECTRA["outlier"][vectors[0]], rel=1e-9)
    one = solve(Neumann(5), jnp.asarray([[2.5]]), jnp.asarray([-3.0]))
    assert float(one.value[0]) == pytest.approx(-1.2, rel=1e-15)
    assert int(one.result) == Status.ok


def test_a_right_side_of_zero_meets_no_curvature_and_a_zero_matrix_gives_a_step_of_one():
    zero = solve(Neumann(5), jnp.asarray(matrix(SPECTRA["outlier"])), jnp.zeros(N))
    assert not np.asarray(zero.value).any() and int(zero.result) == Status.ok
    assert float(zero.stats["min_curvature"]) == np.inf
    flat = solve(Neumann(5), jnp.zeros((N, N)), jnp.asarray(G))
    assert float(flat.stats["step_size"]) == 1


def test_members_of_a_population_choose_their_own_steps():
    stack = np.stack([matrix(s) for s in SPECTRA.values()])
    both = jax.jit(jax.vmap(lambda a: Neumann(5).solve(lambda v: a @ v, jnp.asarray(G))))(stack)
    for i, a in enumerate(stack):
        alone = solve(Neumann(5), jnp.asarray(a), jnp.asarray(G))
        assert relative_error(both.value[i], alone.value) < 1e-12
        assert int(both.result[i]) == int(alone.result)


# ---- through a hypergradient -----------------------------------------------------------------


def inner(w, lam, x):
    residual = x @ w["a"] + w["b"] - 1
    return 0.5 * jnp.mean(residual**2) + 0.5 * jnp.exp(lam) * jnp.sum(w["a"] ** 2)


def outer(w, lam, x):
    return 0.5 * jnp.mean((x @ w["a"] - w["b"]) ** 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_hypergradient_carries_nothing_and_counts_its_products(dtype):
    """Vectors are float32 for bfloat16 parameters, whose products round at 0.4 %."""
    response, lam = Implicit(Neumann(3), Hessian(0.1)), jnp.asarray(-0.5, dtype)
    w = {"a": jnp.asarray(np.linspace(-1, 1, 4), dtype), "b": jnp.asarray(0.3, dtype)}
    x = jnp.asarray(np.random.default_rng(3).standard_normal((12, 4)), dtype)
    assert hypergrad_init(outer, inner, response, w, lam) is None

    def call(w, lam, x):
        return hypergrad_solve(outer, inner, response, w, lam, inner_batch=x, outer_batch=x)

    solution = jax.jit(call)(w, lam, x)
    assert solution.state is None and int(solution.stats["num_matvecs"]) == 3
    wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (w, lam, x))
    exact = jax.jit(call)(*wide)
    limit = {jnp.bfloat16: 2e-2, jnp.float32: 1e-5, jnp.float64: 1e-14}[dtype]
    assert relative_error(solution.grads, exact.grads) < limit
    step, right = (float(s.stats["step_size"]) for s in (solution, exact))
    assert abs(step / right - 1) < limit
