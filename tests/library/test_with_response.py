"""`with_response`: derivatives of every order against closed forms, refusals, status, messages."""

import functools
import warnings

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
    Lineax,
    Neumann,
    Nystrom,
    Stochastic,
    Unroll,
    Woodbury,
)
from bilevel.ground.status import Status

K = jax.random.split(jax.random.key(0), 6)
TRAIN = jax.random.normal(K[0], (30, 4)), jax.random.normal(K[1], (30,))
VALID = jax.random.normal(K[2], (20, 4)), jax.random.normal(K[3], (20,))
LAM = jnp.float64(-1.0)
START = jnp.zeros(4)
RHO = 0.1


def ridge(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def exact(w, lam, batch):
    x, y = batch
    penalty = jnp.diag(jnp.broadcast_to(jnp.exp(lam), (x.shape[1],)))
    return jnp.linalg.solve(x.T @ x / len(y) + penalty, x.T @ y / len(y))


def held_out(w):
    return 0.5 * jnp.mean((VALID[0] @ w - VALID[1]) ** 2) + 0.1 * jnp.sum(jnp.sin(w))


def explicit(lam, damping=0.0):
    """The rule dw = -(H + damping I)^-1 B dlam in dense algebra that JAX differentiates itself."""

    @jax.custom_jvp
    def solution(lam):
        return exact(START, lam, TRAIN)

    @solution.defjvp
    def rule(primals, tangents):
        w = solution(*primals)
        grad = jax.grad(ridge)
        a = jax.jacfwd(grad)(w, primals[0], TRAIN) + damping * jnp.eye(4)
        b = jax.jvp(lambda lam: grad(w, lam, TRAIN), primals, tangents)[1]
        return w, -jnp.linalg.solve(a, b)

    return solution(lam)


def derivatives(objective, lam, thorough):
    """First and second derivatives by compositions of the two modes, and the third."""

    def push(function):  # forward mode
        return lambda lam: jax.jvp(function, (lam,), (jnp.ones_like(lam),))[1]

    grad = jax.grad(objective)
    first, second, third = {"grad": grad}, {"grad of grad": jax.grad(grad)}, {}
    if thorough:
        first["jvp"] = push(objective)
        second |= {
            "jvp of grad": push(grad),
            "grad of jvp": jax.grad(push(objective)),
            "jvp of jvp": push(push(objective)),
            "hessian": jax.hessian(objective),
        }
        third = {"grad of jvp of grad": jax.grad(push(grad))}
    return [{k: f(lam) for k, f in fs.items()} for fs in (first, second, third)]


@functools.cache
def truth(damping=0.0):
    f = jax.grad(lambda lam: held_out(explicit(lam, damping)))
    compute = jax.jit(lambda lam: (f(lam), jax.grad(f)(lam), jax.grad(jax.grad(f))(lam)))
    return [float(x) for x in compute(LAM)]


def test_the_oracle_is_the_closed_form():
    # Through `jnp.linalg.solve` itself: no implicit rule at all.
    f = jax.grad(lambda lam: held_out(exact(START, lam, TRAIN)))
    got = jax.jit(lambda lam: (f(lam), jax.grad(f)(lam), jax.grad(jax.grad(f))(lam)))(LAM)
    np.testing.assert_allclose(got, truth(), rtol=1e-11)


def model(w, lam, batch):
    return batch[0] @ w


SQUARES = GaussNewton(
    model,
    lambda z, lam, batch: 0.5 * jnp.mean((z - batch[1]) ** 2),
    penalty=lambda w, lam: 0.5 * jnp.exp(lam) * jnp.sum(w**2),
)


def lineax_solver(name):
    lineax = pytest.importorskip("lineax")
    return Lineax(getattr(lineax, name)(rtol=1e-13, atol=1e-13))


SOLVERS = {
    "cg": lambda: Implicit(CG(50, rtol=1e-14)),
    "cg unrolled": lambda: Implicit(CG(4, unroll=True)),
    "cg diagonal": lambda: Implicit(CG(50, rtol=1e-14, preconditioner=Diagonal())),
    "neumann": lambda: Implicit(Neumann(150)),
    "stochastic": lambda: Implicit(Stochastic(optax.sgd(0.6), 150)),
    "dense": lambda: Implicit(Dense()),
    "dense gauss-newton": lambda: Implicit(Dense(), SQUARES),
    "woodbury": lambda: Implicit(Woodbury(), SQUARES),
    "lineax cg": lambda: Implicit(lineax_solver("CG")),
    "lineax gmres": lambda: Implicit(lineax_solver("GMRES")),
    # All coordinates: exact, of the damped matrix.
    "nystrom": lambda: Implicit(Nystrom(4), Hessian(RHO)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_order_and_mode_is_right_with_every_solver(name):
    response = SOLVERS[name]()
    solved = bilevel.with_response(exact, ridge, response)

    def objective(lam):
        return held_out(solved(START, lam, TRAIN, key=jax.random.key(7)))

    want = truth(RHO if name == "nystrom" else 0.0)
    thorough = name in ("cg", "woodbury")  # the rest is the same rules
    got = jax.jit(lambda lam: derivatives(objective, lam, thorough))(LAM)
    for values, right in zip(got, want, strict=True):
        for how, value in values.items():
            # Solves to 1e-13 of their right sides, and conditions of about ten.
            np.testing.assert_allclose(value, right, rtol=1e-9, err_msg=f"{name}: {how}")


def test_the_reported_second_derivative():
    """Differences of the exact first derivative gave this number; 67 % off once."""

    def f(lam):
        w = bilevel.with_response(exact, ridge, Implicit(CG()))(START, lam, TRAIN)
        return 0.5 * jnp.mean((VALID[0] @ w - VALID[1]) ** 2)

    # Not compiled, where it was wrong without an error.
    np.testing.assert_allclose(jax.grad(jax.grad(f))(LAM), 1.7845301714e-3, rtol=1e-9)


def test_a_whole_hessian_over_three_decays():
    lam, batch = jnp.array([-1.0, 0.2, 0.7]), (TRAIN[0][:, :3], TRAIN[1])

    def f(lam, solve):
        w = solve(jnp.zeros(3), lam, batch)
        return 0.5 * jnp.mean((VALID[0][:, :3] @ w - VALID[1]) ** 2)

    solved = bilevel.with_response(exact, ridge, Implicit(CG(20, rtol=1e-14)))

    @jax.jit
    def all_of(lam, v):
        f1, f2 = (functools.partial(f, solve=s) for s in (solved, exact))
        hvp = jax.jvp(jax.grad(f1), (lam,), (v,))[1]
        return jax.hessian(f1)(lam), jax.jacrev(jax.grad(f1))(lam), hvp, jax.hessian(f2)(lam)

    v = jnp.array([1.0, -2.0, 0.5])
    hessian, reverse, hvp, want = all_of(lam, v)
    assert np.abs(want - np.diag(np.diag(want))).max() > 1e-5  # its mixed part is there
    for got, right in ((hessian, want), (reverse, want), (hvp, want @ v)):
        np.testing.assert_allclose(got, right, rtol=1e-9, atol=1e-13)


def logistic(w, lam, batch):
    x, y = batch
    penalty = jnp.exp(lam["kernel"]) * w["kernel"] ** 2
    z = x @ w["kernel"] + w["bias"]
    return (
        jnp.mean(jax.nn.softplus(z) - y * z)
        + 0.5 * jnp.sum(penalty)
        + 0.5 * jnp.exp(lam["bias"]) * w["bias"] ** 2
    )


def newton(w, lam, batch):
    """To rounding: forty damped steps would do for any start, ten do from zero."""
    flat, unravel = jax.flatten_util.ravel_pytree(w)
    grad = jax.grad(lambda v: logistic(unravel(v), lam, batch))
    step = lambda _, v: v - jnp.linalg.solve(jax.jacfwd(grad)(v), grad(v))  # noqa: E731
    return unravel(jax.lax.fori_loop(0, 10, step, flat))


def test_logistic_regression_against_differences_of_its_first_derivative():
    """Not quadratic, several leaves: A, B and the right side all depend on the solution."""
    w0 = {"kernel": jnp.zeros(3), "bias": jnp.zeros(())}
    lam = {"kernel": jnp.array([-1.0, -2.0, 0.3]), "bias": jnp.asarray(-3.0)}
    batch = TRAIN[0][:, :3], (TRAIN[1] > 0) * 1.0
    solved = bilevel.with_response(newton, logistic, Implicit(CG(30, rtol=1e-14)))

    def f(lam):  # reads a part of the solution: the cotangent of the bias is a symbolic zero
        return jnp.mean((VALID[0][:, :3] @ solved(w0, lam, batch)["kernel"] - VALID[1]) ** 2)

    def first(lam):  # the hypergradient in dense algebra
        flat, unravel = jax.flatten_util.ravel_pytree(newton(w0, lam, batch))
        grad = jax.grad(lambda v, lam: logistic(unravel(v), lam, batch))
        g = jax.grad(lambda v: jnp.mean((VALID[0][:, :3] @ unravel(v)["kernel"] - VALID[1]) ** 2))(
            flat
        )
        q = jnp.linalg.solve(jax.jacfwd(grad)(flat, lam), g)
        return jax.vjp(lambda lam: grad(flat, lam), lam)[1](-q)[0]

    v = {"kernel": jnp.array([0.3, -1.0, 2.0]), "bias": jnp.asarray(1.0)}

    @jax.jit
    def all_of(lam):
        h = 1e-5
        up, down = (jax.tree.map(lambda a, b, s=s: a + s * h * b, lam, v) for s in (1, -1))
        differences = jax.tree.map(lambda a, b: (a - b) / (2 * h), first(up), first(down))
        by_jvp = jax.jvp(jax.grad(f), (lam,), (v,))[1]

        def dot(lam):
            parts = jax.tree.map(jnp.vdot, jax.grad(f)(lam), v)
            return sum(jax.tree.leaves(parts))

        return jax.grad(f)(lam), first(lam), by_jvp, jax.grad(dot)(lam), differences

    got, want, by_jvp, by_grad, differences = jax.tree.map(np.asarray, all_of(lam))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)
    for second in (by_jvp, by_grad):
        # Differences: h^2 of a third derivative, and rounding over h.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), second, differences
        )


def test_forward_mode_of_the_solution_and_one_leaf_alone():
    lam = {"a": jnp.array([-1.0, 0.5, 0.1, 0.3]), "b": jnp.asarray(0.2)}

    def two(w, lam, batch):
        return ridge(w, lam["a"] + lam["b"], batch)

    def solve(w, lam, batch):
        return exact(w, lam["a"] + lam["b"], batch)

    solved = bilevel.with_response(solve, two, Implicit(CG(20, rtol=1e-14)))

    @jax.jit
    def all_of(lam):
        out = []
        for s in (solved, solve):
            both = lambda lam, s=s: s(START, lam, TRAIN)  # noqa: E731
            only = lambda b, s=s: s(START, {**lam, "b": b}, TRAIN)  # noqa: E731
            out.append(
                (
                    jax.jacfwd(both)(lam),
                    jax.jacrev(both)(lam),
                    jax.jacfwd(only)(lam["b"]),
                    jax.grad(jax.grad(lambda b, only=only: jnp.sum(only(b) ** 3)))(lam["b"]),
                    # One leaf moves in the inner derivative, another in the outer.
                    jax.jacfwd(
                        lambda a, s=s: jax.grad(
                            lambda b: jnp.sum(s(START, {"a": a, "b": b}, TRAIN) ** 3)
                        )(lam["b"])
                    )(lam["a"]),
                )
            )
        return out

    got, want = all_of(lam)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), got, want)


