"""Every method on every case it is legal for, against the exact hypergradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import RESPONSES, Row, expected, legal_pairs, solve_all

from bilevel import (
    CG,
    Dense,
    GaussNewton,
    HypergradientError,
    Identity,
    Implicit,
    Neumann,
    Status,
    Woodbury,
    hypergrad,
    hypergrad_solve,
    raise_for_status,
    value_and_hypergrad,
)
from bilevel.hypergradient import implicit
from bilevel.hypergradient.implicit import read_after
from bilevel.testing import (
    Case,
    cases,
    check_response,
    flatten,
    relative_error,
    unflatten,
)

ALL = {case.name: case for case in cases()}
PAIRS = legal_pairs()


@pytest.mark.parametrize(("row", "case"), PAIRS, ids=[f"{r.name}-{c.name}" for r, c in PAIRS])
def test_method_equals_its_closed_form(row: Row, case: Case):
    solution = solve_all(case)[row.name]
    assert relative_error(solution.grads, expected(row, case)) <= row.rtol, row.why
    told = Status.ok
    if "residual_norm" in solution.stats:  # a method that is meant to stop early says so
        residual, size = (float(solution.stats[k]) for k in ("residual_norm", "rhs_norm"))
        told = Status.truncated if residual > 0.1 * size else told
        told = Status.worse_than_zero if residual > 1.001 * size else told
    assert int(solution.result) == told
    truth = case.truth()
    assert relative_error(solution.direct, truth.direct) <= 1e-10
    assert relative_error(solution.grads, flatten(solution.direct) + flatten(solution.indirect)) < (
        1e-12
    )
    # The cases sit at the minimum, up to the rounding of a gradient of size |H||w|.
    assert float(solution.stats["stationarity"]) <= 1e-10


@pytest.mark.parametrize("row", RESPONSES, ids=lambda row: row.name)
def test_every_response_meets_three_cases(row: Row):
    assert sum(pair[0] is row for pair in PAIRS) >= 3


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_every_case_is_a_hard_one(case: Case):
    truth, sizes = case.truth(), [x.size for x in jax.tree.leaves(case.params)]
    assert sum(pair[1] is case for pair in PAIRS) >= 3
    assert len(sizes) >= 2
    blocks = np.split(truth.hessian, np.cumsum(sizes)[:-1])
    for i, j in itertools.combinations(range(len(sizes)), 2):
        coupling = np.split(blocks[i], np.cumsum(sizes)[:-1], axis=1)[j]
        assert np.linalg.norm(coupling) > 1e-2
    assert np.linalg.norm(truth.direct) > 1e-2
    leaves = jax.tree.leaves(
        (case.params, case.hparams, case.inner_batch, case.outer_batch), is_leaf=lambda x: False
    )
    for a, b in itertools.combinations(leaves, 2):
        assert a.shape != b.shape or not np.array_equal(a, b)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_central_differences_of_the_resolved_problem(case: Case):
    """The truth itself, against F(lam) = f(w*(lam), lam) with the inner problem solved again."""
    outer = jax.jit(lambda params, hparams: case.outer(params, hparams, case.outer_batch))
    lam, step = flatten(case.hparams), 1e-5  # truncation 1e-10, rounding 1e-16/1e-5

    def value(x: np.ndarray) -> float:
        hparams = unflatten(x, case.hparams)
        return float(outer(case.solution(hparams), hparams))

    slope = [(value(lam + e) - value(lam - e)) / (2 * step) for e in step * np.eye(len(lam))]
    assert relative_error(slope, case.truth().hypergrad()) <= 1e-6


def test_truth_holds_at_other_hyperparameters():
    case = ALL["logistic_per_feature"]
    hparams = jax.tree.map(lambda x: x + 0.3, case.hparams)
    grad = hypergrad(case.outer, case.inner, Implicit(Dense()))
    moved = jax.jit(grad)(
        case.solution(hparams),
        hparams,
        inner_batch=case.inner_batch,
        outer_batch=case.outer_batch,
    )
    assert relative_error(moved, case.hypergrad(hparams)) <= 1e-8
    assert relative_error(moved, case.hypergrad()) > 1e-2


def test_projections_of_the_solve_agree():
    case = ALL["ridge_per_feature"]
    batches = {"inner_batch": case.inner_batch, "outer_batch": case.outer_batch}
    response = Implicit(CG(rtol=1e-13))
    solution = case.solve(response)
    args = (case.params, case.hparams)
    value, grads = value_and_hypergrad(case.outer, case.inner, response)(*args, **batches)
    alone = hypergrad(case.outer, case.inner, response)(*args, **batches)
    assert relative_error(grads, solution.grads) == 0
    assert relative_error(alone, solution.grads) == 0
    assert float(value) == float(solution.value)
    assert float(value) == pytest.approx(float(case.outer(*args, case.outer_batch)), rel=1e-14)


def test_stationarity_shows_a_point_that_is_no_minimum():
    case = ALL["quadratic"]
    shift = jax.tree.map(lambda x: x + 0.5, case.params)
    solution = jax.jit(
        lambda w: hypergrad_solve(
            case.outer, case.inner, Implicit(Dense()), w, case.hparams,
            inner_batch=case.inner_batch, outer_batch=case.outer_batch,
        )
    )(shift)  # fmt: skip
    n = len(flatten(shift))
    expected_norm = np.linalg.norm(case.truth().hessian @ np.full(n, 0.5))
    assert float(solution.stats["stationarity"]) == pytest.approx(expected_norm, rel=1e-10)
    assert expected_norm > 0.1
    assert float(solution.stats["stationarity"]) > 1e8 * float(
        case.solve(Implicit(Dense())).stats["stationarity"]
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["inner_batch", "outer_batch"])
def test_nonfinite_batches_are_said_and_not_replaced(poison: float, where: str):
    case = ALL["ridge_scalar"]
    batches = {"inner_batch": case.inner_batch, "outer_batch": case.outer_batch}
    x, y = batches[where]
    batches[where] = (x.at[0, 0].set(poison), y)
    solution = hypergrad_solve(
        case.outer, case.inner, Implicit(CG(rtol=1e-10)), case.params, case.hparams, **batches
    )
    assert int(solution.result) == Status.nonfinite_input
    assert not np.isfinite(flatten(solution.grads)).any()
    with pytest.raises(HypergradientError, match="nonfinite_input"):
        raise_for_status(solution)


def test_identity_can_point_uphill():
    """H = diag(1, 100), B = w = (1, 1), g = (-1, 2): with H := I the sign of dF/dlam is wrong."""

    def inner(w, lam, batch):
        data = 99 / 2 * (w["b"] - 1) ** 2 - w["a"] - w["b"]
        return data + jax.numpy.exp(lam) * (w["a"] ** 2 + w["b"] ** 2) / 2

    def outer(w, lam, batch):
        return -w["a"] + 2 * w["b"]

    grads = {}
    for name, solver in (("identity", Identity()), ("exact", Dense())):
        solution = hypergrad_solve(
            outer,
            inner,
            Implicit(solver),
            {"a": 1.0, "b": 1.0},
            0.0,
            inner_batch=None,
            outer_batch=None,
        )
        assert float(solution.stats["stationarity"]) < 1e-14
        grads[name] = float(solution.grads)
    assert grads["exact"] == pytest.approx(0.98, rel=1e-12)  # -(w' H^-1 g)
    assert grads["identity"] == pytest.approx(-1.0, rel=1e-12)  # -(w' g)


def test_records_and_states_hold_together():
    """The public check on the responses with a state and without, twice in a row each."""
    chosen = [ALL["ridge_labels"], ALL["network"]]
    check_response(Implicit(CG(rtol=1e-13)), cases=chosen)
    check_response(
        lambda case: Implicit(Woodbury(), _operator(case)),
        cases=[ALL["multi_output"]],
    )


def _operator(case: Case) -> GaussNewton:
    assert case.gauss_newton is not None
    return case.gauss_newton


def test_warm_start_saves_products():
    case = ALL["softmax_per_weight"]
    response = Implicit(CG(rtol=1e-8))

    @jax.jit
    def solve(state, hparams):
        return hypergrad_solve(
            case.outer,
            case.inner,
            response,
            case.params,
            hparams,
            inner_batch=case.inner_batch,
            outer_batch=case.outer_batch,
            state=state,
        )

    cold = solve(response.init(case.problem, case.params, case.hparams), case.hparams)
    moved = jax.tree.map(lambda x: x + 1e-5, case.hparams)
    warm = solve(cold.state, moved)
    assert int(warm.stats["num_matvecs"]) < int(cold.stats["num_matvecs"])
    assert int(warm.result) == Status.ok


def test_neumann_approaches_the_hypergradient():
    """In hypergradients: |B'(q_K - q)| <= |B| rho^(K+1) |g| / mu."""
    case = ALL["softmax_per_weight"]
    truth = case.truth()
    eigenvalues = np.linalg.eigvalsh(truth.hessian)
    step = 1 / eigenvalues[-1]
    rho = np.abs(1 - step * eigenvalues).max()
    scale = np.linalg.norm(truth.cross, 2) * np.linalg.norm(truth.outer_grad) / eigenvalues[0]
    for k in (1, 20):
        response = Implicit(Neumann(k, step))
        grads = flatten(jax.jit(lambda response=response: case.solve(response))().grads)
        error = np.linalg.norm(grads - truth.hypergrad())
        assert 0 < error <= scale * rho ** (k + 1)


