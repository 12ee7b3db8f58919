"""What became of a hypergradient: codes that live in arrays, and the words for them.

A status never changes a number. Solvers and responses return it beside their value as an
int32 scalar (so it maps, scans and donates), and :func:`raise_for_status` turns it into an
exception on the host, with the numbers that tell cause and remedy.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class Status(enum.IntEnum):
    """Outcome of a solve or of a whole hypergradient, ordered by gravity."""

    ok = 0
    max_steps = 1
    stagnated = 2
    negative_curvature = 3
    diverged = 4
    nonfinite_input = 5
    nonfinite_output = 6


MESSAGES: dict[Status, str] = {
    Status.ok: "The hypergradient was computed as asked.",
    Status.max_steps: (
        "The linear solve spent its budget before it met its tolerance. Raise `max_steps`, "
        "loosen `rtol`/`atol`, add `damping`, use `CG(preconditioner=Diagonal())`, or drop the "
        "tolerances if a fixed budget is what you want."
    ),
    Status.stagnated: (
        "The solver's own recurrence claims convergence but the recomputed residual does not: "
        "rounding has taken over. Use float64, loosen the tolerance, or add `damping`."
    ),
    Status.negative_curvature: (
        "The operator is not positive definite: a direction of non-positive curvature was met "
        "and the last good iterate returned. Train the inner problem further, use "
        "`GaussNewton(...)` instead of `Hessian()`, or set `damping` above minus "
        "`min_curvature`."
    ),
    Status.diverged: (
        "The series grows instead of shrinking: some eigenvalue of the operator is negative or "
        "above 2/step_size. Use a smaller `step_size` (or `None` to estimate it), `damping`, or "
        "`GaussNewton(...)`."
    ),
    Status.nonfinite_input: (
        "The outer gradient or the inner gradient is NaN or infinite before any solve: look at "
        "the batches, the parameters and the hyperparameters."
    ),
    Status.nonfinite_output: (
        "Losses and gradients were finite but the hypergradient is not: a product overflowed, "
        "or a second derivative is undefined at this point (a square root or a norm at zero). "
        "Unrolling Adam or another optimizer that divides by the root of a second moment, where "
        "a gradient is exactly zero (a dead unit, a constant input), is the usual case: give it "
        "`eps_root`, for example `optax.adam(lr, eps_root=1e-16)`."
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


def worst(*results: jax.Array) -> jax.Array:
    """The gravest of several results, elementwise."""
    combined = results[0]
    for result in results[1:]:
        combined = jnp.maximum(combined, result)
    return combined


def raise_for_status(solution: Any) -> None:
    """Raise :class:`HypergradientError` on the host unless ``solution.result`` is ``ok``.

    Args:
      solution: anything with ``result`` (int32, any shape: a vmapped solve has one per lane)
        and ``stats``, such as the record of ``hypergrad_solve`` or of a linear solver.

    Raises:
      HypergradientError: names the gravest status, how many lanes have it, its causes and
        remedies, and the numbers in ``stats`` at that lane.
      TypeError: if called inside ``jit`` (``result`` is not concrete there).
    """
    if isinstance(solution.result, Tracer):
        raise TypeError(
            "raise_for_status needs concrete values: call it on the result of a jitted function, "
            "not inside one. Inside, read `solution.result` and `solution.stats`."
        )
    results = np.atleast_1d(np.asarray(solution.result))
    status = Status(int(results.max()))
    if status == Status.ok:
        return
    lane = int(results.ravel().argmax())
    stats = {k: float(_lane(v, lane, results.shape)) for k, v in solution.stats.items()}
    numbers = ", ".join(f"{k}={v:.4g}" for k, v in sorted(stats.items()))
    where = "" if results.size == 1 else f" in {int((results == status).sum())} of {results.size}"
    raise HypergradientError(f"{status.name}{where}: {MESSAGES[status]} ({numbers})", status, stats)


def _lane(value: Any, lane: int, shape: tuple[int, ...]) -> Any:
    array = np.asarray(value)
    return array.ravel()[lane] if array.shape == shape and array.ndim else array.ravel()[0]