def test_second_derivatives_under_vmap_and_scan_with_a_closure_over_tracers():
    lams = jnp.array([-1.0, 0.5])

    def total(lam, scale, solve=None):
        def scaled(w, lam, batch):  # closes over a tracer
            return scale * ridge(w, lam, batch)

        solved = solve or bilevel.with_response(exact, scaled, Implicit(CG(20, rtol=1e-14)))

        def body(w, _):
            return solved(w, lam, TRAIN), held_out(solved(w, lam, TRAIN))

        return jnp.sum(jax.lax.scan(body, START, length=2)[1])

    @jax.jit
    def all_of(lams, scale):
        second = lambda f: jax.vmap(jax.grad(jax.grad(f)))(lams)  # noqa: E731
        mapped = jax.vmap(lambda lam: jax.hessian(lambda lam: total(lam, scale))(lam))(lams)
        return (
            second(lambda lam: total(lam, scale)),
            mapped,
            second(lambda lam: total(lam, scale, solve=exact)),
        )

    grads, mapped, want = all_of(lams, 2.0)
    np.testing.assert_allclose(grads, want, rtol=1e-9)
    np.testing.assert_allclose(mapped, want, rtol=1e-9)


def test_identity_is_right_where_it_is_the_inverse_and_recursive_elsewhere():
    scale = 0.5

    def inner(w, lam, batch):  # H = I / scale, and B depends on lam
        return jnp.sum(w**2) / (2 * scale) - jnp.sum(w * jnp.sin(lam * batch))

    c = jnp.arange(1.0, 5.0)
    solved = bilevel.with_response(
        lambda w, lam, c: scale * jnp.sin(lam * c), inner, Implicit(Identity(scale))
    )
    f = lambda lam: jnp.sum(solved(START, lam, c) ** 3)  # noqa: E731
    want = lambda lam: jnp.sum((scale * jnp.sin(lam * c)) ** 3)  # noqa: E731
    got = jax.jit(lambda lam: (jax.grad(f)(lam), jax.hessian(f)(lam)))(0.3)
    right = jax.jit(lambda lam: (jax.grad(want)(lam), jax.hessian(want)(lam)))(0.3)
    np.testing.assert_allclose(got, right, rtol=1e-12)


