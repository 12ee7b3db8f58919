"""One table, methods by problems: a new method is one row.

A row says how to make the response for a case, on which cases it is legal (else the reason why
not), which value it promises there, and how closely, with the reason for the tolerance.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

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
    Response,
    Stochastic,
    Woodbury,
)
from bilevel.testing import Case, Exact, cases

DAMPING = 0.5
KEY = jax.random.key(7)


class Row(NamedTuple):
    """A method: ``value`` is the adjoint it promises, ``excluded`` the reason it is not legal."""

    name: str
    response: Callable[[Case], Response]
    value: Callable[[Case, Exact], np.ndarray]
    rtol: float
    why: str
    excluded: Callable[[Case], str | None] = lambda case: None


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


def gauss_newton(case: Case, damping: float = 0.0) -> GaussNewton:
    operator = case.gauss_newton
    assert operator is not None
    return GaussNewton(operator.model, operator.output_loss, damping, operator.penalty)


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


def series(num_matvecs: int) -> Callable[[Case, Exact], np.ndarray]:
    return lambda case, truth: truth.series(num_matvecs, steps_of(case))


BACKWARD_STABLE = "a backward stable solve in float64: about cond(H) 1e-16, and cond(H) < 100"
TOLERANCE = "rtol 1e-13 on the residual is an error of cond(H) 1e-13 in q, and cond(H) < 100"
ROUNDING = "the same sum in another order: rounding of some tens of operations"

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
]


def legal_pairs() -> list[tuple[Row, Case]]:
    return [(row, case) for row in RESPONSES for case in cases() if row.excluded(case) is None]


@functools.cache
def solve_all(case: Case) -> dict:
    """Every legal response on one case, in one compiled program: compile time rules here."""
    rows = [row for row in RESPONSES if row.excluded(case) is None]

    def everything(key):
        return {row.name: case.solve(row.response(case), key=key) for row in rows}

    # Less work for the code generator halves the time; the programs and their order stay.
    return jax.jit(everything, compiler_options={"xla_backend_optimization_level": 0})(KEY)


def expected(row: Row, case: Case) -> np.ndarray:
    truth = case.truth()
    return truth.hypergrad(row.value(case, truth))
