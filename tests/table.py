"""One table, methods by problems: a new method is one row.

A row says how to make the response for a case, on which cases it is legal (else the reason why
not), which value it promises there, and how closely, with the reason for the tolerance.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel import (
    CG,
    EKFAC,
    KFAC,
    BestResponse,
    BestResponseState,
    Dense,
    Diagonal,
    DualCG,
    Evolution,
    FiniteDifference,
    GaussNewton,
    Hessian,
    Hypergradient,
    Identity,
    Implicit,
    Lineax,
    Neumann,
    Nystrom,
    Response,
    Stochastic,
    Unroll,
    UnrollMap,
    Woodbury,
)
from bilevel.testing import Case, Exact, cases, condition_cases

DAMPING = 0.5
KEY = jax.random.key(7)


class Row(NamedTuple):
    """A method: ``value`` is the adjoint it promises, ``excluded`` the reason it is not legal.

    ``state`` is what it is called with, where a fresh one would not do.
    """

    name: str
    response: Callable[[Case], Response]
    value: Callable[[Case, Exact], np.ndarray]
    rtol: float
    why: str
    excluded: Callable[[Case], str | None] = lambda case: None
    state: Callable[[Case], Any] = lambda case: None

    def solve(self, case: Case, key: Any = None) -> Hypergradient:
        response = self.response(case)
        copies = getattr(response, "num_inner_batches", lambda: None)()
        return case.solve(response, key=key, state=self.state(case), copies=copies)


def needs(*tags: str) -> Callable[[Case], str | None]:
    def excluded(case: Case) -> str | None:
        missing = sorted(set(tags) - case.tags)
        return f"{case.name} is not {' and '.join(missing)}" if missing else None

    return excluded


def only(*names: str) -> Callable[[Case], str | None]:
    """A property of the solver alone, costly to compile: a few cases of different kinds."""

    def excluded(case: Case) -> str | None:
        return None if case.name in names else f"only on {', '.join(names)}: compile time"

    return excluded


def steps_of(case: Case) -> float:
    """The inverse of the largest eigenvalue: inside the series' interval (0, 2/lambda_max)."""
    return float(1 / largest(case))


@functools.cache
def largest(case: Case) -> float:
    return float(np.linalg.eigvalsh(case.truth().hessian)[-1])


def gauss_newton(case: Case, damping: float = 0.0, independent: bool = False) -> GaussNewton:
    operator = case.gauss_newton
    assert operator is not None
    return GaussNewton(operator.model, operator.output_loss, damping, operator.penalty, independent)


@functools.cache
def dense_gauss_newton(case: Case) -> np.ndarray:
    """J'QJ plus the penalty's Hessian from dense Jacobians, by another route than products."""
    operator, args = case.gauss_newton, (case.hparams, case.inner_batch)
    assert operator is not None
    flat, unravel = ravel_pytree(case.params)
    shape = jax.eval_shape(operator.model, case.params, *args).shape

    def outputs(w):
        return operator.model(unravel(w), *args).reshape(-1)

    @jax.jit
    def matrix(w):
        j = jax.jacrev(outputs)(w)
        weights = jax.hessian(lambda z: operator.output_loss(z.reshape(shape), *args))(outputs(w))
        data = j.T @ weights @ j
        if operator.penalty is None:
            return data
        return data + jax.hessian(lambda w: operator.penalty(unravel(w), case.hparams))(w)

    return np.asarray(matrix(flat))


def exact(case: Case, truth: Exact) -> np.ndarray:
    return truth.adjoint()


def damped(case: Case, truth: Exact) -> np.ndarray:
    return truth.adjoint(DAMPING)


def damped_gauss_newton(case: Case, truth: Exact) -> np.ndarray:
    matrix = dense_gauss_newton(case)
    return np.linalg.solve(matrix + DAMPING * np.eye(len(matrix)), truth.outer_grad)