def test_argnums_chooses_the_positions_it_names_in_their_order():
    """Three hyperparameter arguments, each with its own derivative; as `jax.grad` orders them."""
    w, x = np.array([0.5, -1.0]), np.array([1.0, 2.0])

    def inner(w, a, b, c, x):
        return jnp.sum((w - a * x) ** 2) + jnp.sum(w * b**2) + 0 * c

    def outer(w, a, b, c, x):
        return jnp.sum(w * x) + 3.0 * a + 5.0 * b + 7.0 * c, w

    # w* = a x - b^2 / 2, so that dF/da = x'x + 3, dF/db = -b 1'x + 5, dF/dc = 7.
    point, b = (0.25, np.array(0.5), 0.125), 0.5
    w = point[0] * x - b**2 / 2
    want = np.array([x @ x + 3.0, -b * x.sum() + 5.0, 7.0])
    choices = (1, 2, 3, (1,), (3, 1), (1, 2, 3), (3, 2, 1))

    @jax.jit
    def all_of_them():
        return [
            hypergrad(outer, inner, Implicit(Neumann(1, 0.5)), argnums=numbers, has_aux=True)(
                w, *point, inner_batch=x, outer_batch=x
            )
            for numbers in choices
        ]

    for numbers, (got, aux) in zip(choices, all_of_them(), strict=True):
        assert isinstance(got, tuple) == isinstance(numbers, tuple)
        # The curvature is 2 and the step 1/2: the series is exact, up to rounding.
        np.testing.assert_allclose(np.array(got), want[np.array(numbers) - 1], rtol=1e-13)
        np.testing.assert_allclose(aux, w)


