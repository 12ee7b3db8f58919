"""`with_response`: derivatives of a solution in its data, against closed forms (float64)."""

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
    FixedPoint,
    GaussNewton,
    Hessian,
    Identity,
    Implicit,
    Lineax,
    Neumann,
    Nystrom,
    Root,
    Stochastic,
    Unroll,
    Woodbury,
)
from bilevel.hypergradient import attach

K = jax.random.split(jax.random.key(3), 6)
N, D = 12, 3
X, Y = jax.random.normal(K[0], (N, D)), jax.random.normal(K[1], (N,))
V = jax.tree.map(lambda x, k: jax.random.normal(k, x.shape), (X, Y), (K[2], K[3]))
LAM, START, RHO = jnp.float64(-0.5), jnp.zeros(D), 0.1


def ridge(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def exact(w, lam, batch):
    x, y = batch
    return jnp.linalg.solve(x.T @ x + jnp.exp(lam) * jnp.eye(D), x.T @ y)


def explicit(lam, x, y, damping=0.0):
    """The rule dw = -(H + damping I)^-1 d(grad) in dense algebra that JAX differentiates itself."""

    @jax.custom_jvp
    def solution(lam, x, y):
        return exact(START, lam, (x, y))

    @solution.defjvp
    def rule(primals, tangents):
        w = solution(*primals)
        grad = lambda w, lam, x, y: jax.grad(ridge)(w, lam, (x, y))  # noqa: E731
        a = jax.jacfwd(grad)(w, *primals) + damping * jnp.eye(D)
        b = jax.jvp(lambda *theta: grad(w, *theta), primals, tangents)[1]
        return w, -jnp.linalg.solve(a, b)

    return solution(lam, x, y)


SQUARES = GaussNewton(
    lambda w, lam, batch: batch[0] @ w,
    lambda z, lam, batch: 0.5 * jnp.sum((z - batch[1]) ** 2),
    penalty=lambda w, lam: 0.5 * jnp.exp(lam) * jnp.sum(w**2),
)


def gmres():
    lineax = pytest.importorskip("lineax")
    return Lineax(lineax.GMRES(rtol=1e-13, atol=1e-13))


RESPONSES = {
    "cg": lambda: Implicit(CG(50, rtol=1e-14)),
    "cg unrolled": lambda: Implicit(CG(3, unroll=True)),
    "cg diagonal": lambda: Implicit(CG(50, rtol=1e-14, preconditioner=Diagonal())),
    "neumann": lambda: Implicit(Neumann(300)),
    "stochastic": lambda: Implicit(Stochastic(optax.sgd(0.05), 300)),
    "dense": lambda: Implicit(Dense()),
    "woodbury": lambda: Implicit(Woodbury(), SQUARES),
    "gmres": lambda: Implicit(gmres()),
    # All coordinates: exact, of the damped matrix.
    "nystrom": lambda: Implicit(Nystrom(D), Hessian(RHO)),
}


def value(solution):
    return lambda lam, x, y: jnp.sum(jnp.sin(solution(lam, x, y)) * jnp.arange(1.0, D + 1))


def attached(response, solve=exact, inner=ridge):
    solved = bilevel.with_response(solve, inner, response)
    return lambda lam, x, y: solved(START, lam, (x, y), key=K[5])


def derivatives(f, theta, thorough):
    v = (jnp.float64(0.7), *V)
    out = {
        "grad": jax.grad(f, (0, 1, 2))(*theta),
        "jvp": jax.jvp(f, theta, v)[1],
        "y of lam": jax.grad(lambda y: jax.grad(f)(*theta[:2], y))(theta[2]),
    }
    if thorough:
        push = lambda g: jax.jvp(g, theta, v)[1]  # noqa: E731
        out |= {
            "lam of y": jax.grad(lambda lam: jnp.sum(jax.grad(f, 2)(lam, *theta[1:]) ** 2))(LAM),
            "hvp": push(jax.grad(f, (0, 1, 2))),
            "grad of jvp": jax.grad(lambda *t: jax.jvp(f, t, v)[1], (0, 1, 2))(*theta),
            "hessian": jax.hessian(f, (0, 2))(*theta),
            "third": jax.jvp(lambda *t: jax.jvp(jax.grad(f, 2), t, v)[1], theta, v)[1],
        }
    return out


@functools.cache
def truth(damping=0.0):
    f = value(functools.partial(explicit, damping=damping))
    return jax.jit(lambda *theta: derivatives(f, theta, thorough=True))(LAM, X, Y)


def close(got, want, rtol=1e-9, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


# The rule is one; solvers of other kinds than these differ in their loops.
QUICK = ("cg", "dense", "woodbury", "neumann", "nystrom")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RESPONSES]
)
def test_in_hyperparameters_and_data_by_every_solver(name):
    f, thorough = value(attached(RESPONSES[name]())), name == "cg"
    got = jax.jit(lambda *theta: derivatives(f, theta, thorough))(LAM, X, Y)
    want = truth(RHO if name == "nystrom" else 0.0)
    for how in got:  # solves to 1e-13 of their right sides, and conditions of about ten
        close(got[how], want[how])