def in_eigenbasis(case: Case, truth: Exact) -> np.ndarray:
    """EKFAC of one layer with one output: the matrix' diagonal in the inputs' eigenbasis."""
    operator, flat = case.gauss_newton, ravel_pytree(case.params)
    assert operator is not None and operator.penalty is not None
    strengths = jax.hessian(lambda w: operator.penalty(flat[1](w), case.hparams))(flat[0])
    x = np.asarray(operator.model.features(case.hparams, case.inner_batch))
    x = np.column_stack([np.ones(len(x)), x])  # the bias is the first of the parameters
    basis = np.linalg.eigh(x.T @ x)[1]
    data = basis.T @ (dense_gauss_newton(case) - np.asarray(strengths)) @ basis
    scales = np.diag(data) + np.mean(np.diag(np.asarray(strengths))) + DAMPING
    return basis @ (basis.T @ truth.outer_grad / scales)


def series(num_matvecs: int) -> Callable[[Case, Exact], np.ndarray]:
    return lambda case, truth: truth.series(num_matvecs, steps_of(case))


def sgd(case: Case) -> optax.GradientTransformation:
    return optax.sgd(steps_of(case))


def descent(case: Case) -> Callable[..., Any]:
    """A gradient step on the inner loss, as a map of the user's own."""
    rate = steps_of(case)

    def step(w: Any, lam: Any, batch: Any, t: Any) -> Any:
        return jax.tree.map(lambda x, g: x - rate * g, w, jax.grad(case.inner)(w, lam, batch))

    return step


class LinearNetwork(NamedTuple):
    """w + J d on flat vectors, with J for its parameters: the response of a linear minimiser."""

    centred: bool = True

    def init(self, key: Any, params: Any, hparams: Any) -> jax.Array:
        size = [sum(np.size(x) for x in jax.tree.leaves(t)) for t in (params, hparams)]
        return jnp.zeros(size)

    def apply(self, network_params: jax.Array, params: Any, displacement: Any, /) -> Any:
        flat, unravel = ravel_pytree(params)
        return unravel(flat + network_params @ ravel_pytree(displacement)[0])


def trained(case: Case) -> BestResponseState:
    """The network that predicts the minimiser to first order, J = -H^-1 B."""
    truth = case.truth()
    return BestResponseState(jnp.asarray(-np.linalg.solve(truth.hessian, truth.cross)), None)


BACKWARD_STABLE = "a backward stable solve in float64: about cond(H) 1e-16, and cond(H) < 100"
TOLERANCE = "rtol 1e-13 on the residual is an error of cond(H) 1e-13 in q, and cond(H) < 100"
ROUNDING = "the same sum in another order: rounding of some tens of operations"
# K SGD steps of size a from the minimiser w*, which stay there: their adjoint is that of the series
# with K terms, a sum_{j<K} (I - aH)^j g.
STEPS = "as the series; the gradient at w* is 1e-13 rather than zero, and the steps move by that"
DIFFERENCE = (
    "the gradient in the hyperparameters is quadratic in w, so a central difference is exact but "
    "for cancellation: 1e-16 / (radius 0.01), times |grad_lam h| / |indirect| of some tens"
)
PAIRS, SIGMA = 2**14, 1e-3
NOISE = (
    "the estimate's relative standard error is at most sqrt((p + 1) / pairs) = 0.018 for p <= 4 "
    "hyperparameters: four of them. The bias of smoothing is sigma^2 = 1e-6"
)

