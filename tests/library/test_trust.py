"""Every number is right, refused or marked: implicit hypergradients off the beaten path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import (
    CG,
    Dense,
    Diagonal,
    GaussNewton,
    Hessian,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Status,
    Stochastic,
)
from bilevel.linear import LinearMap
from bilevel.regularizers import l1_penalty
from bilevel.testing import relative_error

KEY = jax.random.key(0)


def mse(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def ridge(w, lam, batch):
    return mse(w, lam, batch) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def regression(seed=1, d=8):
    k = jax.random.split(jax.random.key(seed), 6)
    true = jnp.array([1.0, -1, 0.5, 0, 0, 0.8, -0.6, 0])[:d]
    x, xv = jax.random.normal(k[0], (60, d)), jax.random.normal(k[2], (40, d))
    y = x @ true + 0.5 * jax.random.normal(k[1], (60,))
    return (x, y), (xv, xv @ true + 0.5 * jax.random.normal(k[3], (40,)))


TRAIN, VALID = regression()
STRENGTH = jnp.float64(-1.0)


def ridge_solution(lam=STRENGTH):
    x, y = map(np.asarray, TRAIN)
    w = np.linalg.solve(x.T @ x / 60 + np.exp(float(lam)) * np.eye(x.shape[1]), x.T @ y / 60)
    return jnp.asarray(w)


def solve(inner, w, lam, response=None, outer=mse, train=TRAIN, valid=VALID, **options):
    """In one program: eagerly, a hundred tiny ones would be compiled.

    But of unrolled steps each is the same tiny programs, which are compiled once eagerly.
    """
    response = Implicit(CG(rtol=1e-10)) if response is None else response

    def program(w, lam, train, valid):
        return bilevel.hypergrad_solve(
            outer, inner, response, w, lam, inner_batch=train, outer_batch=valid, **options
        )

    unrolled = getattr(getattr(response, "solver", None), "unroll", False)
    return (program if unrolled else jax.jit(program))(w, lam, train, valid)


def solve_matrix(solver, matrix, g, start=None):
    """A linear solve with this matrix, in one program."""
    return jax.jit(lambda a, g, x0: solver.solve(lambda v: a @ v, g, x0))(matrix, g, start)


def status(solution) -> Status:
    return Status(int(solution.result))


def part(solution) -> float:
    return float(solution.stats["residual_norm"] / solution.stats["rhs_norm"])


# ---- is the point a minimum? -----------------------------------------------------------------


def projected(inner, lam, project, steps=2000):
    """Gradient steps with a projection or a threshold after each, to convergence."""
    x, _ = TRAIN
    size = float(jnp.linalg.eigvalsh(x.T @ x / 60)[-1] + jnp.exp(jnp.max(lam)))

    def step(i, w):
        return project(w - jax.grad(inner)(w, lam, TRAIN) / size, 1 / size)

    return jax.jit(lambda w: jax.lax.fori_loop(0, steps, step, w))(jnp.zeros(x.shape[1]))


def lasso(w, lam, batch):
    return mse(w, lam, batch) + l1_penalty(w, {"": lam})


def at_lasso_solution():
    lam = jnp.full(8, -1.5) + jnp.linspace(-0.3, 0.6, 8)

    def threshold(v, step):
        return jnp.sign(v) * jnp.maximum(jnp.abs(v) - jnp.exp(lam) * step, 0)

    return lasso, projected(mse, lam, threshold), lam


def at_nonnegative_solution():
    return ridge, projected(ridge, STRENGTH, lambda w, _: jnp.maximum(w, 0)), STRENGTH


def untrained():
    return ridge, jnp.full(8, 0.1), STRENGTH


@functools.cache
def point(make):
    """Found once for all solvers."""
    return make()


@pytest.mark.parametrize("make", [at_lasso_solution, at_nonnegative_solution, untrained])
@pytest.mark.parametrize("solver", [CG(rtol=1e-10), Neumann(200), Dense()])
def test_far_from_a_minimum_is_a_status(make, solver):
    inner, w, lam = point(make)
    solution = solve(inner, w, lam, Implicit(solver))
    assert part(solution) < 0.1  # the system itself is solved: nothing else would tell
    assert status(solution) == Status.not_stationary
    with pytest.raises(bilevel.HypergradientError, match="not at a minimum of the inner loss"):
        bilevel.raise_for_status(solution)


def test_at_a_minimum_is_ok_in_every_precision():
    w = ridge_solution()
    for dtype in ("float64", "float32", "bfloat16"):
        cast = [jax.tree.map(lambda v, t=dtype: v.astype(t), a) for a in (w, STRENGTH)]
        data = [jax.tree.map(lambda v, t=dtype: v.astype(t), b) for b in (TRAIN, VALID)]
        solution = solve(ridge, *cast, Implicit(CG(20)), train=data[0], valid=data[1])
        # bfloat16 rounds the parameters to 0.4 % of their length, far below the 5 % allowed.
        assert status(solution) == Status.ok, dtype


def test_distance_from_the_minimum_is_measured_as_defined():
    """On a quadratic, the gradient at (1 + e) w* is e H w*, and the outer loss changes as told."""
    w = ridge_solution()
    x, _ = TRAIN
    hessian = x.T @ x / 60 + jnp.exp(STRENGTH) * jnp.eye(8)
    for e in (1e-4, 1e-2, 0.3):
        at = (1 + e) * w
        solution = solve(ridge, at, STRENGTH, Implicit(Dense()))
        size = jnp.linalg.norm(hessian @ w) * e
        assert float(solution.stats["stationarity"]) == pytest.approx(float(size), rel=1e-6)
        top = jnp.linalg.eigvalsh(hessian)[-1]
        assert float(solution.stats["relative_stationarity"]) == pytest.approx(
            float(size / (top * jnp.linalg.norm(at))), rel=1e-6
        )
        slope = jax.grad(mse)(at, STRENGTH, VALID) @ (w - at)
        assert float(solution.stats["predicted_change"]) == pytest.approx(float(slope), rel=1e-6)
    assert status(solution) == Status.not_stationary


def test_flat_directions_that_matter_are_seen_through_the_outer_loss():
    """Curvatures of 1e4 and 1e-2: the gradient step is tiny, the way to the minimum is not."""
    curvature = jnp.array([1e4, 1e-2])

    def inner(w, lam, batch):
        return 0.5 * jnp.sum(curvature * (w - lam) ** 2)

    def outer(w, lam, batch):
        return 0.5 * jnp.sum(w**2)

    at = jnp.array([1.0, 3.0])  # minimum at (1, 1)
    solution = jax.jit(
        lambda w: bilevel.hypergrad_solve(
            outer, inner, Implicit(Dense()), w, jnp.ones(2), inner_batch=None, outer_batch=None
        )
    )(at)
    assert float(solution.stats["relative_stationarity"]) < 1e-5
    assert status(solution) == Status.not_stationary


def test_an_outer_loss_of_zero_does_not_cry_wolf():
    x, _ = TRAIN
    w = ridge_solution().astype(jnp.float32)
    data = (x.astype(jnp.float32), (x @ ridge_solution()).astype(jnp.float32))
    train = jax.tree.map(lambda v: v.astype(jnp.float32), TRAIN)
    solution = solve(ridge, w, jnp.float32(-1), Implicit(CG(20)), train=train, valid=data)
    assert float(solution.value) < 1e-10 and status(solution) == Status.ok


# ---- is the system solved? -------------------------------------------------------------------


def wide_matrix(n=40, condition=1e4):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    return (basis * np.logspace(0, -np.log10(condition), n)) @ basis.T


@pytest.mark.parametrize(
    "solver",
    [Neumann(5), Neumann(5, 0.5), CG(3), Identity(), Nystrom(2), Stochastic(optax.sgd(0.5), 5)],
    ids=lambda s: type(s).__name__,
)
def test_a_spent_budget_is_not_convergence(solver):
    matrix, g = wide_matrix(), np.random.default_rng(1).standard_normal(40)
    damping = 1e-3 if isinstance(solver, Nystrom) else 0.0
    solution = solver.solve(LinearMap(lambda v: matrix @ v, damping), g, key=KEY)
    assert part(solution) > 0.1
    assert status(solution) in (Status.truncated, Status.worse_than_zero)
    assert (status(solution) == Status.worse_than_zero) == (part(solution) > 1.001)


def test_thresholds_replace_the_judgement():
    w = ridge_solution()
    rough = solve(ridge, w, STRENGTH, Implicit(Neumann(1, step_size=0.1)))
    assert status(rough) == Status.truncated and 0.1 < part(rough) < 1
    with pytest.raises(bilevel.HypergradientError, match="truncated: .*spent its budget"):
        bilevel.raise_for_status(rough)
    bilevel.raise_for_status(rough, residual=1.0)
    unmet = solve(ridge, w, STRENGTH, Implicit(CG(3, rtol=1e-12)))
    assert status(unmet) == Status.max_steps
    bilevel.raise_for_status(unmet, residual=1.0)
    nothing = CG().solve(lambda v: v, jnp.zeros(3))  # 0 of 0 is no residual
    bilevel.raise_for_status(nothing, residual=0.0)
    with pytest.raises(bilevel.HypergradientError, match="truncated"):
        bilevel.raise_for_status(rough, residual=part(rough) / 2)
    fine = solve(ridge, w, STRENGTH)
    bilevel.raise_for_status(fine)
    bilevel.raise_for_status(fine, residual=1e-8, stationarity=1e-8)
    with pytest.raises(bilevel.HypergradientError, match="truncated"):
        bilevel.raise_for_status(solve(ridge, w, STRENGTH, Implicit(CG(3))), residual=1e-8)
    off = solve(ridge, 1.3 * w, STRENGTH)
    assert status(off) == Status.not_stationary
    bilevel.raise_for_status(off, stationarity=0.5)
    near = solve(ridge, 1.001 * w, STRENGTH)
    bilevel.raise_for_status(near)
    with pytest.raises(bilevel.HypergradientError, match="not_stationary"):
        bilevel.raise_for_status(near, stationarity=1e-6)
    unrolled = bilevel.Unroll(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match="`residual` judges .*leave it out"):
        stack = jax.tree.map(lambda x: x[None], TRAIN)
        bilevel.raise_for_status(solve(ridge, w, STRENGTH, unrolled, train=stack), residual=0.1)
    with pytest.raises(ValueError, match="`stationarity` must be at least 0"):
        bilevel.raise_for_status(fine, stationarity=-1.0)


# ---- singular and indefinite curvature -------------------------------------------------------


@functools.cache
def embedding(v=30, used=25, dtype=jnp.float64):
    """Rows of an embedding that the training batch does not use, and the right gradient."""
    k = jax.random.split(jax.random.key(3), 4)
    tokens, others = jax.random.randint(k[0], (60,), 0, used), jax.random.randint(k[1], (40,), 0, v)
    y, yv = jax.random.normal(k[2], (60,)), jax.random.normal(k[3], (40,))

    def inner(w, h, b):
        error = w["emb"][b[0]] + w["bias"] - b[1]
        return 0.5 * jnp.sum(jax.nn.softmax(h) * error**2) + 0.5e-2 * w["bias"] ** 2

    def outer(w, h, b):
        return 0.5 * jnp.mean((w["emb"][b[0]] + w["bias"] - b[1]) ** 2)

    z = jnp.concatenate([jax.nn.one_hot(tokens, v, dtype=dtype), jnp.ones((60, 1))], 1)
    seen = jnp.append(z[:, :-1].sum(0) > 0, True)

    @jax.jit
    def minimum(h):
        a = jax.nn.softmax(h)
        hessian = (z.T @ (a[:, None] * z)).at[-1, -1].add(1e-2)
        both = jnp.outer(seen, seen)
        system = jnp.where(both, hessian, 0) + jnp.diag(jnp.where(seen, 0.0, 1.0))
        q = jnp.linalg.solve(system, z.T @ (a * y))
        return {"emb": q[:-1], "bias": q[-1]}

    h = jnp.zeros(60)
    truth = jax.jit(jax.grad(lambda h: outer(minimum(h), h, (others, yv))))(h)
    return outer, inner, minimum(h), h, (tokens, y), (others, yv), truth


@pytest.mark.parametrize(
    ("solver", "error"),
    [
        # The system restricted to the rows that are used is solved to the rounding of float64.
        (Dense(), 1e-8),
        (CG(), 1e-5),
        (CG(rtol=1e-6), 1e-5),
        (CG(100, unroll=True), 1e-5),
        # Ten steps leave about 6 %; five 30 %: never far away, and said.
        (CG(10), 0.2),
        (CG(5), 0.6),
    ],
    ids=str,
)
def test_directions_that_the_batch_does_not_see_do_not_respond(solver, error):
    outer, inner, w, h, train, valid, truth = embedding()
    solution = solve(inner, w, h, Implicit(solver), outer, train, valid)
    assert relative_error(solution.grads, truth) <= error
    assert part(solution) <= 1
    assert status(solution) in (Status.singular, Status.truncated)
    if not isinstance(solver, CG) or solver.max_steps == 100:
        assert status(solution) == Status.singular


@pytest.mark.parametrize("damping", [1e-4, 1e-3])
@pytest.mark.parametrize("steps", [5, 10, 100])
def test_weakly_damped_unseen_rows_are_never_worse_than_zero(damping, steps):
    outer, inner, w, h, train, valid, _ = embedding()
    response = Implicit(CG(steps), Hessian(damping))
    solution = solve(inner, w, h, response, outer, train, valid)
    assert part(solution) <= 1
    assert (status(solution) == Status.ok) == (part(solution) <= 0.1)


def test_consistent_singular_systems_have_their_least_norm_solution():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((12, 5))
    matrix = root @ root.T
    g = matrix @ rng.standard_normal(12)
    exact = np.linalg.pinv(matrix, rcond=1e-10) @ g
    for solver in (CG(), CG(rtol=1e-9), Dense()):
        solution = solve_matrix(solver, matrix, g)
        assert relative_error(solution.value, exact) < 1e-6, solver  # cond 1e2, rounding squared
        assert status(solution) == Status.ok, solver
    # Over-parametrised least squares, the same through a hypergradient: more weights than data.
    x, xv = rng.standard_normal((6, 12)), rng.standard_normal((9, 12))
    y, yv = rng.standard_normal(6), rng.standard_normal(9)

    def inner(w, lam, batch):
        return 0.5 * jnp.mean((x @ w - y - lam) ** 2)

    def outer(w, lam, batch):
        return 0.5 * jnp.mean((xv @ w - yv) ** 2)

    lam = jnp.zeros(6)
    inverse = np.linalg.pinv(x)
    truth = inverse.T @ (xv.T @ (xv @ (inverse @ y) - yv) / 9)
    for solver in (CG(), Dense()):
        at = jnp.asarray(inverse @ y)
        solution = solve(inner, at, lam, Implicit(solver), outer, None, None)
        assert relative_error(solution.grads, truth) < 1e-8
        # The outer gradient has a part that no training example sees: least squares, and said.
        assert status(solution) == Status.singular


def test_semi_definite_is_not_negative_curvature_and_indefinite_is():
    g = np.array([1.0, 1.0, 1.0, 0.3])
    for last, wanted in ((0.0, Status.singular), (-0.5, Status.negative_curvature)):
        matrix = np.diag([3.0, 2.0, 1.0, last])
        for solver in (CG(), CG(rtol=1e-8), CG(20, unroll=True), Dense()):
            solution = solver.solve(lambda v, m=matrix: m @ v, g)
            assert status(solution) == wanted, (solver, last)
            if isinstance(solver, CG):
                assert part(solution) <= 1


def test_cg_is_never_worse_than_zero_on_indefinite_matrices():
    """Random spectra, budgets and starts; the residual is recomputed here."""
    rng = np.random.default_rng(0)

    @jax.jit
    @jax.vmap
    def run(matrix, g, x0):
        def mv(v):
            return matrix @ v

        return [
            CG(steps, preconditioner=p).solve(
                LinearMap(mv, diagonal=lambda: jnp.abs(jnp.diag(matrix)) + 0.1), g, start
            )
            for steps in (1, 4, 9)
            for p in (None, Diagonal())
            for start in (None, x0)
        ]

    lanes, n = 60, 10
    root = rng.standard_normal((lanes, n, n))
    basis = np.linalg.qr(root)[0]
    values = rng.standard_normal((lanes, 1, n)) * np.logspace(0, -3, n) + 0.2
    matrix = basis * values @ np.swapaxes(basis, 1, 2)
    g = rng.standard_normal((lanes, n))
    marked = 0
    for solution in run(matrix, g, 10 * rng.standard_normal((lanes, n))):
        left = np.linalg.norm(g - np.einsum("lij,lj->li", matrix, solution.value), axis=1)
        assert np.all(left <= np.linalg.norm(g, axis=1) * (1 + 1e-9))
        marked += np.sum(solution.result == Status.negative_curvature)
    assert marked > 100  # the generator does make indefinite matrices


def test_smoothed_iterates_are_those_of_minres():
    """The least residual over the Krylov space, found here by dense least squares."""
    matrix, g = wide_matrix(12, 1e3), np.random.default_rng(2).standard_normal(12)
    matrix = matrix - np.outer(matrix @ np.ones(12), np.ones(12)) / 12  # singular, not symmetric
    matrix = (matrix + matrix.T) / 2
    values, vectors = np.linalg.eigh(matrix)
    matrix = vectors * np.maximum(values, 0) @ vectors.T  # positive semi-definite, symmetric
    powers = np.stack([np.linalg.matrix_power(matrix, k) @ g for k in range(6)], 1)
    basis = np.linalg.qr(powers)[0]
    for k in range(1, 6):
        least = np.linalg.lstsq(matrix @ basis[:, :k], g, rcond=None)[0]
        solution = solve_matrix(CG(k), matrix, g)
        left = np.linalg.norm(g - matrix @ np.asarray(solution.value))
        best = np.linalg.norm(g - matrix @ (basis[:, :k] @ least))
        plain = left <= np.linalg.norm(g) and left > best * (1 + 1e-6)
        assert plain or left == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("size", [1e-17, 1e17])
def test_singular_systems_are_solved_at_every_scale_of_the_right_side(size):
    """In float32, where squares of such residuals come near to the ends of its range."""
    outer, inner, w, h, train, valid, _ = embedding()
    hessian = jax.jit(jax.hessian(lambda v: inner({"emb": v[:-1], "bias": v[-1]}, h, train)))
    matrix = np.asarray(hessian(jnp.zeros(31)), np.float32)
    g = np.random.default_rng(0).standard_normal(31).astype(np.float32)
    one = solve_matrix(CG(), matrix, g)
    scaled = solve_matrix(CG(), matrix, np.float32(size) * g)
    assert status(one) == status(scaled) == Status.singular
    # Least squares: the image is the part of g that the batch sees. Where float32 stops, a
    # direction has curvature eps, hence a part of sqrt(eps) = 3e-4 in the range, times cond = 60.
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    seen = vectors[:, values > 1e-6 * values[-1]]
    for solution, scale in ((one, 1.0), (scaled, size)):
        image = matrix.astype(np.float64) @ np.asarray(solution.value, np.float64) / scale
        assert relative_error(image, seen @ (seen.T @ g)) < 2e-2


def test_a_stale_warm_start_is_dropped_and_said():
    matrix, g = np.diag([3.0, 2.0, 1.0]), np.ones(3)
    near = solve_matrix(CG(rtol=1e-8), matrix, g, np.linalg.solve(matrix, g) + 1e-3)
    stale = solve_matrix(CG(rtol=1e-8), matrix, g, np.full(3, 7.0))
    cold = solve_matrix(CG(rtol=1e-8), matrix, g)
    assert bool(near.stats["warm_start_used"]) and not bool(stale.stats["warm_start_used"])
    assert "warm_start_used" not in cold.stats
    assert relative_error(stale.value, cold.value) == 0


# ---- dtypes and frozen leaves ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_a_convex_ridge_is_not_called_indefinite(dtype):
    w = jax.tree.map(lambda v: v.astype(dtype), ridge_solution())
    train, valid = (jax.tree.map(lambda v: v.astype(dtype), b) for b in (TRAIN, VALID))
    exact = solve(ridge, ridge_solution(), STRENGTH).grads
    for solver in (CG(), CG(50), CG(rtol=1e-2), Dense()):
        lam = jnp.asarray(STRENGTH, dtype)
        solution = solve(ridge, w, lam, Implicit(solver), train=train, valid=valid)
        assert status(solution) == Status.ok, solver
        assert abs(float(solution.grads) - float(exact)) < 0.05 * abs(float(exact)), solver


def test_leaves_behind_a_stop_gradient_do_not_respond():
    """Fine-tuning: the right value is that of the system without the frozen leaf."""
    x, y = TRAIN
    frozen = jnp.array([1.0, -1.0])

    def joined(p):
        return jnp.concatenate([jax.lax.stop_gradient(p["frozen"]), p["head"]])

    def inner(p, lam, batch):
        return ridge(joined(p), lam, batch)

    def outer(p, lam, batch):
        return mse(jnp.concatenate([p["frozen"], p["head"]]), lam, batch)

    def minimum(lam):
        z = x[:, 2:]
        left = z.T @ z / 60 + jnp.exp(lam) * jnp.eye(6)
        return jnp.linalg.solve(left, z.T @ (y - x[:, :2] @ frozen) / 60)

    reduced = jax.jit(jax.grad(lambda t: mse(jnp.concatenate([frozen, minimum(t)]), t, VALID)))
    truth, params = reduced(STRENGTH), {"frozen": frozen, "head": jax.jit(minimum)(STRENGTH)}
    for solver in (CG(rtol=1e-10), Dense(), Neumann(400)):
        solution = solve(inner, params, STRENGTH, Implicit(solver), outer=outer)
        assert relative_error(solution.grads, truth) < 1e-8
        assert status(solution) == Status.ok


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Identity(jnp.array(-1.0)), ValueError, "`scale` must be greater than 0, got -1"),
        (lambda: Neumann(50, jnp.array(0.0)), ValueError, "`step_size` must be greater than 0"),
        (lambda: Hessian(jnp.array(-1.0)), ValueError, "`damping` must be at least 0, got -1"),
        (lambda: Hessian(np.float32(-1.0)), ValueError, "`damping` must be at least 0"),
        (lambda: GaussNewton(mse, mse, jnp.array(-1.0)), ValueError, "`damping` must be at least"),
        (lambda: CG(rtol=jnp.array(jnp.nan)), ValueError, "`rtol` must be at least 0, got nan"),
        (lambda: CG(rtol=np.inf), ValueError, "`rtol` must be finite, got inf"),
        (lambda: CG(rtol="1e-6"), TypeError, "`rtol` must be a real number, got '1e-6'"),
        (lambda: CG(rtol=1e-6j), TypeError, "`rtol` must be a real number, got 1e-06j"),
        (lambda: CG(max_steps=None), TypeError, "`max_steps` must be a Python int"),
        (lambda: Neumann(None), TypeError, "`num_matvecs` must be a Python int"),
        (lambda: Diagonal(floor=jnp.array(0.0)), ValueError, "`floor` must be greater than 0"),
        (lambda: bilevel.FiniteDifference(optax.sgd(0.1), jnp.array(0.0)), ValueError,
         "`radius` must be greater than 0"),
        (lambda: bilevel.BestResponse(scale=jnp.array(0.0)), ValueError,
         "`scale` must be greater than 0"),
        (lambda: bilevel.Evolution(optax.sgd(0.1), 1, 2, jnp.array(-0.1)), ValueError,
         "`sigma` must be greater than 0"),
        (lambda: bilevel.Evolution(optax.sgd(0.1), 1, 2, None), TypeError, "sigma"),
    ],
)  # fmt: skip
def test_arrays_are_checked_like_numbers(make, error, match):
    with pytest.raises(error, match=match):
        value = make()
        if isinstance(value, bilevel.Evolution):  # None is a placeholder until it is used
            stack = jax.tree.map(lambda x: x[None], TRAIN)
            solve(ridge, ridge_solution(), STRENGTH, value, train=stack, key=KEY)


def test_one_setting_for_all_parameters():
    with pytest.raises(ValueError, match=r"`response.operator.damping` has shape \(8,\)"):
        solve(ridge, ridge_solution(), STRENGTH, Implicit(CG(), Hessian(jnp.ones(8))))
    with pytest.raises(TypeError, match="`response.solver.scale` must be a real number, got None"):
        solve(ridge, ridge_solution(), STRENGTH, Implicit(Identity(None)))
    mapped = jax.vmap(
        lambda response: solve(ridge, ridge_solution(), STRENGTH, response).grads,
        in_axes=(Implicit(CG(), Hessian(0)),),
    )(Implicit(CG(), Hessian(jnp.array([0.0, 0.5]))))
    one = solve(ridge, ridge_solution(), STRENGTH, Implicit(CG(), Hessian(0.5))).grads
    assert relative_error(mapped[1], one) < 1e-10


@pytest.mark.parametrize(
    "make",
    [
        lambda s: Implicit(Identity(s)),
        lambda s: Implicit(Neumann(50, s)),
        lambda s: Implicit(CG(), Hessian(s - 0.01)),
        lambda s: Implicit(CG(rtol=s - 0.01)),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_traced_settings_out_of_range_are_a_status(make, value):
    @jax.jit
    def call(s):
        solution = solve(ridge, ridge_solution(), STRENGTH, make(s))
        return solution.result

    assert call(0.5) != Status.invalid_setting
    assert call(value) >= Status.invalid_setting