def test_the_closed_form_of_ridge_and_the_trace_of_its_hat_matrix():
    solve = attached(Implicit(CG(20, rtol=1e-14)))
    divergence = jax.jit(
        lambda y: (
            jnp.trace(jax.jacfwd(lambda y: X @ solve(LAM, X, y))(y)),
            # Hutchinson's, with all the unit vectors: forward products of one linear solve each.
            jax.vmap(
                lambda v: v @ (X @ jax.jvp(lambda y: solve(LAM, X, y), (y,), (v,))[1]),
            )(jnp.eye(N)).sum(),
            jax.jacrev(lambda y: solve(LAM, X, y))(y),
        )
    )
    one, other, jacobian = divergence(Y)
    x = np.asarray(X)
    want = np.linalg.solve(x.T @ x + np.exp(LAM) * np.eye(D), x.T)
    close(jacobian, want)
    close((one, other), (np.trace(x @ want),) * 2)


def soft(v, lam, step_size):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - step_size * jnp.exp(lam), 0)


def squares(w, lam, batch):
    return 0.5 * jnp.sum((batch[0] @ w - batch[1]) ** 2)


def test_the_divergence_of_the_lasso_is_the_size_of_its_support():
    """Zou, Hastie, Tibshirani, "On the degrees of freedom of the lasso", Annals of Statistics
    2007; and the derivative is that of least squares on the support."""
    x = jax.random.normal(K[4], (20, 6))
    y = x @ jnp.array([2.0, 0.0, -3.0, 0.0, 0.0, 1.5]) + 0.1 * jax.random.normal(K[5], (20,))
    lam, rate = jnp.log(2.0), 0.02

    def solve(w, lam, batch):
        found = bilevel.minimize(squares, w, lam, batch, tol=1e-13, prox=soft, max_steps=2000)
        return found.params

    condition = FixedPoint(bilevel.proximal_step(squares, soft, rate))

    @jax.jit
    def run(x, y):
        out = []
        for solver in (Dense(), gmres()):
            lasso = bilevel.with_response(solve, condition, Implicit(solver))
            fitted = lambda y, s=lasso: s(jnp.zeros(6), lam, (x, y))  # noqa: E731
            out += [jax.jacfwd(fitted)(y), jax.jacrev(fitted)(y)]
        return fitted(y), out

    w, jacobians = run(x, y)
    support = np.flatnonzero(np.asarray(w))
    assert 2 <= len(support) < 6
    want = np.zeros((6, 20))
    want[support] = np.linalg.pinv(np.asarray(x)[:, support])
    for jacobian in jacobians:
        close(jacobian, want, atol=1e-10)
        np.testing.assert_allclose(np.trace(x @ jacobian), len(support), rtol=1e-10)