def test_a_first_derivative_is_one_solve_and_the_pullback_of_the_response():
    solved = bilevel.with_response(exact, ridge, Implicit(CG(10)))
    f = lambda lam: held_out(solved(START, lam, TRAIN))  # noqa: E731

    def solves(function):
        return str(jax.make_jaxpr(function)(LAM)).count("= custom_linear_solve[")

    own = solves(f)  # of `exact` itself
    assert solves(jax.grad(f)) == own + 1
    # q, and one more for each of the two that depend on lam, q and w: as by hand.
    assert solves(jax.grad(jax.grad(f))) == own + 3
    w = exact(START, LAM, TRAIN)
    sol = jax.jit(
        lambda lam: (
            bilevel.hypergrad_solve(
                lambda w, lam, b: held_out(w),
                ridge,
                Implicit(CG(10)),
                w,
                lam,
                inner_batch=TRAIN,
                outer_batch=VALID,
            ).indirect
        )
    )(LAM)
    np.testing.assert_allclose(jax.jit(jax.grad(f))(LAM), sol, rtol=1e-12)


def test_structure_of_the_operator_reaches_the_solver():
    seen = []

    class Spy:
        def solve(self, mv, rhs, x0=None, *, key=None, certify=True):
            seen.append((mv.factors is not None, x0, key is not None))
            return Dense().solve(mv, rhs)

    solved = bilevel.with_response(exact, ridge, Implicit(Spy(), SQUARES))
    jax.eval_shape(
        lambda lam: jax.grad(lambda lam: held_out(solved(START, lam, TRAIN, key=K[0])))(lam), LAM
    )
    assert seen and set(seen) == {(True, None, True)}


