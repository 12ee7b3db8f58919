"""Inner problems that are no smooth loss: fixed points and roots, against differences of their
solutions and closed forms."""

import functools

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, Dense, FixedPoint, Implicit, Jacobian, Lineax, Neumann, Root
from bilevel.ground.status import Status

K = jax.random.split(jax.random.key(1), 6)
N = 8
TRUE = jnp.array([1.0, -1.0, 0.5, 0.0, 0.0, 0.8, -0.6, 0.0])


def data(key, noise, count):
    x = jax.random.normal(key, (count, N))
    return x, x @ TRUE + 0.5 * jax.random.normal(noise, (count,))


TRAIN, VALID = data(K[0], K[1], 60), data(K[2], K[3], 40)
STEP = 1 / jnp.linalg.eigvalsh(TRAIN[0].T @ TRAIN[0] / 60)[-1]


def error(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def valid(w, lam, batch):
    return error(w, batch)


def soft(v, threshold):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


def descended(w, batch, weights=None):
    residual = batch[0] @ w - batch[1]
    residual = residual if weights is None else weights * residual
    return w - STEP * batch[0].T @ residual / len(batch[1])


def lasso(w, lam, batch):
    return soft(descended(w, batch), STEP * jnp.exp(lam))


def elastic_net(w, lam, batch):
    l1, l2 = STEP * jnp.exp(lam)
    return soft(descended(w, batch), l1) / (1 + l2)


def group_lasso(w, lam, batch):
    groups = descended(w, batch).reshape(4, 2)
    norms = jnp.linalg.norm(groups, axis=1, keepdims=True)
    shrunk = groups * jnp.maximum(1 - STEP * jnp.exp(lam)[:, None] / norms, 0)
    return shrunk.reshape(N)


def nonnegative(w, lam, batch):
    """A weight for each example."""
    return jnp.maximum(descended(w, batch, jax.nn.sigmoid(lam)), 0)


def simplex(w, lam, batch):
    return optax.projections.projection_simplex(descended(w, batch) - STEP * lam * w)


def sparse_logistic(w, lam, batch):
    x, y = batch
    slope = x.T @ (jax.nn.sigmoid(x @ w) - (y > 0)) / len(y)
    return soft(w - 4 * STEP * slope, 4 * STEP * jnp.exp(lam))


def hinge_dual(w, lam, batch):
    """The dual of a soft-margin machine on eight examples: a box of size exp(lam)."""
    x, sign = batch[0][:N], jnp.sign(batch[1][:N])
    gram = sign[:, None] * (x @ x.T) * sign[None]
    return jnp.clip(w - 0.05 * (gram @ w - 1), 0, jnp.exp(lam))


STEPS = {
    "lasso, one strength a weight": (lasso, jnp.linspace(-1.8, -0.9, N)),
    "elastic net": (elastic_net, jnp.array([-1.5, -2.0])),
    "group lasso": (group_lasso, jnp.array([-1.5, 0.4, -1.0, -0.5])),
    "non-negative, one weight an example": (nonnegative, jnp.linspace(-1, 1, 60)),
    "simplex": (simplex, jnp.float64(0.3)),
    "sparse logistic": (sparse_logistic, jnp.float64(-3.0)),
    "dual of the hinge loss": (hinge_dual, jnp.float64(-1.0)),
}


@functools.cache
def solved(name):
    """Solution, and the gradient of the outer loss by central differences of the re-solved one."""
    step, lam = STEPS[name]

    @jax.jit
    def solve(lam):
        return jax.lax.fori_loop(0, 4000, lambda i, w: step(w, lam, TRAIN), jnp.zeros(N))

    flat, unravel = jax.flatten_util.ravel_pytree(lam)

    @jax.jit
    def value(flat):
        return valid(solve(unravel(flat)), None, VALID)

    h = 1e-6
    basis = h * jnp.eye(flat.size)
    up, down = (jax.lax.map(value, flat[None] + sign * basis) for sign in (1, -1))
    return solve(lam), unravel((up - down) / (2 * h))


SOLVERS = {
    "dense": Dense(),
    "gmres": Lineax(lineax.GMRES(rtol=1e-12, atol=1e-12, restart=N)),
    "series": Neumann(4000),
}


@pytest.mark.parametrize("name", STEPS)
def test_fixed_points_of_proximal_and_projected_steps(name):
    step, lam = STEPS[name]
    w, truth = solved(name)
    assert name == "sparse logistic" or bool(jnp.any(w == 0)) or "hinge" in name
    # Every solver on one system that is symmetric on its support and one that is not.
    solvers = SOLVERS if name in ("lasso, one strength a weight", "simplex") else {"": Dense()}
    for solver in solvers.values():
        sol = jax.jit(
            lambda w, lam, solver=solver: bilevel.hypergrad_solve(
                valid, FixedPoint(step), Implicit(solver), w, lam,
                inner_batch=TRAIN, outer_batch=VALID,
            )
        )(w, lam)  # fmt: skip
        # Differences of step 1e-6 of a solution converged to rounding: h^2 and eps/h.
        np.testing.assert_allclose(sol.grads, truth, rtol=1e-6, atol=1e-8)
        assert int(sol.result) == Status.ok and float(sol.stats["stationarity"]) < 1e-12


def test_weights_at_zero_stay_there():
    w, truth = solved("lasso, one strength a weight")
    solve = bilevel.hypergrad(valid, FixedPoint(lasso), Implicit(Dense()))
    lam = STEPS["lasso, one strength a weight"][1]
    sol = jax.jit(lambda w: solve(w, lam, inner_batch=TRAIN, outer_batch=VALID))(w)
    assert int(jnp.sum(w == 0)) == 3 and bool(jnp.all((sol == 0) == (w == 0)))


def kkt(w, lam, batch):
    """min 0.5 x'Qx - b'x, A x = c exp(lam): eight weights and two multipliers."""
    x, y = batch
    a = jnp.stack([jnp.ones(N), jnp.arange(1.0, N + 1)])
    hessian = x.T @ x / len(y) + jnp.diag(jnp.exp(lam["ridge"]))
    return {
        "x": hessian @ w["x"] - x.T @ y / len(y) + a.T @ w["nu"],
        "nu": a @ w["x"] - jnp.exp(lam["sum"]) * jnp.ones(2),
    }


def kkt_solution(lam):
    zero = {"x": jnp.zeros(N), "nu": jnp.zeros(2)}
    flat, unravel = jax.flatten_util.ravel_pytree(zero)
    residual = lambda v: jax.flatten_util.ravel_pytree(kkt(unravel(v), lam, TRAIN))[0]  # noqa: E731
    return unravel(jnp.linalg.solve(jax.jacobian(residual)(flat), -residual(flat)))


KKT = {"ridge": jnp.linspace(-2.0, 0.0, N), "sum": jnp.float64(0.1)}


def seen(w, lam, batch):
    return error(w["x"], batch) + 0.1 * jnp.sum(w["nu"] ** 2) + 0.01 * lam["sum"] ** 2


def test_the_root_of_kkt_conditions_and_its_multipliers():
    truth = jax.grad(lambda lam: seen(kkt_solution(lam), lam, VALID))(KKT)
    for solver in (Dense(), Lineax(lineax.GMRES(1e-12, 1e-12, restart=N + 2))):
        sol = jax.jit(
            lambda w, solver=solver: bilevel.hypergrad_solve(
                seen, Root(kkt), Implicit(solver), w, KKT, inner_batch=TRAIN, outer_batch=VALID
            )
        )(kkt_solution(KKT))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), sol.grads, truth)
        assert int(sol.result) == Status.ok