def test_of_an_equation_that_is_no_gradient():
    """The multiplier of a constraint sum(x) = lam, min |x|^2 / 2 - b'x: to second order in b."""

    def kkt(w, lam, b):
        return {"x": w["x"] * jnp.exp(b[0]) - b + w["nu"], "nu": jnp.sum(w["x"]) - lam}

    def by_hand(w, lam, b):
        a = jnp.exp(b[0])
        nu = (jnp.sum(b) - lam * a) / b.size
        return {"x": (b - nu) / a, "nu": nu}

    start, b = {"x": jnp.zeros(3), "nu": jnp.zeros(())}, jnp.array([0.3, -1.0, 2.0])
    solved = bilevel.with_response(by_hand, Root(kkt), Implicit(Dense()))

    def all_of(solve):
        f = lambda lam, b: jnp.sum(solve(start, lam, b)["x"] ** 3) + solve(start, lam, b)["nu"] ** 2  # noqa: E731
        return jax.grad(f, (0, 1))(0.7, b), jax.hessian(f, (0, 1))(0.7, b)

    got, want = jax.jit(lambda: (all_of(solved), all_of(by_hand)))()
    close(got, want)


# --- it costs nothing where it is not asked for


def programs(monkeypatch, function, *args):
    """The traced program, and the one without the rule for data."""
    both = str(jax.make_jaxpr(function)(*args))
    with monkeypatch.context() as patch:
        patch.setattr(attach, "can_move", lambda batch: False)
        return both, str(jax.make_jaxpr(function)(*args))


def test_a_derivative_in_hyperparameters_has_not_one_operation_more(monkeypatch):
    f = value(attached(Implicit(CG(10))))
    for order in (jax.grad(f), jax.grad(jax.grad(f)), jax.jacfwd(f), jax.jit(jax.grad(f))):
        both, alone = programs(monkeypatch, order, LAM, X, Y)
        assert both == alone
    # And one that is asked has no more solves: one for both parts of theta.
    count = lambda g: str(jax.make_jaxpr(g)(LAM, X, Y)).count("= custom_linear_solve[")  # noqa: E731
    assert count(jax.grad(f, (0, 1, 2))) == count(jax.grad(f)) == count(f) + 1


def test_data_that_are_constants_are_not_traced_for(monkeypatch):
    asked = []
    monkeypatch.setattr(attach, "joined", lambda problem: asked.append(problem))
    jax.grad(lambda lam: value(attached(Implicit(Dense())))(lam, X, Y))(LAM)
    assert not asked


# --- what moves and what does not


def test_whole_numbers_and_keys_stay_as_they_are():
    def inner(w, lam, batch):
        rows, mask = batch["y"][batch["rows"]], jax.random.bernoulli(batch["key"], 0.5, (4,))
        return 0.5 * jnp.sum((w - rows * (1 + mask)) ** 2) + 0.5 * lam * jnp.sum(w**2)

    def solve(w, lam, batch):
        mask = jax.random.bernoulli(batch["key"], 0.5, (4,))
        return batch["y"][batch["rows"]] * (1 + mask) / (1 + lam)

    batch = {"y": Y, "rows": jnp.array([0, 2, 2, 5]), "key": jax.random.key(1)}
    solved = bilevel.with_response(solve, inner, Implicit(CG(5)))

    @jax.jit
    def all_of(lam, batch):
        out = []
        for s in (solved, solve):
            f = lambda lam, batch, s=s: jnp.sum(s(jnp.zeros(4), lam, batch) ** 3)  # noqa: E731
            whole = jax.grad(f, (0, 1), allow_int=True)(lam, batch)
            assert whole[1]["rows"].dtype == jax.dtypes.float0
            out.append(
                (whole[0], whole[1]["y"], jax.jacfwd(lambda y, f=f: f(lam, batch | {"y": y}))(Y))
            )
        return out

    got, want = all_of(0.5, batch)
    close(got, want)