# --- what is refused


def stacked(n):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), TRAIN)


FIRST_ONLY = {
    "Unroll": (lambda: Unroll(optax.sgd(0.1), 3), 3),
    "FiniteDifference": (lambda: bilevel.FiniteDifference(optax.sgd(0.1)), None),
    "Implicit with `fresh_batches=True`": (
        lambda: Implicit(Neumann(4, 0.5), fresh_batches=True),
        5,
    ),
}


@pytest.mark.parametrize("name", FIRST_ONLY)
def test_other_responses_give_the_first_derivative_only(name):
    make, count = FIRST_ONLY[name]
    batch = TRAIN if count is None else stacked(count)
    solved = bilevel.with_response(lambda w, lam, b: exact(w, lam, TRAIN), ridge, make())

    def f(lam, theta=1.0):
        return theta * held_out(solved(START, lam, batch, key=K[4]))

    assert jax.eval_shape(jax.grad(f), LAM).shape == ()
    for second in (jax.grad(jax.grad(f)), jax.hessian(f), jax.jit(jax.grad(jax.jit(jax.grad(f))))):
        with pytest.raises(TypeError, match=f"first derivative only for {name}"):
            jax.eval_shape(second, LAM)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.eval_shape(jax.jacfwd(f), LAM)
    # The derivative of a first derivative in something else is no second derivative of w.
    assert jax.eval_shape(jax.jacfwd(lambda theta: jax.grad(f)(LAM, theta)), 2.0).shape == ()


def test_responses_that_cannot_be_attached_are_refused():
    evolution = bilevel.Evolution(optax.sgd(0.1), 3, particles=2, sigma=0.1, persistent=False)
    with pytest.raises(TypeError, match="Evolution evaluates the outer loss itself.*hypergrad"):
        bilevel.with_response(lambda w, lam, b: w, ridge, evolution)(
            START, LAM, stacked(3), key=K[4]
        )
    untrained = bilevel.BestResponse(bilevel.StructuredResponse(), steps=0)
    with pytest.raises(ValueError, match="`steps=0`.*starts cold.*Set `steps`"):
        bilevel.with_response(exact, ridge, untrained)