def test_only_what_costs_little_is_made_again_after_the_solve(monkeypatch):
    """The mixed product reads hyperparameters anew where they only regularize or weigh examples."""
    calls = []
    w, lam, x = jnp.ones(2), jnp.asarray([0.5, 2.0]), jnp.asarray([[1.0, 2.0], [3.0, -1.0]])

    def anew(q, hparams):
        calls.append(hparams)
        return read_after(q, hparams)

    monkeypatch.setattr(implicit, "read_after", anew)
    outer = lambda w, lam, batch: jnp.sum((batch @ w - 1) ** 2)  # noqa: E731
    losses = {
        lambda w, lam, b: outer(w, lam, b) + jnp.sum(jnp.exp(lam) * w**2): 1,
        lambda w, lam, b: jnp.sum(lam * (b @ w - 1) ** 2) + jnp.sum(w**2): 1,
        lambda w, lam, b: outer(w * lam, lam, b) + jnp.sum(w**2): 0,
    }
    for inner, count in losses.items():
        calls.clear()
        hypergrad_solve(outer, inner, Implicit(Dense()), w, lam, inner_batch=x, outer_batch=x)
        assert len(calls) == count
    # NaN is passed on, and anything else left as it is.
    for q, same in ((jnp.asarray([1.0, jnp.inf]), True), (jnp.asarray([1.0, jnp.nan]), False)):
        assert bool(jnp.all(read_after({"w": q}, lam) == lam)) is same
