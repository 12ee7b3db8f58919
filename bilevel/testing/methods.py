"""Checks that a solver or a response, yours or ours, must pass."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Hparams, Key, MatVec
from bilevel.ground.status import RESIDUAL, Status
from bilevel.ground.tree import accumulator_dtype
from bilevel.hypergradient import Hypergradient, Response, hypergrad_solve
from bilevel.linear import LinearMap, LinearSolution, LinearSolver
from bilevel.testing.case import Case, Exact, flatten, unflatten
from bilevel.testing.cases import cases as all_cases

Reference: TypeAlias = Callable[[Case], np.ndarray]


class CheckFailed(AssertionError):
    """A method disagrees with the truth or with its own report; the message names the case."""


def relative_error(got: Any, expected: Any) -> float:
    r""":math:`‖a - b‖ / ‖b‖` over all leaves, in float64; NaN counts as infinite."""
    a, b = flatten(got), flatten(expected)
    if a.shape != b.shape:
        return float("inf")
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), np.finfo(float).tiny))
    return error if np.isfinite(error) else float("inf")


def _require(condition: Any, who: str, case: Case, complaint: str) -> None:
    if not condition:
        raise CheckFailed(f"{who} on case '{case.name}': {complaint}")


def _require_close(got: Any, expected: Any, rtol: float, who: str, case: Case, what: str) -> None:
    error = relative_error(got, expected)
    _require(
        error <= rtol,
        who,
        case,
        f"{what} has a relative error of {error:.3g}, above the tolerance {rtol:.3g} "
        f"(got {flatten(got)[:4]}..., expected {flatten(expected)[:4]}...).",
    )


def _require_like(got: Any, expected: Any, dtype: Any, who: str, case: Case, what: str) -> None:
    same = jax.tree.structure(got) == jax.tree.structure(expected)
    _require(
        same,
        who,
        case,
        f"{what} has the structure {jax.tree.structure(got)}, expected "
        f"{jax.tree.structure(expected)}.",
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        wanted = dtype(jnp.result_type(b))
        _require(
            jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == wanted,
            who,
            case,
            f"{what} has a leaf {jnp.result_type(a)}{list(jnp.shape(a))}, expected "
            f"{wanted}{list(jnp.shape(b))}.",
        )


def check_estimator(
    estimate: Callable[[Case], Hparams],
    *,
    cases: Sequence[Case] | None = None,
    reference: Reference | None = None,
    rtol: float = 1e-8,
    name: str = "The estimator",
) -> None:
    """Hold any function ``case -> hypergradient`` against the truth.

    Args:
      estimate: returns a tree shaped like ``case.hparams``.
      cases: default all of :func:`~bilevel.testing.cases`.
      reference: the flat hypergradient to expect, by default the exact one. An approximation
        with a definite value (a truncated series, a damped inverse) has one of its own, which
        ``case.truth()`` helps to write down.
      rtol: relative error allowed in the Euclidean norm over all hyperparameters.
      name: what messages call it.

    Raises:
      CheckFailed: at the first case that fails.
    """
    reference = reference or (lambda case: case.truth().hypergrad())
    for case in all_cases() if cases is None else cases:
        grads = estimate(case)
        _require_like(grads, case.hparams, lambda d: d, name, case, "the hypergradient")
        _require_close(grads, reference(case), rtol, name, case, "the hypergradient")


def check_response(
    response: Response | Callable[[Case], Response],
    *,
    cases: Sequence[Case] | None = None,
    reference: Reference | None = None,
    rtol: float = 1e-8,
    key: Key | None = None,
) -> None:
    """Hold a response against the truth, and its record and state against each other.

    Checked on every case, jitted: the hypergradient, its direct part and the outer value; that
    the parts add up; that the status is ``ok``, or says what the residual says; that ``init``
    works on shapes alone and gives the structure, shapes and dtypes of the state that comes
    back; and that a second call, from that state, is right too.

    Args:
      response: one response, or a function that makes one for a case (a step size that suits
        its curvature, its Gauss–Newton operator).
      cases, reference, rtol: as in :func:`check_estimator`.
      key: handed to every call.

    Raises:
      CheckFailed: naming the case and what is wrong.
    """
    make: Any = (lambda case: response) if hasattr(response, "vjp") else response
    reference = reference or (lambda case: case.truth().hypergrad())
    for case in all_cases() if cases is None else cases:
        chosen: Any = make(case)
        who = type(chosen).__name__

        def call(state: Any, chosen: Any = chosen, case: Case = case) -> Hypergradient:
            return hypergrad_solve(
                case.outer,
                case.inner,
                chosen,
                case.params,
                case.hparams,
                inner_batch=case.inner_batch,
                outer_batch=case.outer_batch,
                state=state,
                key=key,
            )

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.params)
        state = chosen.init(case.problem, shapes, case.hparams)
        jitted = jax.jit(call)
        for which in ("first", "second"):
            solution = jitted(state)
            _check_record(solution, case, reference(case), rtol, f"{who} ({which} call)")
            _require_like(solution.state, state, lambda d: d, who, case, "the returned state")
            state = solution.state


def _check_record(
    solution: Hypergradient, case: Case, expected: np.ndarray, rtol: float, who: str
) -> None:
    truth = case.truth()
    _require_like(solution.grads, case.hparams, lambda d: d, who, case, "grads")
    _require_close(solution.grads, expected, rtol, who, case, "the hypergradient")
    _require_close(solution.direct, truth.direct, rtol, who, case, "the direct term")
    parts = flatten(solution.direct) + flatten(solution.indirect)
    _require_close(solution.grads, parts, 1e-12, who, case, "grads against direct + indirect")
    _require_honest(solution, who, case)


def _require_honest(solution: Any, who: str, case: Case) -> None:
    """The status is ``ok``, or says what the residual says."""
    status, wanted = Status(int(solution.result)), Status.ok
    if "residual_norm" in solution.stats:
        left, right = (float(solution.stats[k]) for k in ("residual_norm", "rhs_norm"))
        wanted = Status.truncated if left > RESIDUAL * right else wanted
        wanted = Status.worse_than_zero if left > 1.001 * right else wanted
    told = f"the status is {status.name}, expected {wanted.name}."
    _require(status == wanted, who, case, told)


def count_products(solve: Callable[[MatVec], LinearSolution], mv: MatVec) -> int:
    """How often ``solve(mv)`` really evaluates its product, loops and batching included."""
    count = 0

    def counted(v: Any) -> Any:
        jax.debug.callback(tick, sum(jnp.sum(x) for x in jax.tree.leaves(v)))
        return mv(v)

    def tick(_: Any) -> None:  # reads the vector, so that a batched product counts each lane
        nonlocal count
        count += 1

    jax.block_until_ready(solve(counted).value)
    jax.effects_barrier()
    return count


def check_solver(
    solver: LinearSolver,
    *,
    cases: Sequence[Case] | None = None,
    reference: Callable[[Exact], np.ndarray] | None = None,
    rtol: float = 1e-8,
    damping: float = 0.0,
    key: Key | None = None,
) -> None:
    r"""Hold a linear solver against dense solves with the cases' Hessians, and check its report.

    Checked on every case: the value, its shapes and (accumulator) dtypes, that the status says
    what the residual says, that ``rhs_norm`` and ``residual_norm`` are what NumPy recomputes from
    the value, and that ``certify=False`` changes nothing but the absence of the latter. On the
    first case: that ``num_matvecs`` is the number of products really made, and that a NaN or an
    infinite right side gives ``nonfinite_input`` and a value that is not finite.

    Args:
      solver: sees products only; one that needs factors is tested by :func:`check_response`.
      cases: default all of :func:`~bilevel.testing.cases`.
      reference: ``reference(exact) -> q`` to expect, by default :math:`(H + ρ I)^{-1}g`.
      rtol: relative error allowed in :math:`q`.
      damping: :math:`ρ`.
      key: handed to every solve.

    Raises:
      CheckFailed: naming the case and what is wrong.
    """
    who = type(solver).__name__
    chosen = all_cases() if cases is None else cases
    reference = reference or (lambda exact: exact.adjoint(damping))

    @jax.jit
    def both(hessian: jax.Array, rhs: Any) -> tuple[LinearSolution, LinearSolution]:
        mv = dense_map(hessian, damping)
        certified = solver.solve(mv, rhs, key=key)
        return certified, solver.solve(mv, rhs, key=key, certify=False)

    for case in chosen:
        exact = case.truth()
        rhs = unflatten(exact.outer_grad, case.params)
        solution, bare = both(jnp.asarray(exact.hessian), rhs)
        _require_like(solution.value, rhs, accumulator_dtype, who, case, "the value")
        _require_close(solution.value, reference(exact), rtol, who, case, "the solution")
        _check_stats(solution, exact, damping, who, case)
        _require_honest(solution, who, case)
        _require("residual_norm" not in bare.stats, who, case, "certify=False has a residual.")
        _require_close(bare.value, solution.value, 1e-12, who, case, "the value uncertified")

    first = chosen[0]
    exact = first.truth()
    rhs, hessian = unflatten(exact.outer_grad, first.params), jnp.asarray(exact.hessian)
    for bad in (np.nan, np.inf):
        poisoned = unflatten(np.r_[bad, exact.outer_grad[1:]], first.params)
        solution = both(hessian, poisoned)[0]
        _require(
            int(solution.result) == Status.nonfinite_input
            and not np.isfinite(flatten(solution.value)).all(),
            who,
            first,
            f"a right side with {bad} must give status nonfinite_input and a value that is not "
            f"finite, got {Status(int(solution.result)).name} and {flatten(solution.value)}.",
        )
    reported = int(solver.solve(dense_map(hessian, damping), rhs, key=key).stats["num_matvecs"])
    counted = count_products(
        lambda mv: solver.solve(LinearMap(mv, damping), rhs, key=key, certify=False),
        dense_map(hessian, 0.0),
    )
    _require(
        reported == counted,
        who,
        first,
        f"stats['num_matvecs'] is {reported}, but {counted} products were made.",
    )


def _check_stats(
    solution: LinearSolution, exact: Exact, damping: float, who: str, case: Case
) -> None:
    q = flatten(solution.value)
    size = float(np.linalg.norm(exact.outer_grad))
    image = exact.hessian @ q + damping * q
    residual = float(np.linalg.norm(exact.outer_grad - image))
    rounding = 1e-12 * (size + float(np.linalg.norm(exact.hessian, 2) * np.linalg.norm(q)))
    for name, value in (("rhs_norm", size), ("residual_norm", residual)):
        _require(name in solution.stats, who, case, f"stats['{name}'] is missing.")
        got = float(solution.stats[name])
        _require(
            abs(got - value) <= 1e-8 * value + rounding,
            who,
            case,
            f"stats['{name}'] is {got:.6g}, but recomputed from the value it is {value:.6g}.",
        )


def dense_map(hessian: jax.Array, damping: Any) -> LinearMap:
    """A matrix acting on trees, as a solver receives an operator."""

    def mv(v: Any) -> Any:
        leaves, treedef = jax.tree.flatten(v)
        flat = jnp.concatenate([x.reshape(-1) for x in leaves])
        parts = jnp.split(hessian @ flat, np.cumsum([x.size for x in leaves])[:-1])
        return jax.tree.unflatten(
            treedef, [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)]
        )

    return LinearMap(mv, damping)