def test_unroll_in_something_else_is_linear():
    solved = bilevel.with_response(
        lambda w, lam, b: exact(w, lam, TRAIN), ridge, Unroll(optax.sgd(0.1), 3)
    )

    def first(theta):
        return jax.grad(lambda lam: theta**2 * held_out(solved(START, lam, stacked(3))))(LAM)

    got = jax.jit(lambda t: (first(t), jax.jvp(first, (t,), (1.0,))[1], jax.grad(first)(t)))(3.0)
    np.testing.assert_allclose([got[1], got[2]], [2 * got[0] / 3] * 2, rtol=1e-12)


def test_mixed_derivatives_in_what_only_the_outer_loss_reads():
    """Neither A nor B moves then, and a part of the cotangent is zero for good."""
    w0, c = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, jnp.array([1.0, 2.0])

    def inner(w, lam, batch):  # H is constant and block diagonal, and dB is zero in `b`
        return 0.5 * jnp.sum((w["a"] - jnp.sin(lam) * c) ** 2 + 2 * (w["b"] - lam * c) ** 2)

    def solve(w, lam, batch):
        return {"a": jnp.sin(lam) * c, "b": lam * c}

    solved = bilevel.with_response(solve, inner, Implicit(CG(5)))

    def all_of(solve, lam, theta):
        def f(lam, theta):
            w = solve(w0, lam, c)
            return jnp.sum(theta * w["a"] ** 2) + jnp.sum(w["b"])

        first = jax.grad(f)
        return (
            jax.grad(first, 1)(lam, theta),
            jax.jacfwd(first, 1)(lam, theta),
            jax.grad(first)(lam, theta),
            jax.jacfwd(first)(lam, theta),
            jax.grad(jax.grad(first))(lam, theta),
            jax.grad(lambda lam: jax.jvp(lambda lam: f(lam, theta), (lam,), (1.0,))[1])(lam),
            jax.jacfwd(jax.grad(first, 1))(lam, theta),
        )

    both = jax.jit(lambda *x: (all_of(solved, *x), all_of(solve, *x)))
    got, want = both(0.3, 2.0)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.grad])
def test_derivatives_in_anything_else_are_refused_in_both_modes(mode):
    solved = bilevel.with_response(exact, ridge, Implicit(Dense()))

    def damped(rho):
        s = bilevel.with_response(exact, ridge, Implicit(Dense(), Hessian(rho)))
        return held_out(s(START, LAM, TRAIN))

    with pytest.raises(ValueError, match="a number inside `response`"):
        jax.eval_shape(mode(damped), 0.1)

    def closes(s):
        solved = bilevel.with_response(exact, lambda w, lam, b: s * ridge(w, lam, b), Implicit())
        return held_out(solved(START, LAM, TRAIN))

    with pytest.raises(ValueError, match="closes over"):
        jax.eval_shape(mode(closes), 1.0)

    def unread(rate):
        s = bilevel.with_response(
            lambda w, lam, b: exact(w, lam[0], b), lambda w, lam, b: ridge(w, lam[0], b), Implicit()
        )
        return held_out(s(START, (LAM, rate), TRAIN))

    with pytest.raises(ValueError, match=r"No derivative reaches hparams\[1\].*Unroll"):
        jax.eval_shape(mode(unread), 1.0)
    start = mode(lambda w: jnp.sum(solved(w, LAM, TRAIN)))(START)
    assert not np.any(start)


# --- status


def far(w, lam, batch):
    return exact(w, lam, batch) + 1.0