RESPONSES = [
    Row("dense", lambda case: Implicit(Dense()), exact, 1e-8, BACKWARD_STABLE),
    Row("cg", lambda case: Implicit(CG(rtol=1e-13)), exact, 1e-8, TOLERANCE),
    Row(
        "cg_hutchinson",
        lambda case: Implicit(CG(rtol=1e-13, preconditioner=Diagonal())),
        exact,
        1e-8,
        TOLERANCE,
        only("ridge_per_feature", "quadratic", "network"),
    ),
    Row(
        "cg_gauss_newton",
        lambda case: Implicit(CG(rtol=1e-13), gauss_newton(case)),
        exact,
        1e-8,
        TOLERANCE,
        only("least_squares", "multi_output", "softmax_per_weight"),
    ),
    Row(
        "cg_gauss_newton_diagonal",
        lambda case: Implicit(CG(rtol=1e-13, preconditioner=Diagonal()), gauss_newton(case)),
        exact,
        1e-8,
        TOLERANCE,
        only("ridge_scalar", "ridge_data_weights", "multi_output", "softmax_per_weight"),
    ),
    Row(
        "woodbury",
        lambda case: Implicit(Woodbury(), gauss_newton(case)),
        exact,
        1e-8,
        BACKWARD_STABLE,
        needs("gauss_newton_exact", "separable_penalty"),
    ),
    Row(
        "woodbury_damped",
        lambda case: Implicit(Woodbury(), gauss_newton(case, DAMPING)),
        damped_gauss_newton,
        1e-8,
        BACKWARD_STABLE,
        only("ridge_labels", "multi_output", "softmax_per_weight", "least_squares", "network"),
    ),
    Row(
        "woodbury_through_layers",
        lambda case: Implicit(Woodbury(), gauss_newton(case, DAMPING, independent=True)),
        damped_gauss_newton,
        1e-8,
        BACKWARD_STABLE,
        only("ridge_labels", "multi_output", "softmax_per_weight", "network"),
    ),
    Row(
        "dual_cg",
        lambda case: Implicit(DualCG(rtol=1e-7), gauss_newton(case, DAMPING)),
        damped_gauss_newton,
        1e-5,
        TOLERANCE,
        only("ridge_labels", "multi_output", "softmax_per_weight", "network"),
    ),
    Row(
        "cg_kfac",
        lambda case: Implicit(CG(rtol=1e-13, preconditioner=KFAC()), gauss_newton(case, DAMPING)),
        damped_gauss_newton,
        1e-8,
        TOLERANCE,
        only("ridge_labels", "multi_output", "softmax_per_weight", "network"),
    ),
    Row(
        "cg_ekfac",
        lambda case: Implicit(CG(rtol=1e-13, preconditioner=EKFAC()), gauss_newton(case, DAMPING)),
        damped_gauss_newton,
        1e-8,
        TOLERANCE,
        only("multi_output", "softmax_per_weight", "network"),
    ),
    Row(
        "cg_ekfac_rank",
        lambda case: Implicit(
            CG(rtol=1e-13, preconditioner=EKFAC(rank=3)), gauss_newton(case, DAMPING)
        ),
        damped_gauss_newton,
        1e-8,
        TOLERANCE,
        only("multi_output", "softmax_per_weight", "network"),
    ),
    Row(
        "ekfac",
        lambda case: Implicit(EKFAC(), gauss_newton(case, DAMPING)),
        in_eigenbasis,
        1e-8,
        BACKWARD_STABLE,
        only("ridge_scalar", "ridge_labels", "ridge_per_feature", "logistic_scalar"),
    ),
    Row(
        "cg_nystrom",
        lambda case: Implicit(CG(rtol=1e-13, preconditioner=Nystrom(2)), Hessian(DAMPING)),
        damped,
        1e-8,
        TOLERANCE,
        only("ridge_per_feature", "quadratic", "network"),
    ),
    Row("neumann_0", lambda c: Implicit(Neumann(0, steps_of(c))), series(0), 1e-12, ROUNDING),
    Row("neumann_7", lambda c: Implicit(Neumann(7, steps_of(c))), series(7), 1e-12, ROUNDING),
    Row(
        "stochastic_sgd",
        lambda c: Implicit(Stochastic(optax.sgd(steps_of(c)), 7), warm_start=False),
        series(7),
        1e-12,
        ROUNDING,
        only("ridge_per_feature", "quadratic", "network"),
    ),
    Row(
        "nystrom_full_rank",
        lambda c: Implicit(Nystrom(len(c.truth().params)), Hessian(DAMPING)),
        damped,
        1e-8,
        BACKWARD_STABLE,
        only("ridge_labels", "logistic_per_feature", "least_squares", "network"),
    ),
    Row(
        "nystrom_gaussian_full_rank",
        lambda c: Implicit(Nystrom(len(c.truth().params), gaussian=True), Hessian(DAMPING)),
        damped,
        1e-8,
        "as nystrom_full_rank; the square of the Gaussian test matrix's conditioning comes on top",
        only("ridge_scalar", "quadratic", "logistic_scalar"),
    ),
    Row(
        "identity",
        lambda case: Implicit(Identity(0.3)),
        lambda case, truth: 0.3 * truth.outer_grad,
        1e-12,
        ROUNDING,
    ),
    *(
        Row(
            f"unroll_{mode}",
            lambda case, mode=mode: Unroll(sgd(case), 8, mode=mode),
            series(7),
            1e-12,
            STEPS,
            only("ridge_per_feature", "quadratic", "logistic_scalar"),
        )
        for mode in ("reverse", "mixed", "forward")
    ),
    Row(
        "unroll_truncated",
        lambda case: Unroll(sgd(case), 8, truncate=3),
        series(2),
        1e-12,
        STEPS,
        only("ridge_labels", "quadratic", "network"),
    ),
    Row(
        "unroll_map",
        lambda case: UnrollMap(descent(case), 8),
        series(7),
        1e-12,
        STEPS,
        only("ridge_per_feature", "quadratic", "softmax_per_weight"),
    ),
    Row(
        "finite_difference",
        lambda case: FiniteDifference(sgd(case)),
        series(0),
        1e-12,
        DIFFERENCE,
        only("ridge_data_weights", "quadratic", "softmax_per_weight"),
    ),
    Row(
        "evolution",
        lambda case: Evolution(sgd(case), 3, PAIRS, SIGMA),
        series(2),
        0.07,
        NOISE,
        only("ridge_scalar", "quadratic", "logistic_per_feature"),
    ),
    Row(
        "best_response",
        lambda case: BestResponse(LinearNetwork()),
        exact,
        1e-12,
        "J by a backward stable solve in float64, and cond(H) < 100",
        only("ridge_labels", "quadratic", "network", "multi_output"),
        trained,
    ),
]


