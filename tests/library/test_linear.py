"""The solvers on matrices: bounds, statuses, honest reports."""

import functools
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import dense_gauss_newton

from bilevel import (
    CG,
    Dense,
    Diagonal,
    Identity,
    LinearModel,
    Neumann,
    Nystrom,
    Status,
    Stochastic,
)
from bilevel.hypergradient import Implicit, hypergrad
from bilevel.linear import LinearMap
from bilevel.linear.neumann import KEPT
from bilevel.problem.operators.gauss_newton import BLOCK, GaussNewton
from bilevel.problem.operators.hessian import Hessian
from bilevel.problem.two_losses import Problem
from bilevel.testing import cases, check_solver, flatten, relative_error

ALL = {case.name: case for case in cases()}
KEY = jax.random.key(3)
N = 6


@functools.partial(jax.jit, static_argnames="certify")
def solve(solver, matrix, rhs, x0=None, damping=0.0, certify=True):
    """One compilation for each kind of solver: matrices, steps and tolerances are arguments."""
    amap = LinearMap(lambda v: matrix @ v, damping)
    return solver.solve(amap, rhs, x0, key=KEY, certify=certify)


def spectrum(eigenvalues: Any, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and no structure."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return (basis * np.asarray(eigenvalues)) @ basis.T


def vector(n: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


DEFINITE = spectrum([0.4, 0.9, 1.3, 2.0, 3.1, 5.0])
G = vector()


def told(matrix, rhs, value, damping=0.0) -> Status:
    """The status that a residual, computed here, deserves where nothing else went wrong."""
    part = np.linalg.norm(rhs - matrix @ value - damping * value) / np.linalg.norm(rhs)
    if part > 1.001:
        return Status.worse_than_zero
    return Status.truncated if part > 0.1 else Status.ok


# name, solver on an n x n matrix, damping it needs (matrix and damping together are solved).
# Steps are 1: exact for A = I after one term, and inside (0, 2/lambda_max).
SOLVERS = [
    ("dense", lambda n: Dense(), 0.0),
    ("cg", lambda n: CG(), 0.0),
    ("cg_rtol", lambda n: CG(rtol=1e-10), 0.0),
    ("cg_unrolled", lambda n: CG(max_steps=n, unroll=True), 0.0),
    ("cg_diagonal", lambda n: CG(preconditioner=Diagonal()), 0.0),
    ("neumann", lambda n: Neumann(3, 1.0), 0.0),
    ("neumann_auto", lambda n: Neumann(3), 0.0),
    ("stochastic", lambda n: Stochastic(optax.sgd(1.0), 3), 0.0),
    ("nystrom", lambda n: Nystrom(n), 0.25),
    ("nystrom_gaussian", lambda n: Nystrom(n, gaussian=True), 0.25),
    ("identity", lambda n: Identity(), 0.0),
]


@pytest.mark.parametrize(("name", "make", "damping"), SOLVERS, ids=[s[0] for s in SOLVERS])
def test_edges_of_every_solver(name, make, damping):
    """A = I, a 1 x 1 matrix, a zero right side, NaN and infinity on either side."""
    eye, g = np.eye(3), vector(3)
    for matrix, rhs in ((eye, g), (np.eye(1), np.array([-2.5])), (eye, np.zeros(3))):
        solution = solve(make(len(rhs)), matrix, rhs, damping=damping)
        assert relative_error(solution.value, rhs / (1 + damping)) < 1e-12 or not rhs.any()
        assert np.linalg.norm(solution.value - rhs / (1 + damping)) <= 1e-12 * np.linalg.norm(rhs)
        assert int(solution.result) == Status.ok
        assert float(solution.stats["residual_norm"]) <= 1e-12 * np.linalg.norm(rhs)
        if name != "nystrom_gaussian" and "min_curvature" in solution.stats and rhs.any():
            assert float(solution.stats["min_curvature"]) == pytest.approx(1 + damping)
            assert float(solution.stats["max_curvature"]) == pytest.approx(1 + damping)
    for poison in (np.nan, np.inf):
        solution = solve(make(3), eye, np.array([1.0, poison, 2.0]), damping=damping)
        assert int(solution.result) == Status.nonfinite_input
        assert not np.isfinite(solution.value).all()
    if name != "identity":  # which never looks at the matrix
        solution = solve(make(3), np.where(eye > 0, np.nan, 0.0), g, damping=damping)
        assert int(solution.result) == Status.nonfinite_output
        assert not np.isfinite(solution.value).any()
    assert not np.isfinite(float(solution.stats["residual_norm"]))


ONE_STRUCTURE = [ALL["ridge_scalar"], ALL["ridge_data_weights"]]


@pytest.mark.parametrize(
    ("solver", "kwargs"),
    [
        (Dense(), {}),
        (CG(rtol=1e-13), {}),
        (CG(rtol=1e-13, preconditioner=Diagonal(num_probes=3)), {"key": KEY}),
        (Neumann(6, 0.1), {"reference": lambda exact: exact.series(6, 0.1)}),
        (Neumann(0, 0.1), {"reference": lambda exact: exact.series(0, 0.1)}),
        (Stochastic(optax.sgd(0.1), 6), {"reference": lambda exact: exact.series(6, 0.1)}),
        (Nystrom(5), {"key": KEY, "damping": 0.5}),
        (Identity(0.3), {"reference": lambda exact: 0.3 * exact.outer_grad}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_reports_are_honest(solver, kwargs):
    """Value, residual and product count, each recomputed outside the solver."""
    check_solver(solver, cases=ONE_STRUCTURE, **kwargs)


# ---- conjugate gradients ---------------------------------------------------------------------


@jax.jit
def iterates(matrix, rhs):
    solutions = [
        CG(max_steps=k, unroll=True).solve(lambda v: matrix @ v, rhs) for k in range(1, N + 1)
    ]
    return jnp.stack([jnp.zeros_like(rhs), *(s.value for s in solutions)])


def test_cg_converges_at_the_proven_rate_along_conjugate_directions():
    matrix = spectrum([1, 2, 7, 20, 60, 100])
    # A right side on the large eigenvalues: residuals stay below it, and iterates are CG's own.
    rhs = spectrum(np.sqrt([1, 2, 7, 20, 60, 100])) @ G
    exact, path = np.linalg.solve(matrix, rhs), np.asarray(iterates(matrix, rhs))
    residuals = np.linalg.norm(rhs[:, None] - matrix @ path.T, axis=0)
    assert residuals.max() <= residuals[0]
    errors = [np.sqrt((x - exact) @ matrix @ (x - exact)) for x in path]
    root = np.sqrt(100.0)
    for k, error in enumerate(errors):
        assert error <= 2 * ((root - 1) / (root + 1)) ** k * errors[0] * (1 + 1e-12)
    assert errors[-1] <= 1e-10 * errors[0]  # finite termination in n steps
    steps = np.diff(path, axis=0)  # multiples of the directions
    steps /= np.sqrt(np.einsum("ki,ij,kj->k", steps, matrix, steps))[:, None]
    assert np.abs(steps @ matrix @ steps.T - np.eye(N)).max() < 1e-9


@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-12])
@pytest.mark.parametrize("unroll", [False, True])
def test_cg_meets_its_tolerance_as_recomputed(rtol, unroll):
    solution = solve(CG(max_steps=12, rtol=rtol, unroll=unroll), DEFINITE, G)
    assert int(solution.result) == Status.ok
    residual = np.linalg.norm(G - DEFINITE @ solution.value)
    # The recurrence may differ from the truth by rounding, 1e-15 cond(A).
    assert residual <= rtol * np.linalg.norm(G) * 1.001 + 1e-14 * np.linalg.norm(G)
    assert float(solution.stats["residual_norm"]) == pytest.approx(residual, rel=1e-6, abs=1e-15)
    assert int(solution.stats["num_matvecs"]) <= N + 1


def test_cg_tolerance_or_budget():
    """An unmet tolerance is said; a budget that was spent is judged by its residual alone."""
    assert int(solve(CG(max_steps=2, rtol=1e-12), DEFINITE, G).result) == Status.max_steps
    assert int(solve(CG(max_steps=2, atol=1e-12), DEFINITE, G).result) == Status.max_steps
    for steps in (1, 2, 4):
        budget = solve(CG(max_steps=steps), DEFINITE, G)
        assert int(budget.result) == told(DEFINITE, G, budget.value)
    assert int(budget.result) == Status.ok and told(DEFINITE, G, 0 * G) == Status.truncated
    assert int(solve(CG(max_steps=2, atol=1e3), DEFINITE, G).stats["num_matvecs"]) == 0


def test_the_product_of_a_warm_start_is_part_of_a_fixed_budget():
    """A start at zero takes none; a budget of one is spent on a step."""
    for steps, start, moves in ((3, 0 * G, 3), (3, 0.1 * G, 2), (1, 0.1 * G, 1)):
        solution = solve(CG(steps), DEFINITE, G, start)
        plain = solve(CG(moves), DEFINITE, G - DEFINITE @ start)
        assert relative_error(solution.value, start + plain.value) < 1e-12
        assert int(solution.stats["num_matvecs"]) == moves + start.any()


def test_cg_warm_start_better_and_worse_than_zero():
    solver = CG(rtol=1e-10)
    exact = np.linalg.solve(DEFINITE, G)
    cold = solve(solver, DEFINITE, G)
    aside = np.linalg.eigh(DEFINITE)[1][:, 2]  # one step along an eigenvector remains
    near = solve(solver, DEFINITE, G, exact + 1e-3 * aside)
    assert int(near.stats["num_matvecs"]) < int(cold.stats["num_matvecs"])
    there = solve(solver, DEFINITE, G, exact)
    assert int(there.stats["num_matvecs"]) == 1  # the product that judges the start
    for start in (-1e6 * G, np.full(N, np.nan)):
        worse = solve(solver, DEFINITE, G, start)
        assert relative_error(worse.value, cold.value) == 0
        judged = int(np.isfinite(start).all())  # a NaN needs no product to be dropped
        assert int(worse.stats["num_matvecs"]) == int(cold.stats["num_matvecs"]) + judged
    assert relative_error(near.value, exact) < 1e-8


def test_cg_preconditioned_equals_plain_in_fewer_steps():
    scale = np.array([1e-3, 1e-2, 1e-1, 1, 1e1, 1e2])
    matrix = scale[:, None] * spectrum([1, 1.1, 1.2, 1.3, 1.4, 1.5]) * scale[None, :]

    @jax.jit
    def both(matrix, rhs):
        amap = LinearMap(lambda v: matrix @ v, diagonal=lambda: jnp.diag(matrix))
        return [
            CG(rtol=1e-9, preconditioner=p).solve(amap, rhs) for p in (Diagonal(floor=1e-12), None)
        ]

    fast, plain = both(matrix, G * scale)
    exact = np.linalg.solve(matrix, G * scale)
    # Residuals of 1e-9 |g| leave errors up to that over the smallest eigenvalue: compare residuals.
    for solution in (fast, plain):
        assert float(solution.stats["residual_norm"]) <= 1e-8 * np.linalg.norm(G * scale)
    assert int(fast.stats["num_matvecs"]) < int(plain.stats["num_matvecs"])
    weight = np.sqrt(np.diag(matrix))
    assert np.linalg.norm(weight * (fast.value - exact)) <= 1e-4 * np.linalg.norm(weight * exact)


def test_cg_stops_at_the_last_good_iterate_under_negative_curvature():
    matrix = np.diag([3.0, 2.0, 1.0, -0.5])
    rhs = np.array([1.0, 1.0, 1.0, 0.3])
    for unroll in (False, True):
        solution = solve(CG(rtol=1e-12, max_steps=8, unroll=unroll), matrix, rhs)
        assert int(solution.result) == Status.negative_curvature
        low, met = float(solution.stats["min_curvature"]), int(solution.stats["num_matvecs"])
        assert -0.5 <= low < 0 and met > 1
        before = solve(CG(max_steps=met - 1, unroll=True), matrix, rhs)
        assert int(before.result) == told(matrix, rhs, before.value)
        assert relative_error(solution.value, before.value) < 1e-12
        assert np.linalg.norm(solution.value) > 0.1
    immediate = solve(CG(rtol=1e-12), -np.eye(4), rhs)
    assert int(immediate.result) == Status.negative_curvature
    assert float(immediate.stats["min_curvature"]) == pytest.approx(-1.0)
    assert np.linalg.norm(immediate.value) == 0  # the start is the last good iterate


def test_cg_says_when_its_recurrence_lies():
    """float32, cond 1e5: rounding holds the true residual at 1e-7 |A||q|, far above 1e-6 |g|."""
    matrix, rhs = spectrum(np.logspace(-5, 0, N)).astype(np.float32), G.astype(np.float32)
    solution = solve(CG(max_steps=200, rtol=1e-6), matrix, rhs)
    assert int(solution.result) == Status.stagnated
    norm = float(solution.stats["rhs_norm"])
    assert float(solution.stats["residual_norm"]) > 10 * 1e-6 * norm
    fine = solve(CG(max_steps=200, rtol=1e-6), DEFINITE.astype(np.float32), rhs)
    assert int(fine.result) == Status.ok


# ---- preconditioner --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax_per_weight", "logistic_per_feature", "multi_output"])
def test_known_diagonal_is_exact(name):
    """A softmax with bias, a scalar output, and outputs that the loss couples."""
    case = ALL[name]
    operator = case.gauss_newton
    damped = GaussNewton(operator.model, operator.output_loss, 0.25, operator.penalty)
    v = jax.tree.map(lambda x: jnp.asarray(vector(x.size).reshape(x.shape)), case.params)

    @jax.jit
    def told(params, hparams, batch, v):
        mv = damped.bind(case.problem, params, hparams, batch, fresh=False).mv
        return mv.diagonal(), mv(v)

    diagonal, product = told(case.params, case.hparams, case.inner_batch, v)
    dense = dense_gauss_newton(case)
    assert relative_error(diagonal, np.diag(dense) + 0.25) < 1e-12
    assert relative_error(dense, case.truth().hessian) < 1e-10  # linear model: both agree
    assert relative_error(product, (dense + 0.25 * np.eye(len(dense))) @ flatten(v)) < 1e-12


@pytest.mark.parametrize("rows", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 300])
def test_known_diagonal_counts_every_example_once(rows):
    """Squares are summed by blocks of examples, the last of which overlaps the one before."""
    x, y = vector(3 * rows).reshape(rows, 3), vector(rows)
    operator = GaussNewton(
        LinearModel(lambda hparams, batch: batch[0]),
        lambda z, hparams, batch: 0.5 * jnp.sum((z - batch[1]) ** 2),
    )
    problem = Problem(operator.loss, operator.loss)
    bound = operator.bind(problem, jnp.ones(3), jnp.zeros(()), (x, y), fresh=False)
    assert relative_error(bound.mv.diagonal(), np.sum(x**2, axis=0)) < 1e-12


def test_rows_by_example_are_the_rows():
    """Several output leaves of unlike shape, which the loss couples within an example."""
    x, y = vector(24).reshape(6, 4), vector(18).reshape(6, 3)
    params = {"a": vector(20).reshape(4, 5), "b": vector(15).reshape(5, 3) ** 2}

    def model(params, hparams, batch):
        hidden = jnp.tanh(batch[0] @ params["a"])
        return {"u": hidden @ params["b"], "v": jnp.sum(hidden, axis=1)}

    def loss(z, hparams, batch):
        return jnp.mean((z["u"] - batch[1]) ** 2) + jnp.mean(z["v"] ** 2 * z["u"][:, 0] ** 2)

    def factors(independent):
        operator = GaussNewton(model, loss, 0.3, independent_examples=independent)
        problem = Problem(operator.loss, operator.loss)
        mv = operator.bind(problem, params, jnp.zeros(()), (x, y), fresh=False).mv
        found = mv.factors()
        return found.rows, found.weights

    (rows, weights), (single, single_weights) = jax.jit(lambda: (factors(False), factors(True)))()
    for name in params:
        assert relative_error(single[name], rows[name]) < 1e-12
    assert relative_error(single_weights, weights) < 1e-12


def test_linear_model_params_in_any_container():
    """A pair, a mapping in its own order, a kernel alone: the transpose lands in the right leaf."""
    x, kernel, bias, u = vector(12).reshape(4, 3), vector(6).reshape(3, 2), vector(2), vector(8)
    u = u.reshape(4, 2)
    model = LinearModel(lambda hparams, batch: batch)
    for params in (
        (kernel, bias),
        {"kernel": kernel, "bias": bias},
        OrderedDict(kernel=kernel, bias=bias),
        kernel,
        {"kernel": kernel},
        (kernel, None),
    ):
        params = jax.tree.map(jnp.asarray, params)
        got = model.transpose(params, jnp.asarray(x), jnp.asarray(u))
        want = jax.vjp(lambda w: model(w, None, jnp.asarray(x)), params)[1](jnp.asarray(u))[0]
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert relative_error(got, want) < 1e-14


def test_hutchinson_diagonal():
    amap = LinearMap(lambda v: jnp.asarray(DEFINITE) @ v)
    probes = 400
    got = 1 / np.asarray(Diagonal(num_probes=probes).inverse(amap, jnp.asarray(G), KEY))
    off = DEFINITE - np.diag(np.diag(DEFINITE))
    spread = np.sqrt((off**2).sum(axis=1) / probes)  # exact for random signs
    assert (np.abs(got - np.diag(DEFINITE)) <= 4 * spread).all()
    diagonal = LinearMap(lambda v: jnp.arange(1.0, N + 1) * v)
    one = 1 / np.asarray(Diagonal(num_probes=1).inverse(diagonal, jnp.asarray(G), KEY))
    assert relative_error(one, np.arange(1.0, N + 1)) < 1e-14  # signs square to one
    with pytest.raises(ValueError, match="key"):
        Diagonal().inverse(amap, jnp.asarray(G), None)


def test_diagonal_of_a_generic_gauss_newton():
    """Unbiased, with the error that its formula proves, and the gain in steps it is there for."""
    rng = np.random.default_rng(0)
    scales = np.logspace(1, -2, 30)  # features of unlike size: what scaling cures
    x, y = rng.normal(size=(200, 30)) * scales, rng.integers(0, 3, 200)
    params = {"w": jnp.asarray(0.1 * rng.normal(size=(30, 3))), "b": jnp.zeros(3)}
    batch = (jnp.asarray(x), jnp.asarray(y))

    def model(w, lam, batch):
        return batch[0] @ w["w"] + w["b"].reshape(1, 3)

    def loss(z, lam, batch):
        picked = jnp.take_along_axis(jax.nn.log_softmax(z), batch[1].reshape(-1, 1), axis=1)
        return -jnp.mean(picked) + 0.1 * jnp.mean(z**2)  # no direction of the outputs is flat

    def penalty(w, lam):
        return lam * jnp.sum(w["w"] ** 2)

    operator = GaussNewton(model, loss, damping=1e-3, penalty=penalty)
    problem = Problem(lambda w, lam, b: operator.loss(w, lam, b), operator.loss)
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

    def bind():
        return operator.bind(problem, params, jnp.asarray(1e-3), batch, fresh=False).mv

    @jax.jit
    def run():
        solvers = [CG(500, rtol=1e-6, preconditioner=p) for p in (Diagonal(10), None)]
        solved = [s.solve(bind(), rhs, key=KEY) for s in solvers]
        return solved, Diagonal(4000, floor=1e-12).inverse(bind(), rhs, KEY)

    (fast, plain), inverse = run()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    mv = jax.jit(lambda v: jax.flatten_util.ravel_pytree(bind()(unravel(v)))[0])
    matrix = np.stack([mv(e) for e in np.eye(flat.size)])
    jacobian = np.asarray(jax.jacobian(lambda v: model(unravel(v), None, batch).ravel())(flat))
    outputs = model(params, None, batch)
    inner = jax.hessian(lambda z: loss(z.reshape(outputs.shape), None, batch))(outputs.ravel())
    images = np.asarray(inner) @ jacobian
    dots = np.sum(jacobian * images, axis=0)
    spread = np.sqrt((np.sum(jacobian**2, 0) * np.sum(images**2, 0) + dots**2) / 4000)
    got = 1 / np.asarray(jax.flatten_util.ravel_pytree(inverse)[0])
    assert (np.abs(got - np.diag(matrix)) <= 5 * spread).all()
    assert int(fast.result) == int(plain.result) == Status.ok
    products = [int(s.stats["num_matvecs"]) for s in (fast, plain)]
    assert products[0] < products[1] / 2, products  # the ten probes included


# ---- Neumann and its stochastic relative -----------------------------------------------------

QUADRATICS = ["ridge_scalar", "ridge_per_feature", "ridge_data_weights", "ridge_labels"]
QUADRATICS += ["quadratic", "least_squares", "logistic_scalar", "logistic_per_feature"]


@pytest.mark.parametrize("k", [0, 1, 5, 20, 100, 500])
def test_neumann_error_is_within_the_proven_bound(k):
    for name in QUADRATICS:
        truth = ALL[name].truth()
        eigenvalues = np.linalg.eigvalsh(truth.hessian)
        for step in (0.5 / eigenvalues[-1], 1.9 / eigenvalues[-1]):
            rho = np.abs(1 - step * eigenvalues).max()
            solution = solve(Neumann(k, step), truth.hessian, truth.outer_grad)
            size = np.linalg.norm(truth.outer_grad)
            bound = rho ** (k + 1) * size / eigenvalues[0]
            error = np.linalg.norm(solution.value - truth.adjoint())
            assert error <= bound * (1 + 1e-9) + 1e-13 * size / eigenvalues[0], (name, step)
            expected = told(truth.hessian, truth.outer_grad, solution.value)
            assert int(solution.result) == expected, (name, step)
            assert int(solution.stats["num_matvecs"]) == k
            assert relative_error(solution.value, truth.series(k, step)) < 1e-11


def test_neumann_error_never_grows_in_the_eigenbasis():
    truth = ALL["ridge_per_feature"].truth()
    eigenvalues, basis = np.linalg.eigh(truth.hessian)
    step = 1.5 / eigenvalues[-1]
    previous = np.full(len(eigenvalues), np.inf)
    for k in (0, 1, 5, 20, 100):
        value = solve(Neumann(k, step), truth.hessian, truth.outer_grad).value
        error = np.abs(basis.T @ (np.asarray(value) - truth.adjoint()))
        assert (error <= previous + 1e-12).all()
        filtered = np.abs((1 - step * eigenvalues) ** (k + 1)) / eigenvalues
        assert np.allclose(error, filtered * np.abs(basis.T @ truth.outer_grad), atol=1e-12)
        previous = error


def test_neumann_diverges_where_the_theory_says_so():
    high = 5.0
    for step, status in ((1.9 / high, Status.ok), (2.1 / high, Status.diverged)):
        assert int(solve(Neumann(100, step), DEFINITE, G).result) == status
    long = solve(Neumann(500, 2.1 / high), DEFINITE, G)
    assert np.linalg.norm(long.value) > 1e3 * np.linalg.norm(np.linalg.solve(DEFINITE, G))
    indefinite = spectrum([-0.2, 0.9, 1.3, 2.0, 3.1, 5.0])
    solution = solve(Neumann(100, 1 / high), indefinite, G)
    assert int(solution.result) == Status.diverged
    assert float(solution.stats["min_curvature"]) < 0
    # One product suffices where it alone proves the point.
    assert int(solve(Neumann(1, 0.1), -np.eye(N), G).result) == Status.diverged
    hidden = np.diag([1.0, -1e-3, 1.0, 1.0, 1.0, 1.0])
    barely = solve(Neumann(20, 1.0), hidden, G)  # all but the bad direction vanish at once
    assert int(barely.result) in (Status.diverged, Status.negative_curvature)


def test_neumann_finds_its_step():
    for matrix in (DEFINITE, 1e4 * DEFINITE, 1e-4 * DEFINITE):
        high = np.linalg.eigvalsh(matrix)[-1]
        solution = solve(Neumann(100), matrix, G)
        step = float(solution.stats["step_size"])
        assert 1 / high <= step * (1 + 1e-12) and step < 1.01 / high
        assert int(solution.result) == Status.ok
        assert int(solution.stats["num_matvecs"]) == 100
        assert relative_error(solution.value, np.linalg.solve(matrix, G)) < 1e-3


def test_stochastic_sgd_is_the_neumann_series():
    for k in (1, 5, 20):
        step = 0.3
        sgd = solve(Stochastic(optax.sgd(step), k), DEFINITE, G)
        series = solve(Neumann(k, step), DEFINITE, G)
        assert relative_error(sgd.value, series.value) < 1e-13
        assert int(sgd.result) == told(DEFINITE, G, sgd.value)
    assert int(solve(Stochastic(optax.sgd(0.5), 20), DEFINITE, G).result) == Status.diverged
    start = solve(Stochastic(optax.sgd(0.3), 5), DEFINITE, G, np.linalg.solve(DEFINITE, G))
    assert relative_error(start.value, np.linalg.solve(DEFINITE, G)) < 1e-13


def test_fresh_batches_make_an_unbiased_series():
    """All 2^(K+1) ways to draw batches, enumerated: their mean is the mean loss's series."""
    rng = np.random.default_rng(4)
    matrices = np.stack([spectrum([0.5, 1.0, 2.0], 1), spectrum([0.3, 1.5, 2.5], 2)])
    cross = rng.standard_normal((2, 3, 2))
    g, k, step = rng.standard_normal(3), 2, 0.4

    def inner(w, lam, batch):
        matrix, b = batch
        v = jnp.concatenate([w["a"], w["b"]])
        return v @ matrix @ v / 2 + v @ b @ lam

    def outer(w, lam, batch):
        return jnp.concatenate([w["a"], w["b"]]) @ batch

    params, lam = {"a": jnp.ones(1), "b": jnp.ones(2)}, jnp.ones(2)
    problem = Problem(outer, inner)
    draws = np.array(np.meshgrid(*[[0, 1]] * (k + 1))).reshape(k + 1, -1).T
    for response in (
        Implicit(Neumann(k, step), fresh_batches=True),
        Implicit(Stochastic(optax.sgd(step), k), fresh_batches=True, warm_start=False),
    ):

        @jax.jit
        @jax.vmap
        def estimate(batch, response=response):
            pullback = response.vjp(problem, params, lam, batch, None)[1]
            return pullback({"a": jnp.asarray(g[:1]), "b": jnp.asarray(g[1:])})[0]

        samples = np.asarray(estimate((matrices[draws], cross[draws])))
        mean, term, total = matrices.mean(0), g, g
        for _ in range(k):
            term = term - step * mean @ term
            total = total + term
        assert relative_error(samples.mean(0), -cross.mean(0).T @ (step * total)) < 1e-12
        assert samples.std(axis=0).min() > 1e-3  # the draws do differ


# ---- Nystrom ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("rank", [1, 3, N])
def test_nystrom_is_within_its_bound(rank, gaussian):
    solver = Nystrom(rank, gaussian)
    # The map g -> q is linear; its columns give back the sketched matrix, M_k = Q^-1 - rho I.
    columns = jax.jit(
        jax.vmap(lambda e, rho: solve(solver, DEFINITE, e, None, rho).value, (0, None))
    )
    for rho in (1e-2, 0.1, 1.0):
        inverse = np.asarray(columns(np.eye(N), rho))
        sketched = np.linalg.inv(inverse) - rho * np.eye(N)
        assert np.linalg.matrix_rank(sketched, tol=1e-7) == rank
        gap = np.linalg.eigvalsh(DEFINITE - sketched)
        assert gap[0] > -1e-8  # M - M_k is PSD: a Schur complement
        e, size = max(gap[-1], 0.0), np.linalg.norm(G)
        solution = solve(solver, DEFINITE, G, None, rho)
        exact = np.linalg.solve(DEFINITE + rho * np.eye(N), G)
        error = np.linalg.norm(solution.value - exact)
        assert error <= size / rho * e / (rho + e) + 1e-8 * np.linalg.norm(exact)
        assert int(solution.result) == told(DEFINITE, G, solution.value, rho)
        assert int(solution.stats["num_matvecs"]) == rank
        if rank == N:
            assert error <= 1e-8 * np.linalg.norm(exact)


def test_nystrom_on_a_singular_matrix_and_an_indefinite_one():
    rng = np.random.default_rng(2)
    root = rng.standard_normal((N, 2))
    for gaussian in (False, True):
        low_rank = solve(Nystrom(4, gaussian), root @ root.T, G, None, 0.1)
        exact = np.linalg.solve(root @ root.T + 0.1 * np.eye(N), G)
        assert relative_error(low_rank.value, exact) < 1e-8  # four columns span a rank of two
        assert int(low_rank.result) == Status.ok
        dead = solve(Nystrom(4, gaussian), np.zeros((N, N)), G, None, 0.1)
        assert relative_error(dead.value, G / 0.1) < 1e-14
    indefinite = solve(Nystrom(N), spectrum([-1, 1, 1, 2, 2, 3]), G, None, 0.1)
    assert int(indefinite.result) == Status.negative_curvature
    assert float(indefinite.stats["min_curvature"]) == pytest.approx(-0.9)


# ---- Dense and refusals ----------------------------------------------------------------------


def test_dense_reports_an_indefinite_matrix_and_solves_it():
    matrix = spectrum([-1.0, 1, 1, 2, 2, 3])
    solution = solve(Dense(), matrix, G)
    assert relative_error(solution.value, np.linalg.solve(matrix, G)) < 1e-12
    assert int(solution.result) == Status.negative_curvature
    assert float(solution.stats["min_curvature"]) == pytest.approx(-1.0)


def test_solvers_refuse_what_they_cannot_do():
    amap = LinearMap(lambda v: v, fresh=lambda v, i: v)
    for solver in (CG(), Dense(), Nystrom(2)):
        with pytest.raises(ValueError, match="same matrix"):
            solver.solve(amap, G, key=KEY)
    with pytest.raises(ValueError, match="damping"):
        Nystrom(2).solve(lambda v: v, G, key=KEY)
    with pytest.raises(ValueError, match="key"):
        Nystrom(2).solve(LinearMap(lambda v: v, 0.1), G)
    with pytest.raises(ValueError, match="exceeds"):
        Nystrom(N + 1).solve(LinearMap(lambda v: v, 0.1), G, key=KEY)
    with pytest.raises(ValueError, match="max_size"):
        Dense(max_size=2).solve(lambda v: v, G)
    with pytest.raises(ValueError, match="tree structure"):
        CG().solve(lambda v: (v,), G)
    with pytest.raises(ValueError, match="damping"):
        Hessian(damping=-0.1)


# ---- what mutants showed to be untested ------------------------------------------------------


def test_neumann_that_finds_its_step_reads_every_fresh_batch_once():
    """The power iteration reads the first batches, the series those after it, in order."""
    rng = np.random.default_rng(5)
    k, power = 3, KEPT
    matrices = np.stack([spectrum(np.sort(rng.uniform(0.5, 2, 4)), i) for i in range(k + power)])
    stack, g = jnp.asarray(matrices), rng.standard_normal(4)
    amap = LinearMap(lambda v: stack[0] @ v, fresh=lambda v, i: stack[i] @ v)
    solution = jax.jit(lambda g: Neumann(k).solve(amap, g))(g)
    v = g
    for i in range(power):
        v = v / np.linalg.norm(v)
        v = matrices[i] @ v
    step = 1 / np.linalg.norm(v)
    term = total = g
    for i in range(power, power + k):
        term = term - step * matrices[i] @ term
        total = total + term
    assert float(solution.stats["step_size"]) == pytest.approx(step, rel=1e-12)
    # The same sums in another order.
    assert relative_error(solution.value, step * total) < 1e-12
    assert int(solution.stats["num_matvecs"]) == k + power


def test_damping_is_part_of_every_product_with_a_fresh_batch():
    x, lam, v = jnp.asarray(vector(24).reshape(3, 4, 2)), jnp.asarray(0.2), jnp.asarray(vector(2))

    def loss(z, hparams, batch):
        return 0.5 * jnp.sum(z**2)

    operator = GaussNewton(LinearModel(lambda h, b: b), loss, 0.7, lambda w, h: h * jnp.sum(w**2))
    problem = Problem(operator.loss, operator.loss)
    for damped in (operator, Hessian(0.7)):
        bound = damped.bind(problem, jnp.ones(2), lam, x, fresh=True)
        for i in range(3):
            matrix = x[i].T @ x[i] + (2 * lam + 0.7) * jnp.eye(2)
            assert relative_error(bound.mv.fresh(v, i), matrix @ v) < 1e-13  # rounding


def test_entries_of_a_preconditioner_are_raised_to_its_floor():
    """Zero, negative and tiny entries would make P indefinite, or magnify their direction."""
    known = jnp.array([4.0, 0.0, -1.0, 1e-9])
    amap = LinearMap(lambda v: known * v, diagonal=lambda: known)
    inverse = Diagonal(floor=0.01).inverse(amap, jnp.ones(4), None)
    low = 0.01 * (4 + 1 + 1e-9) / 4  # the floor is relative to the mean size of an entry
    assert relative_error(inverse, 1 / np.array([4, low, low, low])) < 1e-14


def test_a_lone_key_is_a_fresh_batch_for_every_product():
    """As in unrolled steps and outer loops: folded with the index of the batch."""

    def inner(w, lam, batch):
        x, key = batch
        mask = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        return 0.5 * jnp.mean(((mask * x) @ w) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum((w - 1) ** 2)

    response = Implicit(Neumann(3, 0.2), fresh_batches=True)
    w, lam, count = jnp.array([0.4, 0.7]), jnp.array(0.1), response.num_inner_batches()
    x = jax.random.normal(jax.random.key(3), (count, 6, 2))
    key = jax.random.key(5)
    solve = hypergrad(lambda w, lam, b: jnp.sum(w**2), inner, response)
    alone = solve(w, lam, inner_batch=(x, key), outer_batch=0.0)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    each = solve(w, lam, inner_batch=(x, keys), outer_batch=0.0)
    np.testing.assert_allclose(alone, each, rtol=1e-12)
