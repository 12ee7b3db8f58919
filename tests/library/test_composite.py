"""A smooth loss and a proximal operator: the symmetric system on the support."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from test_conditions import STEP, STEPS, TRAIN, VALID, N, error, solved, valid

import bilevel
from bilevel import CG, Composite, Dense, Diagonal, Hessian, Implicit, Lineax, Neumann, prox
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.status import Status
from bilevel.problem.operators.base import BoundOperator
from bilevel.testing import (
    CheckFailed,
    check_estimator,
    check_response,
    condition_cases,
    flatten,
    relative_error,
    wrong_condition_estimators,
)


def least_squares(w, lam, batch):
    return error(w, batch)


def logistic(w, lam, batch):
    x, y = batch
    return jnp.mean(jax.nn.softplus(x @ w) - (y > 0) * (x @ w))


def weighted(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean(jax.nn.sigmoid(lam) * (x @ w - y) ** 2)


def pulled(w, lam, batch):
    return error(w, batch) + 0.5 * lam * jnp.sum(w**2)


def hinge(w, lam, batch):
    x, sign = batch[0][:N], jnp.sign(batch[1][:N])
    return 0.5 * jnp.sum((x.T @ (sign * w)) ** 2) - jnp.sum(w)


def l1(w, lam, s):
    return prox.l1(w, jnp.exp(lam), s)


def both(w, lam, s):
    return prox.elastic_net(w, (jnp.exp(lam[0]), jnp.exp(lam[1])), s)


def groups(w, lam, s):
    return prox.group_lasso(w.reshape(4, 2), jnp.exp(lam), s).reshape(N)


def nonnegative(w, lam, s):
    return jnp.maximum(w, 0)


def simplex(w, lam, s):
    return optax.projections.projection_simplex(w)


def box(w, lam, s):
    return jnp.clip(w, 0, jnp.exp(lam))


CONDITIONS = {
    "lasso, one strength a weight": (least_squares, l1),
    "elastic net": (least_squares, both),
    "group lasso": (least_squares, groups),
    "non-negative, one weight an example": (weighted, nonnegative),
    "simplex": (pulled, simplex),
    "sparse logistic": (logistic, l1),
    "dual of the hinge loss": (hinge, box),
}


def solve(condition, response, w, lam, outer=valid, batch=TRAIN, key=None):
    def call(w, lam):
        return bilevel.hypergrad_solve(
            outer, condition, response, w, lam, inner_batch=batch, outer_batch=VALID, key=key
        )

    return jax.jit(call)(w, lam)


@pytest.mark.parametrize("name", CONDITIONS)
def test_cg_agrees_with_differences_of_the_solved_problem(name):
    w, truth = solved(name)
    sol = solve(Composite(*CONDITIONS[name]), Implicit(CG(rtol=1e-13)), w, STEPS[name][1])
    # Differences of step 1e-6 of a solution converged to rounding: h^2 and eps/h.
    np.testing.assert_allclose(sol.grads, truth, rtol=1e-6, atol=1e-8)
    assert int(sol.result) == Status.ok and int(sol.stats["knots"]) == 0
    assert float(sol.stats["stationarity"]) < 1e-12
    # A product for each number of the support, or a few: never the whole space or its square.
    assert int(sol.stats["num_matvecs"]) <= N + 1


SPLIT = bilevel.GaussNewton(
    lambda w, lam, b: b[0] @ w, lambda z, lam, b: 0.5 * jnp.mean((z - b[1]) ** 2)
)
RESPONSES = {
    "dense": Implicit(Dense()),
    "preconditioned": Implicit(CG(rtol=1e-13, preconditioner=Diagonal())),
    "series": Implicit(Neumann(3000)),
    "gmres": Implicit(Lineax(lineax.GMRES(1e-12, 1e-12, restart=N))),
    "lineax cg": Implicit(Lineax(lineax.CG(1e-13, 1e-13))),
    "gauss-newton": Implicit(CG(rtol=1e-13), SPLIT),
}


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("name", ["lasso, one strength a weight", "group lasso"])
def test_every_legal_solver_and_operator(name, response):
    w, truth = solved(name)
    sol = solve(
        Composite(*CONDITIONS[name]), RESPONSES[response], w, STEPS[name][1], key=jax.random.key(0)
    )
    np.testing.assert_allclose(sol.grads, truth, rtol=1e-6, atol=1e-8)
    assert int(sol.result) == Status.ok


def matrices(condition, w, lam, batch=TRAIN, damping=0.0):
    """Hessian, Jacobian of the operator, and the condition's derivatives, all by `jax.jacobian`."""
    s = condition.step_size
    h = jax.hessian(condition.loss)(w, lam, batch) + damping * jnp.eye(w.size)
    ahead = w - s * jax.grad(condition.loss)(w, lam, batch)
    j = jax.jacobian(condition.prox)(ahead, lam, s)

    def residual(lam):
        moved = condition.prox(w - s * jax.grad(condition.loss)(w, lam, batch), lam, s)
        return (w - moved) / s

    cross = jax.jacobian(residual)(lam)
    return tuple(np.asarray(x) for x in (h, j, cross.reshape(w.size, -1)))


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("step", [0.2, 3.0])
@pytest.mark.parametrize("name", ["group lasso", "elastic net", "simplex"])
def test_the_system_is_that_of_the_fixed_point_for_every_step_size(name, step, damping):
    w, _ = solved(name)
    lam = STEPS[name][1]
    condition = Composite(*CONDITIONS[name], step_size=step)
    h, j, cross = matrices(condition, w, lam, damping=damping)
    jacobian = (np.eye(N) - j @ (np.eye(N) - step * h)) / step
    g = np.asarray(jax.grad(valid)(w, lam, VALID))
    q = np.linalg.solve(jacobian.T, g)
    sol = solve(condition, Implicit(CG(rtol=1e-14), Hessian(damping)), w, lam)
    assert relative_error(sol.grads, -(cross.T @ q)) < 1e-10
    # What is reported is the symmetric system: in units of curvature, on the range of J.
    k = j @ h @ j + j @ (np.eye(N) - j) / step
    values = np.linalg.eigvalsh(k)
    values = values[values > 1e-10]
    assert values[0] * 0.999 <= float(sol.stats["min_curvature"])
    assert float(sol.stats["max_curvature"]) <= values[-1] * 1.001
    assert float(sol.stats["rhs_norm"]) == pytest.approx(np.linalg.norm(j @ g), rel=1e-10)