MIX = 0.3 * jax.random.normal(K[4], (3, 3))


def equilibrium(w, lam, batch):
    """Not symmetric, not linear."""
    return jnp.tanh(MIX @ w + lam * batch)


def settled(w, lam, batch):
    return jax.lax.fori_loop(0, 200, lambda i, w: equilibrium(w, lam, batch), w)


def through_all_steps(lam):
    w = jnp.zeros(3)
    for _ in range(60):
        w = equilibrium(w, lam, INPUT)
    return jnp.sum(w**3) + w[0]


INPUT = jnp.array([0.4, -1.0, 0.7])


@pytest.mark.parametrize("name", SOLVERS)
def test_with_response_differentiates_an_equilibrium_to_second_order_in_both_modes(name):
    solve = bilevel.with_response(settled, FixedPoint(equilibrium), Implicit(SOLVERS[name]))

    def value(lam):
        w = solve(jnp.zeros(3), lam, INPUT)
        return jnp.sum(w**3) + w[0]

    lam = jnp.array([0.5, -0.2, 1.1])
    with_mask = jax.jit(jax.grad(value))(lam)
    np.testing.assert_allclose(with_mask, jax.grad(through_all_steps)(lam), rtol=1e-8)
    v = jnp.array([1.0, 2.0, -1.0])
    np.testing.assert_allclose(jax.jvp(value, (lam,), (v,))[1], with_mask @ v, rtol=1e-8)
    if name != "series":  # the same rule; its second derivative only costs more to compile
        hessian = jax.jit(jax.hessian(value))(lam)
        np.testing.assert_allclose(hessian, jax.hessian(through_all_steps)(lam), rtol=1e-6)


def test_check_hypergrad_solves_conditions_anew():
    name = "lasso, one strength a weight"
    w, lam = solved(name)[0], STEPS[name][1]
    for inner, start, at in ((FixedPoint(lasso), w, lam), (Root(kkt), kkt_solution(KKT), KKT)):
        outer = valid if inner.__class__ is FixedPoint else seen
        call = dict(inner_batch=TRAIN, outer_batch=VALID)
        good = bilevel.check_hypergrad(outer, inner, Implicit(Dense()), start, at, **call)
        assert good.passed, good.message
        bad = bilevel.check_hypergrad(
            outer, inner, Implicit(Dense(), Jacobian(damping=0.3)), start, at, **call
        )
        assert not bad.passed and bad.converged