@pytest.mark.slow
def test_it_maps_and_scans_over_batches():
    xs, ys = jnp.stack([X, 2 * X]), jnp.stack([Y, Y + 1])
    solve = attached(Implicit(CG(20, rtol=1e-14)))

    @jax.jit
    def all_of(xs, ys):
        out = []
        for s in (solve, lambda lam, x, y: exact(START, lam, (x, y))):
            grad = jax.grad(value(s), (0, 2))
            scanned = jax.grad(
                lambda ys, s=s: jax.lax.scan(
                    lambda c, b: (c + value(s)(LAM, *b), None), 0.0, (xs, ys)
                )[0]
            )(ys)
            out.append((jax.vmap(grad, (None, 0, 0))(LAM, xs, ys), scanned))
        return out

    close(*all_of(xs, ys))
    mapped = jax.jit(lambda: jax.vmap(jax.grad(value(solve), 2), (None, 0, 0))(
        LAM, np.asarray(xs), np.asarray(ys)
    ))()  # fmt: skip
    close(mapped, all_of(xs, ys)[1][0][1])


@pytest.mark.slow
def test_only_what_the_batch_reaches_responds():
    """A parameter whose gradient depends on the batch alone has a row of B and none of A."""

    def inner(w, lam, y):
        return 0.5 * jnp.sum((w["a"] - lam * y) ** 2) + jnp.vdot(w["b"], y)

    solved = bilevel.with_response(
        lambda w, lam, y: {"a": lam * y, "b": w["b"]}, inner, Implicit(Dense())
    )
    start, y = {"a": jnp.zeros(2), "b": jnp.ones(2)}, jnp.zeros(2)
    f = lambda lam, y, part: jnp.sum(solved(start, lam, y)[part])  # noqa: E731
    assert np.isnan(jax.grad(f, 1)(0.5, y, "b")).all()
    close(jax.grad(f, 1)(0.5, y, "a"), 0.5 * np.ones(2))


def test_an_auxiliary_output_has_no_derivative_in_the_data():
    def solve(w, lam, batch):
        w = exact(w, lam, batch)
        return w, jnp.sum(w**2)

    solved = bilevel.with_response(solve, ridge, Implicit(), has_aux=True)
    assert not np.any(jax.grad(lambda y: solved(START, LAM, (X, y))[1])(Y))


@jax.custom_vjp
def fused(z):
    return 0.5 * jnp.sum(z**2)


fused.defvjp(lambda z: (fused(z), z), lambda z, g: (g * z,))


def test_a_loss_with_a_backward_rule_has_its_first_derivative():
    def inner(w, lam, batch):
        return fused(batch[0] @ w - batch[1]) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)

    f = value(attached(Implicit(CG(20, rtol=1e-14)), inner=inner))
    got = jax.jit(jax.grad(f, (0, 1, 2)))(LAM, X, Y)
    close(got, truth()["grad"])
    close(jax.grad(f, 2)(LAM, X, Y), truth()["grad"][2])
    with pytest.raises(TypeError, match="gives the first derivative only"):
        jax.jacfwd(jax.grad(f))(LAM, X, Y)
    with pytest.raises(TypeError, match="gives the first derivative only"):
        jax.jacfwd(jax.grad(f, 2), 2)(LAM, X, Y)


def stack(n):
    return jnp.broadcast_to(X, (n, N, D)), jnp.broadcast_to(Y, (n, N))