def quiet(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


def test_an_eager_call_far_from_a_minimum_warns():
    solved = bilevel.with_response(far, ridge, Implicit())
    f = lambda lam: held_out(solved(START, lam, TRAIN))  # noqa: E731
    for call in (f, jax.grad(f)):
        with pytest.warns(RuntimeWarning, match="^not_stationary.*relative_stationarity=0."):
            call(LAM)
    quiet(jax.jit(f), LAM)  # no value is known, and nobody is asked
    quiet(lambda: bilevel.with_response(exact, ridge, Implicit())(START, LAM, TRAIN))
    unrolled = bilevel.with_response(
        lambda w, lam, b: far(w, lam, TRAIN), ridge, Unroll(optax.sgd(0.1), 2)
    )
    quiet(unrolled, START, LAM, stacked(2))  # assumes no minimum
    for response, batch in ((Implicit(), TRAIN), (Unroll(optax.sgd(0.1), 2), stacked(2))):
        poisoned = bilevel.with_response(lambda w, lam, b: w * jnp.nan, ridge, response)
        with pytest.warns(RuntimeWarning, match="^nonfinite_input.*NaN"):
            assert np.all(np.isnan(poisoned(START, LAM, batch)))


def test_status_is_an_array_without_derivative_under_every_transformation():
    def shifted(w, lam, batch):  # lam[1] is how far from the minimum
        return exact(w, lam[0], batch) + lam[1]

    solved = bilevel.with_response(
        shifted,
        lambda w, lam, b: ridge(w, lam[0], b) + 0 * lam[1] * w[0],
        Implicit(),
        has_status=True,
    )

    def f(lam0, lam1):
        w, info = solved(START, (lam0, lam1), TRAIN)
        return held_out(w) + info.stats["stationarity"], info

    shifts = jnp.array([0.0, 1e-4, 1.0, jnp.nan])
    grad = jax.grad(f, has_aux=True)

    @jax.jit
    def all_of(shifts):
        mapped = jax.vmap(grad, (None, 0))(LAM, shifts)[1]
        scanned = jax.lax.scan(lambda c, s: (c, grad(LAM, s)), 0, shifts)[1]
        return mapped, scanned

    mapped, (grads, scanned) = all_of(shifts)
    want = [Status.ok, Status.ok, Status.not_stationary, Status.nonfinite_input]
    assert mapped.result.dtype == jnp.int32
    np.testing.assert_array_equal(mapped.result, want)
    np.testing.assert_array_equal(scanned.result, want)
    # The status adds nothing to the derivative.
    bare = bilevel.with_response(exact, ridge, Implicit())
    right = jax.grad(lambda lam: held_out(bare(START, lam, TRAIN)))(LAM)
    np.testing.assert_allclose(grads[0], right, rtol=1e-9)
    with pytest.raises(bilevel.HypergradientError, match="not_stationary"):
        bilevel.raise_for_status(jax.tree.map(lambda x: x[2], mapped))

    # The number itself: the gradient is H times the shift, c its largest eigenvalue.
    w = exact(START, LAM, TRAIN) + 1.0
    h = jax.hessian(ridge)(w, LAM, TRAIN)
    length = np.linalg.norm(h @ np.ones(4))
    np.testing.assert_allclose(mapped.stats["stationarity"][2], length, rtol=1e-9)
    c = np.linalg.eigvalsh(h)[-1]
    # Three power iterations find at least nine tenths of an eigenvalue among four.
    ratio = mapped.stats["relative_stationarity"][2] / (length / (c * np.linalg.norm(w)))
    assert 1 - 1e-9 <= ratio <= 1 / 0.9


def test_status_of_the_kinds_of_response():
    def info(response, batch, solve=far, w=START):
        solved = bilevel.with_response(
            lambda w, lam, b: solve(w, lam, TRAIN), ridge, response, has_status=True
        )
        return solved(w, LAM, batch)[1]

    unrolled = info(Unroll(optax.sgd(0.1), 2), stacked(2))
    assert (int(unrolled.result), unrolled.stats) == (Status.ok, {})
    nan = info(Unroll(optax.sgd(0.1), 2), stacked(2), lambda w, lam, b: w * jnp.nan)
    assert int(nan.result) == Status.nonfinite_input
    fresh = Implicit(Neumann(2, 0.1), fresh_batches=True)
    assert int(info(fresh, stacked(3)).result) == Status.not_stationary
    # Slices whose gradients cancel: only the mean loss is at its minimum.
    x, y = stacked(3)
    noisy = x, y + 50 * jnp.array([-1.0, 0.0, 1.0])[:, None]
    assert int(info(fresh, noisy, exact).result) == Status.ok
    traced = jax.jit(lambda rho: info(Implicit(Dense(), Hessian(rho)), TRAIN, exact).result)
    assert [int(traced(r)) for r in (0.1, -1.0)] == [Status.ok, Status.invalid_setting]
    # At zero with no gradient there is nothing to judge.
    still = bilevel.with_response(
        lambda w, lam, b: w,
        lambda w, lam, b: jnp.exp(lam) * jnp.sum(w**2),
        Implicit(),
        has_status=True,
    )
    assert int(still(START, LAM, TRAIN)[1].result) == Status.ok


def test_auxiliary_output_passes_without_derivative():
    def solve(w, lam, batch):
        w = exact(w, lam, batch)
        return w, {"steps": 3, "norm": jnp.sum(w**2), "name": "exact"}

    solved = bilevel.with_response(solve, ridge, Implicit(), has_aux=True)
    w, aux = solved(START, LAM, TRAIN)
    assert (aux["steps"], aux["name"]) == (3, "exact")
    np.testing.assert_allclose(aux["norm"], jnp.sum(w**2))
    grad = jax.grad(lambda lam: solved(START, lam, TRAIN)[1]["norm"])
    assert grad(LAM) == 0

    def closing(lam):  # around the arguments, through what `solve` closes over
        return bilevel.with_response(
            lambda w, _, b: (exact(w, LAM, b), {"lam": lam}), ridge, Implicit(), has_aux=True
        )(START, LAM, TRAIN)[1]["lam"]

    assert jax.grad(closing)(LAM) == 0
    both = bilevel.with_response(solve, ridge, Implicit(), has_aux=True, has_status=True)
    w, aux, info = both(START, LAM, TRAIN)
    assert (aux["steps"], int(info.result)) == (3, Status.ok)


# --- messages


def call(solve, params=START, hparams=LAM, **options):
    return lambda: bilevel.with_response(solve, ridge, Implicit(), **options)(
        params, hparams, TRAIN
    )


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "`params` is None: pass the start of the search", call(exact, params=None)),
        (ValueError, r"`params` has no leaves \(it is \{\}\): pass", call(exact, params={})),
        (ValueError, "`hparams` is None: pass the real numbers", call(exact, hparams=None)),
        (TypeError, "hparams has dtype int.*write `1.0` for `1`", call(exact, hparams=1)),
        (TypeError, "hparams is a str, expected a real", call(exact, hparams="decay")),
        (TypeError, "params has dtype int", call(exact, params=jnp.arange(4))),
        (TypeError, "`solve` returned None: end it with", call(lambda *_: None)),
        (
            ValueError,
            "result of `solve` has another tree.*structure and shapes as the `params`",
            call(lambda w, lam, b: {"w": w}),
        ),
        (ValueError, "a list is a tree of its own", call(lambda w, lam, b: w.tolist())),
        (ValueError, "pass `has_aux=True`", call(lambda w, lam, b: (w, 3))),
        (ValueError, r"result of `solve` has shape \(3,\)", call(lambda w, lam, b: w[:3])),
        (
            TypeError,
            "result of `solve` has dtype int.*Return the solution as floating",
            call(lambda w, lam, b: w.astype(int)),
        ),
        (TypeError, "pair \\(params, aux\\)", call(exact, has_aux=True)),
        (
            TypeError,
            r"`solve` must be callable, as `solve\(params, hparams, inner_batch\)",
            call(START),
        ),
        (
            TypeError,
            "response.operator.damping` must be a real number",
            lambda: bilevel.with_response(exact, ridge, Implicit(Dense(), Hessian(object()))),
        ),
    ],
)
def test_messages(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_numpy_float64_from_a_library_is_accepted_in_float32():
    with jax.enable_x64(False):
        start, lam, batch = jax.tree.map(lambda x: np.asarray(x, np.float32), (START, LAM, TRAIN))

        def wide(w, lam, b):  # as SciPy answers
            return np.asarray(exact(w, lam, b), np.float64)

        solved = bilevel.with_response(wide, ridge, Implicit(CG(20)))
        w = solved(start, lam, batch)
        assert w.dtype == jnp.float32
        got = jax.grad(lambda lam: jnp.sum(solved(start, lam, batch) ** 2))(lam)
    want = jax.jit(jax.grad(lambda lam: jnp.sum(exact(START, lam, TRAIN) ** 2)))(LAM)
    np.testing.assert_allclose(got, want, rtol=1e-4)  # float32 and a condition of ten


def test_lineax_solvers_survive_being_rebuilt_around_placeholders():
    solver = lineax_solver("CG")
    hollow = jax.tree.map(lambda _: object(), solver)
    assert jax.tree.structure(hollow) == jax.tree.structure(solver)
    assert len(jax.tree.leaves(hollow)) == len(jax.tree.leaves(solver)) == 2
    assert jax.tree.map(lambda _, x: x, hollow, solver) == solver


def test_it_maps_over_numpy_arrays():
    """What `vmap` is given inside `jit` may be NumPy's: its tracers then hold it as it is."""
    train = tuple(map(np.asarray, TRAIN))
    n = train[0].shape[1]

    def inner(w, lam, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def exact(w, lam, batch):
        x, y = batch
        return jnp.linalg.solve(x.T @ x / len(y) + jnp.diag(jnp.exp(lam)), x.T @ y / len(y))

    def total(solve):
        return lambda lam: jnp.sum(solve(np.zeros(n), lam, train) ** 2) + jnp.sum(lam**2)

    solve = bilevel.with_response(exact, inner, bilevel.Implicit(bilevel.CG()))
    lams = np.stack([np.zeros(n), np.ones(n)])
    found, wanted = (
        jax.jit(lambda f=f: jax.vmap(jax.grad(total(f)))(lams))() for f in (solve, exact)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-8)


def bowl(curvatures):
    """A quadratic with these curvatures, stationary at lam: the target of the outer loss is 0."""
    return lambda w, lam, batch: 0.5 * jnp.sum(jnp.asarray(curvatures) * (w - lam) ** 2)


SOLVERS_THAT_SEE = [CG(), Dense(), Neumann(400, 0.5)]


def off_a_minimum(lam, curvatures, solver, **options):
    solve = bilevel.with_response(
        lambda w, lam, batch: jnp.full(2, lam), bowl(curvatures), Implicit(solver), **options
    )
    return jnp.sum(solve(jnp.zeros(2), lam, 0.0) ** 2)


@pytest.mark.parametrize("solver", SOLVERS_THAT_SEE, ids=lambda s: type(s).__name__)
def test_a_derivative_at_no_minimum_is_nan(solver):
    """The backward solve alone sees it, and no status can be returned from there."""

    @jax.jit
    def slopes(curvatures):
        def value(lam, **options):
            return off_a_minimum(lam, curvatures, solver, **options)

        kept = functools.partial(value, on_failure="keep")
        return jax.grad(value)(0.3), jax.grad(kept)(0.3)

    for curvatures in ((1.0, -0.5), (-1.0, -1.0), (1.0, -1e-2)):
        marked, kept = slopes(jnp.array(curvatures))
        assert np.isnan(marked) and np.isfinite(kept), curvatures
    good, kept = slopes(jnp.array([1.0, 0.5]))
    np.testing.assert_allclose((good, kept), 4 * 0.3, rtol=1e-10)


def test_a_failed_solve_is_nan_in_both_modes_and_lane_by_lane():
    value = functools.partial(off_a_minimum, solver=CG())
    assert np.isnan(jax.jvp(lambda lam: value(lam, jnp.array([1.0, -0.5])), (0.3,), (1.0,))[1])
    lanes = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(0.3, jnp.array([[1.0, -0.5], [1.0, 0.5]]))
    assert np.isnan(lanes[0]) and np.isfinite(lanes[1])


@pytest.mark.parametrize("solver", SOLVERS_THAT_SEE, ids=lambda s: type(s).__name__)
def test_flat_directions_are_nan_only_where_they_matter(solver):
    flat = bowl((1.0, 0.0))
    solve = bilevel.with_response(
        lambda w, lam, batch: jnp.array([lam, 0.7]), flat, Implicit(solver)
    )
    seen = jax.grad(lambda lam: solve(jnp.zeros(2), lam, 0.0)[0] ** 2)(0.3)
    np.testing.assert_allclose(seen, 0.6, rtol=1e-10)
    both = jax.grad(lambda lam: jnp.sum(solve(jnp.zeros(2), lam, 0.0) ** 2))(0.3)
    # A series cannot tell a direction without curvature from one that it has not reached.
    assert np.isnan(both) or isinstance(solver, Neumann)


def test_failures_are_nan_or_kept():
    with pytest.raises(ValueError, match="`on_failure` must be 'nan' or 'keep', got 'raise'"):
        bilevel.with_response(exact, ridge, Implicit(), on_failure="raise")


@pytest.mark.parametrize("solver", SOLVERS_THAT_SEE, ids=lambda s: type(s).__name__)
def test_a_leaf_that_does_not_respond_is_no_flat_direction(solver):
    """The system is that of the other leaves, as in `hypergrad`; the solve does not fail."""

    def inner(w, lam, batch):
        fixed = jax.lax.stop_gradient(w["f"])
        return 0.5 * jnp.sum((w["a"] - fixed * lam) ** 2) + 0.5 * jnp.sum(w["a"] ** 2)

    def solve(w, lam, batch):
        return {"a": w["f"] * lam / 2, "f": w["f"]}

    start = {"a": jnp.zeros(2), "f": jnp.array([1.0, 2.0])}
    solution = bilevel.with_response(solve, inner, Implicit(solver))

    def value(lam):
        w = solution(start, lam, 0.0)
        return jnp.sum(w["a"] ** 2) + jnp.sum(w["f"] ** 3)

    np.testing.assert_allclose(jax.grad(value)(0.7), 0.5 * 5 * 0.7, rtol=1e-10)
    np.testing.assert_allclose(jax.jvp(value, (0.7,), (1.0,))[1], 0.5 * 5 * 0.7, rtol=1e-10)
    np.testing.assert_allclose(jax.grad(jax.grad(value))(0.7), 2.5, rtol=1e-8)
