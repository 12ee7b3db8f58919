"""`diagnose` and `check_hypergrad`: they find what is there, and doubt what deserves it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import CG, Dense, GaussNewton, Hessian, Identity, Implicit, Neumann, diagnose
from bilevel.linear.lanczos import extremes, lanczos

EIGENVALUES = np.concatenate([[0.01], np.linspace(1, 5, 28), [20.0]])


def rotated(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    return (q * eigenvalues) @ q.T


def quadratic(w, lam, matrix):
    """Coupled leaves; the minimiser is (A + e^lam I)^-1 1."""
    v = jnp.concatenate([w["a"].ravel(), w["b"]])
    return 0.5 * v @ matrix @ v + 0.5 * jnp.exp(lam) * v @ v - jnp.sum(v)


def at_minimum(matrix, lam):
    v = np.linalg.solve(matrix + np.exp(lam) * np.eye(30), np.ones(30))
    return {"a": v[:24].reshape(4, 6), "b": v[24:]}


def outer(w, lam, target):
    return 0.5 * jnp.sum((w["a"] - target) ** 2) + 0.5 * jnp.sum(w["b"] ** 2) + 0.1 * lam**2


LAM = -3.0
RNG = np.random.default_rng(1)
KEY = jax.random.key(0)
MATRIX = rotated(EIGENVALUES)


def test_lanczos_finds_the_spectrum_exactly_in_n_steps():
    like = {"a": jnp.zeros((4, 6)), "b": jnp.zeros(6)}

    def mv(v):
        image = MATRIX @ jnp.concatenate([v["a"].ravel(), v["b"]])
        return {"a": image[:24].reshape(4, 6), "b": image[24:]}

    coefficients = jax.jit(lambda k: lanczos(mv, like, 30, k))(KEY)
    t = np.diag(coefficients.alpha) + np.diag(coefficients.beta[:-1], 1)
    t += np.diag(coefficients.beta[:-1], -1)
    # Without reorthogonalisation copies of 20 would push the small eigenvalues out.
    np.testing.assert_allclose(np.linalg.eigvalsh(t), EIGENVALUES, rtol=1e-9)


def test_lanczos_stops_where_the_krylov_space_ends():
    found = extremes(jax.jit(lambda k: lanczos(lambda v: 2.0 * v, jnp.zeros(10), 5, k))(KEY))
    assert found.steps == 1 and found.smallest == found.largest == pytest.approx(2.0)
    with pytest.raises(ValueError, match="fresh_batches"):
        fresh = bilevel.linear.LinearMap(lambda v: v, fresh=lambda v, i: v)
        lanczos(fresh, jnp.zeros(3), 2, KEY)


def test_healthy_problem():
    w = at_minimum(MATRIX, LAM)
    d = bilevel.diagnose(quadratic, w, LAM, inner_batch=MATRIX, num_steps=30, print=False)
    shift = np.exp(LAM)
    assert d.num_params == 30 and d.stationary and d.damping == 0
    assert d.min_curvature == pytest.approx(0.01 + shift, rel=1e-6)
    assert d.max_curvature == pytest.approx(20 + shift, rel=1e-6)
    assert d.step_size == pytest.approx(1 / (20 + shift), rel=1e-6)
    assert d.condition == pytest.approx((20 + shift) / (0.01 + shift), rel=1e-4)
    assert isinstance(d.response, Implicit)
    sol = jax.jit(
        lambda w: bilevel.hypergrad_solve(
            outer, quadratic, d.response, w, LAM, inner_batch=MATRIX, outer_batch=0.3
        )
    )(w)
    bilevel.raise_for_status(sol)  # the response advised works
    assert (
        bilevel.diagnose(quadratic, w, LAM, inner_batch=MATRIX, num_steps=30, print=False) == d
    )  # repeats


def test_expected_cg_steps_are_enough():
    n = 3000
    spread = jnp.asarray(np.linspace(0.01, 1, n))
    wide = bilevel.diagnose(
        lambda w, lam, b: 0.5 * jnp.sum(b * w**2) + 0 * lam,
        jnp.zeros(n),
        1.0,
        inner_batch=spread,
        num_steps=60,
        print=False,
    )
    assert isinstance(wide.solver, CG) and wide.stationary
    g = jnp.asarray(np.random.default_rng(0).standard_normal(n))
    got = jax.jit(lambda g: wide.solver.solve(lambda v: spread * v, g))(g)
    assert int(got.result) == 0, got.stats
    assert wide.cg_steps < 100


def test_unfit_problems_are_called_so(capsys):
    far = jax.tree.map(lambda x: x + 1.0, at_minimum(MATRIX, LAM))
    d = bilevel.diagnose(quadratic, far, LAM, inner_batch=MATRIX, num_steps=30)
    assert not d.stationary and "not at a minimum" in d.advice[0]
    shown = capsys.readouterr().out
    assert "largest eigenvalue" in shown and "not at a minimum" in shown

    indefinite = rotated(EIGENVALUES - 2.0)
    d = bilevel.diagnose(quadratic, far, LAM, inner_batch=indefinite, num_steps=30, print=False)
    assert d.min_curvature < -1 and any("GaussNewton" in a for a in d.advice)
    cured = bilevel.diagnose(
        quadratic, far, LAM, inner_batch=indefinite, num_steps=30, operator=d.operator, print=False
    )
    assert cured.min_curvature > 0 and cured.damping <= 1e-3 * d.damping

    broken = bilevel.diagnose(
        quadratic, far, LAM, inner_batch=MATRIX * np.nan, num_steps=30, print=False
    )
    assert "NaN" in broken.advice[0] and not broken.stationary
    assert capsys.readouterr().out == ""


def test_plain_table_without_rich(monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    bilevel.diagnose(quadratic, at_minimum(MATRIX, LAM), LAM, inner_batch=MATRIX, num_steps=30)
    assert "CG steps to" in capsys.readouterr().out


def test_gauss_newton_can_be_diagnosed():
    op = GaussNewton(lambda w, lam, b: b @ w, lambda z, lam, b: 0.5 * jnp.sum(z**2))
    x = np.random.default_rng(0).standard_normal((9, 4))
    d = bilevel.diagnose(op.loss, jnp.zeros(4), 0.0, inner_batch=x, operator=op, print=False)
    values = np.linalg.eigvalsh(x.T @ x)
    assert d.min_curvature == pytest.approx(values[0]) and d.max_curvature == pytest.approx(
        values[-1]
    )
    assert dataclasses.is_dataclass(d.operator) and isinstance(d.operator, GaussNewton)


def test_a_network_in_training_is_worth_a_few_products():
    x, y = RNG.standard_normal((40, 30)), RNG.standard_normal((40, 1))
    op = GaussNewton(
        lambda w, lam, b: jnp.tanh(b[0] @ w["in"]) @ w["out"],
        lambda z, lam, b: jnp.mean((z - b[1]) ** 2),
        damping=0.01,
    )
    w = {"in": RNG.standard_normal((30, 20)), "out": RNG.standard_normal((20, 1))}
    d = diagnose(op.loss, w, 0.0, inner_batch=(x, y), operator=op, num_steps=10, print=False)
    assert not d.stationary and d.solver == CG(max_steps=10)
    assert any("a few steps of CG" in line for line in d.advice)


# -- check_hypergrad -----------------------------------------------------------------------------


def check(response, w=None, **options):
    w = at_minimum(MATRIX, LAM) if w is None else w
    return bilevel.check_hypergrad(
        outer,
        quadratic,
        response,
        w,
        LAM,
        inner_batch=MATRIX,
        outer_batch=np.float64(0.3),
        directions=1,
        **options,
    )


def test_right_response_passes_in_float64():
    found = check(Implicit(Dense()))
    assert found.passed and found.converged, found
    # Truncation is step**2 = 4e-10 relative; the rest is rounding over the step.
    assert found.errors.max() < 1e-7
    assert found.distance < 1e-8


@pytest.mark.parametrize(
    "response",
    [Implicit(Identity(1.0)), Implicit(Neumann(1, 0.05)), Implicit(Dense(), Hessian(0.1))],
    ids=["identity", "short-series", "damped"],
)
def test_wrong_response_fails(response):
    found = check(response)
    assert found.converged and not found.passed
    assert "is off by" in found.message


def test_point_that_is_no_minimum_is_told_apart_from_a_wrong_response():
    far = jax.tree.map(lambda x: x + 0.5, at_minimum(MATRIX, LAM))
    at_point, resolved = (check(Implicit(Dense()), far, resolve_first=r) for r in (False, True))
    assert not at_point.passed and resolved.passed
    assert at_point.distance > 0.1 and at_point.stationarity[0] > 1e3 * at_point.stationarity[1]


def test_solver_that_does_not_converge_is_never_passed_over():
    def lazy(w, lam, matrix):  # ten steps of gradient descent
        for _ in range(10):
            w = jax.tree.map(lambda a, g: a - 0.04 * g, w, jax.grad(quadratic)(w, lam, matrix))
        return w

    start = jax.tree.map(jnp.zeros_like, at_minimum(MATRIX, LAM))
    found = check(Implicit(Dense()), start, solve=jax.jit(lazy))
    assert not found.converged and not found.passed
    assert "Inconclusive" in found.message


def test_user_solver_and_float32():
    def exact(w, lam, matrix):
        v = jnp.linalg.solve(matrix + jnp.exp(lam) * jnp.eye(30), jnp.ones(30, matrix.dtype))
        return {"a": v[:24].reshape(4, 6), "b": v[24:]}

    assert check(Implicit(Dense()), solve=jax.jit(exact)).passed
    w, lam, matrix, target = jax.tree.map(
        lambda x: np.asarray(x, np.float32), (at_minimum(MATRIX, LAM), LAM, MATRIX, 0.3)
    )
    found = bilevel.check_hypergrad(
        outer, quadratic, Implicit(CG(60)), w, lam, inner_batch=matrix, outer_batch=target,
        directions=1,
    )  # fmt: skip
    assert found.step > 1e-3  # chosen for the dtype
    assert found.passed, found.message


def test_network_with_a_minimum():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 15, 3)), rng.standard_normal((2, 15))
    w = {"a": 0.3 * rng.standard_normal((3, 4)), "b": 0.3 * rng.standard_normal(4)}

    def fit(w, batch):
        return 0.5 * jnp.mean((jnp.tanh(batch[0] @ w["a"]) @ w["b"] - batch[1]) ** 2)

    def inner(w, lam, batch):
        size = sum(jnp.sum(jnp.exp(lam[k]) * w[k] ** 2) for k in w)
        return fit(w, batch) + 0.5 * size

    found = bilevel.check_hypergrad(
        lambda w, lam, b: fit(w, b),
        inner,
        Implicit(CG(60, rtol=1e-12)),
        w,
        {"a": jnp.full((3, 4), -3.0), "b": jnp.full(4, -3.0)},
        inner_batch=(x[0], y[0]),
        outer_batch=(x[1], y[1]),
        directions=3,
        resolve_first=True,
    )
    assert found.passed, found
    assert found.errors.shape == (3,)


def test_a_check_reads_model_state_as_the_hypergradient_does():
    def inner(w, lam, batch, scale):
        return scale * quadratic(w, lam, batch), 3.0 * scale  # products must not read 3 scale

    def outer_of(w, lam, batch, scale):
        return outer(w, lam, batch) * scale, scale

    w = at_minimum(MATRIX, LAM)
    call = dict(inner_batch=MATRIX, outer_batch=np.float64(0.3), directions=1, has_state=True)
    state = np.float64(2.0)
    found = bilevel.check_hypergrad(
        outer_of, inner, Implicit(Dense()), w, LAM, model_state=state, **call
    )
    assert found.passed and found.status == bilevel.Status.ok, found


def test_a_failed_check_shows_the_solve_before_it_blames_the_parameters():
    found = check(Implicit(CG(max_steps=1)))
    assert not found.passed and found.residual > 0.01
    told = found.message.index("with CG(max_steps=1"), found.message.index("inner gradient's norm")
    assert told[0] < told[1] and "raise its `max_steps`=1" in found.message
    right = check(Implicit(Dense()), w=jax.tree.map(lambda v: v + 0.3, at_minimum(MATRIX, LAM)))
    assert not right.passed and "linear solve" not in right.message


def test_inputs_in_raw_units_and_slow_compilations_are_noticed():
    def inner(w, lam, batch):
        x = batch["x"][:, None, :]
        if w.ndim == 3:
            x = jax.lax.conv(x, w, (1,), "SAME")
        return jnp.mean(x**2) * jnp.sum(w**2) + lam * jnp.sum(w**2)

    small = np.linspace(0.0, 1.0, 8).reshape(2, 4)
    call = dict(hparams=np.float64(0.1), print=False, num_steps=2)
    plain = diagnose(inner, np.ones(2), inner_batch={"x": small}, **call)
    assert not any("scale" in line or "compile" in line for line in plain.advice)
    raw = diagnose(inner, np.ones(2), inner_batch={"x": 255 * small}, **call)
    assert any("inner_batch['x']` holds numbers as large as 255" in line for line in raw.advice)
    deep = diagnose(inner, np.ones((1, 1, 3)), inner_batch={"x": small}, **call)
    assert any("compile slowly" in line for line in deep.advice)


def test_a_composite_problem_is_diagnosed_on_its_support():
    """Eigenvalues of the Hessian's block there, whatever the rest of the matrix holds."""
    kept, lam = np.array([2, 3, 7, 11, 20, 28]), 0.3
    w = np.zeros(30)
    w[kept] = np.linspace(1, 2, 6) * [1, -1, 1, 1, -1, 1]
    target = MATRIX @ w + lam * np.sign(w) + 0.05 * (w == 0)

    def error(w, lam, target):
        return 0.5 * w @ MATRIX @ w - target @ w

    lasso = bilevel.Composite(error, bilevel.prox.l1)
    found = bilevel.diagnose(lasso, jnp.asarray(w), lam, inner_batch=target, print=False)
    block = np.linalg.eigvalsh(MATRIX[np.ix_(kept, kept)])
    assert (found.num_params, found.support) == (30, 6) and found.stationary
    assert found.min_curvature == pytest.approx(block[0], rel=1e-9)
    assert found.max_curvature == pytest.approx(block[-1], rel=1e-9)
    assert found.cg_steps <= 6 and found.damping == 0
    none = bilevel.diagnose(lasso, jnp.zeros(30), 1e3, inner_batch=target, print=False)
    assert none.support == 0 and "No parameter is on the support" in none.advice[0]