REFUSED = {
    "Unroll": (lambda: Unroll(optax.sgd(0.1), 2), 2),
    "FiniteDifference": (lambda: bilevel.FiniteDifference(optax.sgd(0.1)), None),
    "Implicit with `fresh_batches=True`": (
        lambda: Implicit(Neumann(2, 0.01), fresh_batches=True),
        3,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_responses_refuse_it(name):
    make, count = REFUSED[name]
    x, y = (X, Y) if count is None else stack(count)
    f = value(attached(make(), solve=lambda w, lam, b: exact(w, lam, (X, Y))))
    with pytest.raises(ValueError, match=f"`inner_batch`.*does not give for {name}: its pullback"):
        jax.eval_shape(jax.grad(f, 2), LAM, x, y)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.grad])
def test_leaves_that_no_derivative_reaches_are_named(mode):
    def inner(w, lam, batch):
        return ridge(w, lam, (batch["x"], batch["y"])) + jnp.abs(batch["z"])

    solved = bilevel.with_response(
        lambda w, lam, b: exact(w, lam, (b["x"], b["y"])), inner, Implicit(Dense())
    )

    def f(z, y):
        return jnp.sum(solved(START, LAM, {"x": X, "y": y, "z": z}))

    with pytest.raises(ValueError, match=r"No derivative reaches inner_batch\['z'\]: .*`inner`"):
        jax.eval_shape(mode(f), 1.0, Y)
    assert jax.eval_shape(mode(f, 1), 1.0, Y).shape == (N,)
    with pytest.raises(ValueError, match="a complex leaf of `inner_batch`"):
        jax.eval_shape(mode(lambda t: f(t * (1 + 1j), Y)), 1.0)


# --- inexact solves


@pytest.mark.slow
def test_a_residual_marks_what_is_only_approximate():
    def slope(solver, **options):
        solved = bilevel.with_response(exact, ridge, Implicit(solver), **options)
        f = lambda lam: jnp.sum(solved(START, lam, (X, Y)))  # noqa: E731
        return jax.grad(f)(LAM), jax.jvp(f, (LAM,), (1.0,))[1]

    rough = {"identity": Identity(0.01), "short": CG(1), "series": Neumann(1)}

    @jax.jit
    def all_of():
        kept = {k: slope(s) for k, s in rough.items()}
        marked = {k: slope(s, residual=1e-3) for k, s in rough.items()}
        exact_ones = [slope(s, residual=1e-9) for s in (CG(D), Dense(), Identity(0.01))]
        return kept, marked, exact_ones, slope(Identity(0.01), residual=2.0)

    kept, marked, (cg, dense, identity), allowed = jax.tree.map(np.asarray, all_of())
    assert np.all(np.isfinite(list(kept.values())))
    assert np.all(np.isnan(list(marked.values())))
    want = jax.grad(lambda lam: jnp.sum(exact(START, lam, (X, Y))))(LAM)
    close((cg, dense), ((want, want),) * 2)
    assert np.isnan(identity).all() and np.isfinite(allowed).all()
    assert abs(kept["identity"][0] / want - 1) > 0.1  # what is marked is wrong


def test_a_residual_is_relative():
    solved = bilevel.with_response(exact, ridge, Implicit(Identity(0.01)), residual=0.5)
    slopes = [
        jax.grad(lambda lam, s=s: s * jnp.sum(solved(START, lam, (X, Y))))(LAM) for s in (1e-6, 1e6)
    ]
    assert np.isnan(slopes).all()


def test_a_residual_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="`residual` marks derivatives as NaN, which `on_failure"):
        bilevel.with_response(exact, ridge, Implicit(), residual=0.1, on_failure="keep")
    for bad in (-1.0, float("nan"), "tight", True):
        with pytest.raises((TypeError, ValueError), match="`residual` must be"):
            bilevel.with_response(exact, ridge, Implicit(), residual=bad)
    unrolled = bilevel.with_response(
        lambda w, lam, b: exact(w, lam, (X, Y)), ridge, Unroll(optax.sgd(0.1), 2), residual=0.1
    )
    with pytest.raises(ValueError, match="`residual` judges linear solves, and Unroll tells of no"):
        jax.grad(lambda lam: jnp.sum(unrolled(START, lam, stack(2))))(LAM)