def test_stationarity_is_that_of_minimize():
    condition = Composite(least_squares, l1, step_size=float(STEP))
    lam = STEPS["lasso, one strength a weight"][1]
    found = bilevel.minimize(condition, jnp.zeros(N), lam, TRAIN, tol=1e-3)
    apart = bilevel.minimize(least_squares, jnp.zeros(N), lam, TRAIN, tol=1e-3, prox=l1)
    np.testing.assert_array_equal(found.params, apart.params)
    sol = solve(condition, Implicit(CG(rtol=1e-10)), found.params, lam)
    w = found.params
    moved = l1(w - STEP * jax.grad(least_squares)(w, lam, TRAIN), lam, STEP)
    size = jnp.linalg.norm(w - moved) / STEP
    assert float(sol.stats["stationarity"]) == pytest.approx(float(size), rel=1e-10)
    # What finishing the solve would change, to first order.
    exact = solved("lasso, one strength a weight")[0]
    change = valid(exact, lam, VALID) - valid(w, lam, VALID)
    assert float(sol.stats["predicted_change"]) == pytest.approx(float(change), rel=0.05)


def test_trees_half_precision_and_warm_starts():
    """A kernel with a group penalty and a free bias; the warm start is that of the system."""

    def loss(w, lam, batch):
        x, y = batch
        return 0.5 * jnp.mean((x @ w["kernel"] + w["bias"] - y[:, None]) ** 2) + 0.01 * jnp.sum(
            w["kernel"] ** 2
        )

    def rows(w, lam, s):
        return {"kernel": prox.group_lasso(w["kernel"], jnp.exp(lam), s), "bias": w["bias"]}

    def outer(w, lam, batch):
        return jnp.mean((batch[0] @ w["kernel"] + w["bias"] - batch[1][:, None]) ** 2)

    condition, lam = Composite(loss, rows), jnp.linspace(-2.5, 0.0, N)
    start = {"kernel": jnp.zeros((N, 2)), "bias": jnp.zeros((1, 1))}

    @jax.jit
    def solution(lam):
        return bilevel.minimize(condition, start, lam, TRAIN, tol=1e-13, max_steps=5000).params

    w = solution(lam)
    dead = int(jnp.sum(jnp.all(w["kernel"] == 0, axis=1)))
    assert 1 <= dead < N
    value = jax.jit(lambda lam: outer(solution(lam), lam, VALID))
    e = 1e-6 * jnp.eye(N)
    truth = [(value(lam + d) - value(lam - d)) / 2e-6 for d in e]
    response = Implicit(CG(rtol=1e-12))

    def call(w, lam, state):
        return bilevel.hypergrad_solve(
            outer, condition, response, w, lam, inner_batch=TRAIN, outer_batch=VALID, state=state
        )

    state = bilevel.hypergrad_init(outer, condition, response, w, lam)
    first = jax.jit(call)(w, lam, state)
    np.testing.assert_allclose(first.grads, truth, rtol=1e-6, atol=1e-8)
    again = jax.jit(call)(w, lam, first.state)
    np.testing.assert_allclose(again.grads, first.grads, rtol=1e-9, atol=1e-12)
    assert int(again.stats["num_matvecs"]) <= 2 < int(first.stats["num_matvecs"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (w, lam, TRAIN, VALID))
    sol = bilevel.hypergrad_solve(
        outer, condition, Implicit(CG(10)), *half[:2], inner_batch=half[2], outer_batch=half[3]
    )
    assert sol.grads.dtype == jnp.bfloat16
    assert np.dot(flatten(sol.grads), truth) > 0.9 * np.linalg.norm(flatten(sol.grads)) * (
        np.linalg.norm(truth)
    )


def test_with_response_to_second_order_in_both_modes():
    name = "group lasso"  # its operator bends: the second derivative of `prox` counts
    condition, lam = Composite(*CONDITIONS[name]), STEPS[name][1]

    def solution(w, lam, batch):
        return bilevel.minimize(condition, w, lam, batch, tol=1e-13, max_steps=5000).params

    fit = bilevel.with_response(solution, condition, Implicit(CG(rtol=1e-13)))

    def value(lam):
        return valid(fit(jnp.zeros(N), lam, TRAIN), lam, VALID)

    gradient = jax.jit(jax.grad(value))
    np.testing.assert_allclose(gradient(lam), solved(name)[1], rtol=1e-6, atol=1e-8)
    v = jnp.linspace(-1, 1, 4)
    forward = jax.jit(lambda lam: jax.jvp(value, (lam,), (v,))[1])(lam)
    np.testing.assert_allclose(forward, gradient(lam) @ v, rtol=1e-9)
    hessian = jax.jit(jax.hessian(value))(lam)
    h = 1e-5
    rows = [(gradient(lam + e) - gradient(lam - e)) / (2 * h) for e in h * jnp.eye(4)]
    np.testing.assert_allclose(hessian, jnp.stack(rows), rtol=1e-6, atol=1e-8)


def test_a_damped_tangent_is_the_transpose_of_the_damped_adjoint():
    name = "elastic net"
    condition, lam = Composite(*CONDITIONS[name]), STEPS[name][1]
    w, _ = solved(name)
    fit = bilevel.with_response(lambda *_: w, condition, Implicit(CG(rtol=1e-14), Hessian(0.4)))

    def value(lam):
        return valid(fit(w, lam, TRAIN), lam, VALID)

    gradient = jax.jit(jax.grad(value))(lam)
    forward = [jax.jit(lambda v: jax.jvp(value, (lam,), (v,))[1])(v) for v in jnp.eye(2)]
    np.testing.assert_allclose(forward, gradient, rtol=1e-10)
    assert relative_error(gradient, solved(name)[1]) > 1e-2  # damping does something


@dataclasses.dataclass(frozen=True)
class Counting:
    """The Hessian, which tells of every product that is really made."""

    tick: object

    def bind(self, problem, params, hparams, batch, *, fresh):
        gradient, mv = Hessian().bind(problem, params, hparams, batch, fresh=fresh)

        def product(v):
            jax.debug.callback(self.tick, jnp.sum(v))
            return mv(v)

        return BoundOperator(gradient, LinearMap(product))


@functools.cache
def large():
    rng = np.random.default_rng(0)
    x, xv = rng.standard_normal((2, 500, 2000))
    true = np.zeros(2000)
    true[rng.choice(2000, 50, replace=False)] = rng.choice([-1, 1], 50)
    y = x @ true
    y += rng.standard_normal(500) * np.linalg.norm(y) / np.sqrt(500) / 3
    top = float(np.max(np.abs(x.T @ y)) / 500)
    batch = (jnp.asarray(x), jnp.asarray(y))
    return batch, (jnp.asarray(xv), jnp.asarray(xv @ true)), np.log(0.04 * top)


def test_a_lasso_with_two_thousand_weights_takes_the_products_of_its_support():
    batch, held_out, lam = large()
    condition, made = Composite(least_squares, l1), []
    w = jax.jit(
        lambda lam: (
            bilevel.minimize(
                condition, jnp.zeros(2000), lam, batch, tol=1e-9, max_steps=3000
            ).params
        )
    )(lam)
    response = Implicit(CG(max_steps=2000, rtol=1e-6), Counting(lambda _: made.append(1)))
    sol = jax.jit(
        lambda w: bilevel.hypergrad_solve(
            valid, condition, response, w, lam, inner_batch=batch, outer_batch=held_out
        )
    )(w)
    jax.effects_barrier()
    s = np.flatnonzero(np.asarray(w))
    x, y = (np.asarray(a) for a in batch)
    xv, yv = (np.asarray(a) for a in held_out)
    gram = x[:, s].T @ x[:, s] / 500
    # O8: w_S' = -e^lam (X_S'X_S/n)^-1 sign(w_S).
    slope = -np.exp(lam) * np.linalg.solve(gram, np.sign(np.asarray(w)[s]))
    truth = (xv.T @ (xv @ np.asarray(w) - yv) / 500)[s] @ slope
    assert float(sol.grads) == pytest.approx(truth, rel=1e-5)
    assert int(sol.result) == Status.ok and 200 < len(s) < 450
    # Three products look for the step size elsewhere; one makes q, one the residual.
    products = int(sol.stats["num_matvecs"])
    assert products <= len(made) <= products + 2
    low, *_, high = np.linalg.eigvalsh(gram)
    bound = 0.5 * np.sqrt(high / low) * np.log(2e6 * np.sqrt(high / low))
    assert products < min(bound, 110)
    assert float(sol.stats["min_curvature"]) > 0.99 * low


def test_another_support_is_no_other_program():
    condition = Composite(least_squares, l1)
    traces = []

    @jax.jit
    def gradient(lam):
        traces.append(1)
        w = bilevel.minimize(condition, jnp.zeros(N), lam, TRAIN, tol=1e-12, max_steps=3000).params
        sol = bilevel.hypergrad_solve(
            valid, condition, Implicit(CG(rtol=1e-12)), w, lam, inner_batch=TRAIN, outer_batch=VALID
        )
        return w, sol.grads, sol.result

    supports = set()
    for level in (-9.0, -1.5, -0.5, 3.0):
        w, g, result = gradient(jnp.full(N, level))
        supports.add(int(jnp.sum(w != 0)))
        assert int(result) == Status.ok and bool(jnp.all((g == 0) == (w == 0)))
    assert supports >= {0, N} and len(supports) >= 3
    assert len(traces) == 1 and gradient._cache_size() == 1


def test_curvature_is_judged_on_the_support():
    """Two equal columns are flat only where both are in; a saddle counts only where it is felt."""
    x = jnp.stack([TRAIN[0][:, 0]] * 2 + [TRAIN[0][:, 1]], axis=1)
    y = x @ jnp.array([1.0, 0.0, 0.02])

    def loss(w, lam, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def outer(w, lam, batch):
        return jnp.sum(jnp.arange(1.0, 4.0) * w)

    def status(w, strength):
        condition = Composite(loss, prox.l1)
        found = bilevel.minimize(condition, w, strength, (x, y), tol=1e-13, max_steps=5000).params
        sol = solve(condition, Implicit(CG(rtol=1e-10)), found, strength, outer, (x, y))
        return found, Status(int(sol.result)), sol.stats

    w, result, stats = status(jnp.zeros(3), jnp.float64(0.3))
    assert w[0] == w[1] > 0 and result == Status.singular and int(stats["knots"]) == 0
    w, result, stats = status(jnp.zeros(3), jnp.float64(9.0))
    assert not jnp.any(w) and result == Status.ok and int(stats["num_matvecs"]) == 0

    def saddle(w, lam, batch):
        return 0.5 * w[0] ** 2 - w[0] - 0.2 * w[1] ** 2 + 0.0 * w[2]

    point, lam = jnp.array([0.9, 0.0, 0.0]), jnp.float64(0.1)
    for held, expected in ((1, Status.ok), (2, Status.negative_curvature)):

        def pull_and_hold(w, lam, s, held=held):
            return w.at[0].add(-s * lam).at[held:].set(0.0)

        condition = Composite(saddle, pull_and_hold, 0.5)
        sol = solve(condition, Implicit(CG(rtol=1e-10)), point, lam, outer)
        assert int(sol.result) == expected
        if expected == Status.ok:
            np.testing.assert_allclose(sol.grads, -1.0, rtol=1e-10)


def test_check_hypergrad_solves_it_anew_and_rejects_a_damped_one():
    name = "lasso, one strength a weight"
    (w, _), lam = solved(name), STEPS[name][1]
    condition = Composite(*CONDITIONS[name])
    batches = dict(inner_batch=TRAIN, outer_batch=VALID)
    good = bilevel.check_hypergrad(valid, condition, Implicit(CG(rtol=1e-12)), w, lam, **batches)
    assert good.passed, good.message
    bad = bilevel.check_hypergrad(
        valid, condition, Implicit(CG(rtol=1e-12), Hessian(0.3)), w, lam, **batches
    )
    assert not bad.passed and bad.converged


def test_what_does_not_fit_is_refused():
    condition, lam = Composite(least_squares, l1), jnp.zeros(N)

    def call(inner, response, batch=TRAIN):
        return bilevel.hypergrad(valid, inner, response)(
            jnp.zeros(N), lam, inner_batch=batch, outer_batch=VALID, key=jax.random.key(0)
        )

    with pytest.raises(TypeError, match="`solver` is Nystrom, which inverts the damping"):
        call(condition, Implicit(bilevel.Nystrom(2), Hessian(0.1)))
    with pytest.raises(TypeError, match="`solver` is Woodbury, which inverts the damping"):
        call(condition, Implicit(bilevel.Woodbury(), SPLIT))
    stack = jax.tree.map(lambda x: jnp.stack([x] * 4), TRAIN)
    with pytest.raises(ValueError, match="`fresh_batches=True` does not go with a `Composite`"):
        call(condition, Implicit(Neumann(3, 0.1), fresh_batches=True), stack)
    with pytest.raises(TypeError, match="`inner` is a Composite, but .* needs a loss"):
        call(condition, bilevel.FiniteDifference(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="`prox` is given twice"):
        bilevel.minimize(condition, jnp.zeros(N), lam, TRAIN, prox=l1)
    with pytest.raises(TypeError, match=r"`prox` must be a function prox\(params, hparams, step"):
        Composite(least_squares, 0.1)
    with pytest.raises(TypeError, match=r"`prox` cannot be called as prox\(params, hparams, step"):
        Composite(least_squares, lambda w: w)
    with pytest.raises(TypeError, match=r"`loss` must be a function loss\(params, hparams, batch"):
        Composite(None, l1)
    with pytest.raises(ValueError, match="`step_size` must be"):
        Composite(least_squares, l1, -1.0)
    with pytest.raises(TypeError, match="`prox` returned None"):
        call(Composite(least_squares, lambda w, lam, s: None), Implicit())
    with pytest.raises(ValueError, match=r"result of `prox` has shape \(2,\), expected \(8,\)"):
        call(Composite(least_squares, lambda w, lam, s: w[:2]), Implicit())
    with pytest.raises(TypeError, match="`inner` must return a scalar"):
        call(Composite(lambda w, lam, b: w, l1), Implicit())
    with pytest.raises(ValueError, match="No derivative reaches hparams"):
        call(Composite(least_squares, nonnegative), Implicit())
    traced = jax.jit(lambda s: call(Composite(least_squares, l1, s), Implicit(CG(rtol=1e-10))))
    assert relative_error(traced(0.3), call(Composite(least_squares, l1, 0.3), Implicit())) < 1e-6
    assert hash(Composite(least_squares, l1, jnp.float32(0.5))) == hash(
        Composite(least_squares, l1, 0.5)
    )


def test_leaves_that_the_loss_does_not_read_do_not_respond():
    def loss(w, lam, batch):
        return error(w["used"], batch)

    def part(w, lam, s):
        return {"used": l1(w["used"], lam, s), "spare": w["spare"]}

    w, truth = solved("lasso, one strength a weight")
    sol = solve(
        Composite(loss, part),
        Implicit(CG(rtol=1e-12)),
        {"used": w, "spare": jnp.ones(2)},
        STEPS["lasso, one strength a weight"][1],
        lambda w, lam, b: error(w["used"], b) + jnp.sum(w["spare"]),
    )
    np.testing.assert_allclose(sol.grads, truth, rtol=1e-6, atol=1e-8)
    assert int(sol.result) == Status.ok
    assert ravel_pytree(sol.grads)[0].size == N


@pytest.mark.parametrize("wrong", wrong_condition_estimators(), ids=lambda wrong: wrong.name)
def test_mistakes_in_conditions_are_rejected_by_two_cases(wrong):
    judges = [case for case in condition_cases() if wrong.legal(case)]
    assert len(judges) >= 2
    for case in judges:
        with pytest.raises(CheckFailed, match=f"{case.name}.*relative error"):
            check_estimator(wrong.estimate, cases=[case], name=wrong.name)


def test_responses_hold_on_conditions_with_their_state():
    cases = condition_cases()
    check_response(Implicit(Dense()), cases=cases)
    check_response(
        Implicit(CG(rtol=1e-13)), cases=[case for case in cases if "symmetric" in case.tags]
    )


@pytest.mark.parametrize("case", condition_cases(), ids=lambda case: case.name)
def test_truth_of_the_condition_cases_by_differences(case):
    lam, step = flatten(case.hparams), 1e-5

    def value(x):
        hparams = jax.tree.map(jnp.asarray, bilevel.testing.unflatten(x, case.hparams))
        return float(case.outer(case.solution(hparams), hparams, case.outer_batch))

    slope = [(value(lam + e) - value(lam - e)) / (2 * step) for e in step * np.eye(len(lam))]
    assert relative_error(slope, case.truth().hypergrad()) <= 1e-6
    assert len(jax.tree.leaves(case.params)) == 2
