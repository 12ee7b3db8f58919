"""The suite can fail: every deliberate mistake is rejected, and its correct twin is not."""

import functools

import jax
import numpy as np
import pytest

from bilevel import CG, Dense, Implicit, LinearSolution, Neumann
from bilevel.testing import (
    CheckFailed,
    cases,
    check_estimator,
    check_response,
    check_solver,
    wrong_estimators,
)
from bilevel.testing.wrong import FlippedSign, HandCG, WrongSeries

WRONG = {wrong.name: wrong for wrong in wrong_estimators()}
JUDGES = [
    case
    for case in cases()
    if case.name in ("ridge_per_feature", "ridge_labels", "quadratic", "logistic_per_feature")
]


@functools.cache
def estimates(case):
    """All mistakes on one case in one compiled program."""
    legal = [wrong for wrong in WRONG.values() if wrong.legal(case)]
    return jax.jit(lambda: {wrong.name: wrong.estimate(case) for wrong in legal})()


def rejections(wrong):
    """The messages of the cases that turn an estimator down."""
    messages = {}
    for case in JUDGES:
        if not wrong.legal(case):
            continue
        try:
            check_estimator(
                lambda case: estimates(case)[wrong.name],
                cases=[case],
                reference=wrong.reference,
                name=wrong.name,
            )
        except CheckFailed as failure:
            messages[case.name] = str(failure)
    return messages


def test_the_mistakes_are_all_there():
    asked = {
        "sign_flipped",
        "identity_hessian",
        "block_diagonal_hessian",
        "batches_swapped",
        "direct_term_dropped",
        "neumann_off_by_one",
        "stale_cg",
    }
    assert asked <= set(WRONG)


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_is_rejected_by_two_cases(name):
    messages = rejections(WRONG[name])
    assert len(messages) >= 2, messages
    for case, message in messages.items():
        assert case in message and name in message and "relative error" in message
        assert "nan" not in message and "inf" not in message  # wrong, not broken


def test_the_correct_twins_are_accepted():
    """Same code without the mistake: it is the mistake that is rejected, not the style."""
    step = 0.05

    def sound(case):
        n = len(case.truth().params)
        return {
            "series": case.solve(Implicit(WrongSeries(3, step))).grads,
            "cg": case.solve(Implicit(HandCG(n + 3, stale=False))).grads,
            "dense": case.solve(Implicit(Dense())).grads,
        }

    for case in JUDGES[::2]:
        found = jax.jit(functools.partial(sound, case))()
        truth = case.truth()
        check_estimator(
            lambda case, found=found: found["series"],
            cases=[case],
            reference=lambda case, truth=truth: truth.hypergrad(truth.series(3, step)),
        )
        for name in ("cg", "dense"):
            check_estimator(lambda case, found=found, name=name: found[name], cases=[case])


@pytest.mark.parametrize("name", [name for name, wrong in WRONG.items() if wrong.solver])
def test_wrong_solvers_are_rejected_as_solvers(name):
    """Each by two cases again, now by the check that third parties run on a solver."""
    wrong = WRONG[name]
    for case in (JUDGES[0], JUDGES[2]):
        solver, reference = wrong.solver(case), None
        if isinstance(solver, WrongSeries):

            def reference(exact, solver=solver):
                return exact.series(solver.num_matvecs, solver.step_size)

        with pytest.raises(CheckFailed, match=f"case '{case.name}'"):
            check_solver(solver, cases=[case], reference=reference)


def test_a_flipped_sign_is_rejected_as_a_response():
    with pytest.raises(CheckFailed, match="FlippedSign.*'ridge_per_feature'.*hypergradient"):
        check_response(FlippedSign(Dense()), cases=JUDGES[:1])


class Lying(Dense):
    """Solves exactly and reports what it likes."""

    def solve(self, mv, rhs, x0=None, *, key=None, certify=True):
        value, result, stats = super().solve(mv, rhs, x0, key=key, certify=certify)
        stats = {**stats, self.field: stats.get(self.field, 0) + 1}
        return LinearSolution(value, result, stats)


@pytest.mark.parametrize("field", ["residual_norm", "rhs_norm", "num_matvecs"])
def test_lying_reports_are_rejected(field):
    solver = type("Lying", (Lying,), {"field": field})()
    with pytest.raises(CheckFailed, match=field):
        check_solver(solver, cases=JUDGES[:1])


class Zeroing(Dense):
    """Replaces what is not finite by zero."""

    def solve(self, mv, rhs, x0=None, *, key=None, certify=True):
        solution = super().solve(mv, rhs, x0, key=key, certify=certify)
        clean = jax.tree.map(lambda v: jax.numpy.nan_to_num(v), solution.value)
        return solution._replace(value=clean)


def test_zeros_in_the_place_of_nan_are_rejected():
    with pytest.raises(CheckFailed, match="not\\s+finite"):
        check_solver(Zeroing(), cases=JUDGES[:1])


class Shrinking(CG):
    """Hands back a state of another dtype than it was given."""

    def solve(self, mv, rhs, x0=None, *, key=None, certify=True):
        solution = super().solve(mv, rhs, x0, key=key, certify=certify)
        narrow = jax.tree.map(lambda v: v.astype(np.float32), solution.value)
        return solution._replace(value=narrow)


def test_a_state_of_another_dtype_is_rejected():
    with pytest.raises(CheckFailed, match="float32"):
        check_response(Implicit(Shrinking()), cases=JUDGES[:1], rtol=1e-5)


def test_sound_solvers_pass_where_the_wrong_ones_fail():
    check_solver(Neumann(3, 0.05), cases=JUDGES[:1], reference=lambda e: e.series(3, 0.05))
    with pytest.raises(CheckFailed):
        check_solver(Neumann(2, 0.05), cases=JUDGES[:1], reference=lambda e: e.series(3, 0.05))