# Inner problems that are no smooth loss, by the solvers that their systems allow.
CONDITIONS = [
    Row("condition_dense", lambda case: Implicit(Dense()), exact, 1e-8, BACKWARD_STABLE),
    Row(
        "condition_gmres",
        lambda case: Implicit(Lineax(lineax.GMRES(1e-13, 1e-13, restart=6))),
        exact,
        1e-8,
        TOLERANCE,
    ),
    Row(
        "condition_series",
        lambda case: Implicit(Neumann(3000)),
        exact,
        1e-8,
        "a contraction of 0.6, or eigenvalues above 0.01 of the largest: 3000 terms go to rounding",
        only("equilibrium", "lasso", "elastic_net"),
    ),
    Row("condition_cg", lambda c: Implicit(CG(rtol=1e-13)), exact, 1e-8, TOLERANCE,
        needs("symmetric")),
    Row(
        "condition_cg_hutchinson",
        lambda case: Implicit(CG(rtol=1e-13, preconditioner=Diagonal())),
        exact,
        1e-8,
        TOLERANCE,
        needs("symmetric"),
    ),
]  # fmt: skip


def rows_of(case: Case) -> list[Row]:
    rows = CONDITIONS if "condition" in case.tags else RESPONSES
    return [row for row in rows if row.excluded(case) is None]


def legal_pairs() -> list[tuple[Row, Case]]:
    return [(row, case) for case in (*cases(), *condition_cases()) for row in rows_of(case)]


@functools.cache
def solve_all(case: Case) -> dict:
    """Every legal response on one case, in one compiled program: compile time rules here."""
    rows = rows_of(case)

    def everything(key):
        return {row.name: row.solve(case, key) for row in rows}

    # Less work for the code generator halves the time; the programs and their order stay.
    return jax.jit(everything, compiler_options={"xla_backend_optimization_level": 0})(KEY)


def expected(row: Row, case: Case) -> np.ndarray:
    truth = case.truth()
    return truth.hypergrad(row.value(case, truth))