def test_far_from_the_fixed_point_it_is_told():
    sol = bilevel.hypergrad_solve(
        valid, FixedPoint(lasso), Implicit(Dense()), 3 * TRUE, jnp.full(N, -1.5),
        inner_batch=TRAIN, outer_batch=VALID,
    )  # fmt: skip
    assert int(sol.result) == Status.not_stationary


def test_a_map_that_does_not_contract_diverges_in_words():
    def explode(w, lam, batch):
        return w + 1.5 * (w - lam)

    lam = jnp.array([1.0, 2.0])
    sol = bilevel.hypergrad_solve(
        lambda w, lam, b: jnp.sum(w**2), FixedPoint(explode), Implicit(Neumann(30)), lam, lam,
        inner_batch=0.0, outer_batch=0.0,
    )  # fmt: skip
    assert int(sol.result) == Status.diverged


def call(inner, response, **changes):
    arguments = dict(inner_batch=TRAIN, outer_batch=VALID) | changes
    return bilevel.hypergrad(valid, inner, response)(
        jnp.zeros(N), jnp.zeros(N), key=jax.random.key(0), **arguments
    )


@pytest.mark.parametrize(
    "solver",
    [CG(), bilevel.Nystrom(2), bilevel.Stochastic(optax.sgd(0.1), 3), Lineax(lineax.CG(1e-6, 0.0))],
    ids=lambda s: type(s).__name__,
)
def test_methods_for_symmetric_matrices_refuse_conditions(solver):
    with pytest.raises(ValueError, match="needs a symmetric matrix, but that of a `FixedPoint`"):
        call(FixedPoint(lasso), Implicit(solver))


def test_what_needs_a_loss_refuses_conditions():
    stack = jax.tree.map(lambda x: x[None], TRAIN)
    responses = (
        (bilevel.Unroll(optax.sgd(0.1), 1), stack),
        (bilevel.FiniteDifference(optax.sgd(0.1)), TRAIN),
        (bilevel.Evolution(optax.sgd(0.1), 1, 1, 0.1), stack),
        (bilevel.BestResponse(tx=optax.sgd(0.1), steps=1), TRAIN),
    )
    for response, batch in responses:
        with pytest.raises(TypeError, match="`inner` is a FixedPoint, but .* needs a loss"):
            call(FixedPoint(lasso), response, inner_batch=batch)
    with pytest.raises(TypeError, match="`inner` must be a function .* A condition is diff"):
        bilevel.alternate(
            valid, FixedPoint(lasso), Implicit(), optax.sgd(0.1), optax.sgd(0.1), inner_steps=1
        )
    with pytest.raises(ValueError, match="`has_state=True` goes with losses"):
        bilevel.hypergrad(valid, Root(lasso), has_state=True)(
            jnp.zeros(N), jnp.zeros(N), inner_batch=TRAIN, outer_batch=VALID, model_state=0.0
        )
    split = bilevel.GaussNewton(lambda w, lam, b: b[0] @ w, lambda z, lam, b: jnp.mean(z**2))
    with pytest.raises(TypeError, match="`operator` is GaussNewton, which stands for the curv"):
        call(FixedPoint(lasso), Implicit(Dense(), split))


def test_conditions_of_another_form_are_refused():
    with pytest.raises(TypeError, match=r"`step` must be a function step\(params, hparams, batch"):
        FixedPoint(3)
    with pytest.raises(TypeError, match=r"`equation` cannot be called as equation\(params"):
        Root(lambda w: w)
    for bad, match in (
        (lambda w, lam, b: None, "`step` returned None"),
        (lambda w, lam, b: w[:2], r"result of `step` has shape \(2,\), expected \(8,\)"),
        (lambda w, lam, b: {"w": w}, "result of `step` has another tree structure"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            call(FixedPoint(bad), Implicit(Dense()))
    with pytest.raises(ValueError, match=r"No derivative reaches hparams: .*"):
        call(FixedPoint(lambda w, lam, b: 0.5 * w), Implicit(Dense()))
    with pytest.raises(TypeError, match="a FixedPoint takes one: pass them as one tuple"):
        bilevel.hypergrad(lambda w, a, b, batch: 0.0, FixedPoint(lasso), Implicit(Dense()))(
            jnp.zeros(N), 0.0, 0.0, inner_batch=TRAIN, outer_batch=VALID
        )


@pytest.mark.parametrize("terms", [0, 3])
def test_the_series_of_a_map_has_one_term_more_than_products(terms):
    def affine(w, lam, batch):
        return MIX @ w + lam

    w = jnp.linalg.solve(jnp.eye(3) - MIX, INPUT)
    found = bilevel.hypergrad_solve(
        lambda w, lam, b: jnp.sum(w**2), FixedPoint(affine), Implicit(Neumann(terms)), w, INPUT,
        inner_batch=0.0, outer_batch=0.0,
    )  # fmt: skip
    # The mixed product is the identity, so that the hypergradient is the adjoint itself.
    powers = [np.linalg.matrix_power(np.asarray(MIX.T), j) for j in range(terms + 1)]
    np.testing.assert_allclose(found.grads, sum(powers) @ (2 * np.asarray(w)), rtol=1e-12)
    assert int(found.stats["num_matvecs"]) == terms
