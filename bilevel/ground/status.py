"""Outcome of a hypergradient: codes that live in arrays, and their messages.

A status never changes a number. Solvers and responses return it beside their value as an
int32 scalar (so it maps, scans and donates), and :func:`raise_for_status` turns it into an
exception on the host, with the numbers that tell cause and remedy.
"""

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.ground.settings import check_number, check_real

RESIDUAL = 0.1
"""A solve whose residual is above this part of its right side has not converged."""

STATIONARITY = 0.05
"""Parameters that are further than this part of their length from a minimum are not at one."""


class Status(enum.IntEnum):
    """Outcome of a solve or of a whole hypergradient, ordered by severity.

    Only ``ok`` means that the number can be used as it is.
    """

    ok = 0
    truncated = 1
    max_steps = 2
    stagnated = 3
    singular = 4
    rounding = 5
    knot = 6
    not_stationary = 7
    worse_than_zero = 8
    negative_curvature = 9
    diverged = 10
    invalid_setting = 11
    nonfinite_input = 12
    nonfinite_output = 13


MESSAGES: dict[Status, str] = {
    Status.ok: "The hypergradient was computed as asked.",
    Status.truncated: (
        "The linear solve spent its budget and left more than a tenth of its right side as "
        "residual (`residual_norm` over `rhs_norm`). The direction may still be useful, as with a "
        "strongly damped solve. Allow more products (`CG(max_steps=...)`, `Neumann("
        "num_matvecs=...)`), add `damping`, or accept it: `raise_for_status(solution, "
        "residual=0.5)`."
    ),
    Status.max_steps: (
        "The linear solve spent its budget before it met its tolerance. Raise `max_steps`, "
        "loosen `rtol`/`atol`, add `damping`, use `CG(preconditioner=Diagonal())`, or drop the "
        "tolerances if a fixed budget is what you want."
    ),
    Status.stagnated: (
        "The solver's own recurrence claims convergence but the recomputed residual does not: "
        "rounding has taken over. Use float64, loosen the tolerance, or add `damping`."
    ),
    Status.singular: (
        "The curvature vanishes in some direction in which the outer loss has a gradient: the "
        "inner problem has no single minimum there (rows of an embedding that the batch does not "
        "use, dead units, more parameters than data). The least-squares solution was used, in "
        "which such directions do not respond. If they should, add a penalty to the inner loss "
        "or `damping` to the operator; if not, take them out of `params`."
    ),
    Status.rounding: (
        "The result is at the level of rounding: steps or perturbations are too small for the "
        "dtype of the parameters, which lose them, or the smallest inner curvature is below a "
        "rounding of the largest. Keep parameters in float32 and cast inside the loss, use fewer "
        "or longer steps, add `damping`, or raise `radius`."
    ),
    Status.knot: (
        "The solution has a kink in the hyperparameters here and no derivative: some parameters "
        "(`knots`) are just at a threshold or a bound of their condition, or nearer than the solve "
        "of the inner problem tells. The value is the derivative on one side. Solve the inner "
        "problem to a tighter tolerance; if it stays, move the hyperparameters a little, or take "
        "the one-sided value, as a descent may."
    ),
    Status.not_stationary: (
        "The parameters are not at a minimum of the inner loss, as an implicit hypergradient "
        "assumes: see `relative_stationarity` and `predicted_change`. Train further; use "
        "`Unroll(...)`, which assumes no minimum; or, where parameters are held by a constraint or "
        "a kink of the loss (L1, hinge, bounds), pass the condition that they satisfy: "
        "`Composite(loss, prox)` or `FixedPoint(step)` in place of the loss. On a minibatch "
        "the noise of its gradient counts too. To accept more: `raise_for_status(solution, "
        "stationarity=...)`."
    ),
    Status.worse_than_zero: (
        "The residual of the linear solve is larger than its right side: no solve at all would be "
        "closer. Use a smaller `scale` or step size, `damping`, `GaussNewton(...)`, or `CG()`."
    ),
    Status.negative_curvature: (
        "The operator is not positive semi-definite: a direction of negative curvature was met, "
        "and the solution from before it is used. Train the inner problem further, use "
        "`GaussNewton(...)` instead of `Hessian()`, or set `damping` above minus "
        "`min_curvature`."
    ),
    Status.diverged: (
        "The series grows instead of shrinking: some eigenvalue of the operator is negative or "
        "above 2/step_size. Use a smaller `step_size` (or `None` to estimate it), `damping`, or "
        "`GaussNewton(...)`."
    ),
    Status.invalid_setting: (
        "A traced setting of the response (a damping, step size, scale, radius or tolerance that "
        "was computed inside `jit`) is NaN, infinite or outside its range: look at where it comes "
        "from, and at the range in the docstring. Or the network of a best response is untrained, "
        "so that nothing responds: pass the `state` of a trained one, or train it (`steps`, `tx`)."
    ),
    Status.nonfinite_input: (
        "The outer gradient or the inner gradient is NaN or infinite before any solve: look at "
        "the batches, the parameters and the hyperparameters."
    ),
    Status.nonfinite_output: (
        "Losses and gradients were finite but the hypergradient is not: a product overflowed, "
        "or a second derivative is undefined at this point (a square root or a norm at zero)."
    ),
}


class HypergradientError(RuntimeError):
    """Raised by :func:`raise_for_status`; ``status`` and ``stats`` hold the evidence."""

    def __init__(self, message: str, status: Status, stats: dict[str, Any]):
        super().__init__(message)
        self.status = status
        self.stats = stats


def code(status: Status) -> jax.Array:
    """The status as an int32 scalar."""
    return jnp.asarray(int(status), jnp.int32)


def status_of(otherwise: Any, *failures: tuple[Any, Status]) -> jax.Array:
    """The first failure whose condition holds, else ``otherwise`` (a status or an array)."""
    result = jnp.asarray(otherwise, jnp.int32)
    for condition, status in reversed(failures):
        result = jnp.where(condition, code(status), result)
    return result


FAILED = (
    Status.singular,
    Status.negative_curvature,
    Status.diverged,
    Status.invalid_setting,
)
"""What makes a derivative NaN where no status can be returned beside it."""


def failed(result: jax.Array) -> jax.Array:
    """Whether a solve failed in a way that makes its value no answer at all, elementwise."""
    return functools.reduce(jnp.logical_or, (result == int(status) for status in FAILED))


def worst(*results: jax.Array) -> jax.Array:
    """The most severe of several results, elementwise."""
    combined = results[0]
    for result in results[1:]:
        combined = jnp.maximum(combined, result)
    return combined


def raise_for_status(
    solution: Any, *, residual: float | None = None, stationarity: float | None = None
) -> None:
    """Raise :class:`HypergradientError` on the host unless ``solution.result`` is ``ok``.

    Args:
      solution: anything with ``result`` (int32, any shape: a vmapped solve has one per lane)
        and ``stats``, such as the record of ``hypergrad_solve`` or of a linear solver.
      residual: largest ``residual_norm / rhs_norm`` to accept. ``None`` leaves the judgement to
        the status (a tenth, or the solver's tolerance); a number replaces it: a larger one
        accepts a ``truncated`` or ``max_steps`` solve, a smaller one refuses an ``ok`` one.
      stationarity: largest ``relative_stationarity`` to accept, likewise (``None``: 0.05, and
        the same for ``predicted_change`` relative to the outer loss); a number accepts
        ``not_stationary`` up to it.

    Raises:
      HypergradientError: names the most severe status, how many lanes have it, its causes and
        remedies, and the numbers in ``stats`` at that lane.
      TypeError: if called inside ``jit`` (``result`` is not concrete there).
      ValueError: a threshold for a number that ``stats`` does not have.
    """
    if not hasattr(solution, "result") or not hasattr(solution, "stats"):
        raise TypeError(
            "`solution` must be what `hypergrad_solve` or a solver returned, with `result` and "
            f"`stats`, got {type(solution).__name__}."
        )
    if isinstance(solution.result, Tracer):
        raise TypeError(
            "raise_for_status needs concrete values: call it on the result of a jitted function, "
            "not inside one. Inside, read `solution.result` and `solution.stats`."
        )
    results = np.atleast_1d(np.asarray(solution.result))
    if residual is not None:
        check_number("residual", residual)
        check_real("residual", residual, 0)
        left = _stat(solution, "residual_norm", "residual")
        right = _stat(solution, "rhs_norm", "residual")
        results = _judged(results, ~(left <= residual * right), Status.truncated, Status.max_steps)
    if stationarity is not None:
        check_number("stationarity", stationarity)
        check_real("stationarity", stationarity, 0)
        distance = _stat(solution, "relative_stationarity", "stationarity")
        results = _judged(results, ~(distance <= stationarity), Status.not_stationary)
    status = Status(int(results.max()))
    if status == Status.ok:
        return
    lane = int(results.ravel().argmax())
    stats = {k: float(_lane(v, lane, results.shape)) for k, v in solution.stats.items()}
    numbers = ", ".join(f"{k}={v:.4g}" for k, v in sorted(stats.items()))
    where = "" if results.size == 1 else f" in {int((results == status).sum())} of {results.size}"
    raise HypergradientError(f"{status.name}{where}: {MESSAGES[status]} ({numbers})", status, stats)


def _stat(solution: Any, name: str, threshold: str) -> np.ndarray:
    if name not in solution.stats:
        raise ValueError(
            f"`{threshold}` judges `stats[{name!r}]`, which this result does not have: leave it "
            "out."
        )
    return np.atleast_1d(np.asarray(solution.stats[name], np.float64))


def _judged(results: np.ndarray, beyond: np.ndarray, *statuses: Status) -> np.ndarray:
    """``results`` with the caller's own judgement in place of ``statuses``."""
    results = np.where(np.isin(results, statuses), Status.ok, results)
    return np.where((results < statuses[0]) & beyond, statuses[0], results)


def _lane(value: Any, lane: int, shape: tuple[int, ...]) -> Any:
    array = np.asarray(value)
    return array.ravel()[lane] if array.shape == shape and array.ndim else array.ravel()[0]
