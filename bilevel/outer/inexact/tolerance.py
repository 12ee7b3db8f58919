"""How tightly the solves of an outer step are made: a tolerance that falls with the steps made."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Scalar
from bilevel.ground.settings import check_one_real, check_takes, concrete, is_function

Schedule = Callable[[Any], Any]

FACTORS: dict[str, Schedule] = {
    "exponential": lambda k: 0.9**k,
    "quadratic": lambda k: 1 / (k + 1.0) ** 2,
    "cubic": lambda k: 1 / (k + 1.0) ** 3,
}
"""By name, what the first tolerance is multiplied with in step k."""

PROBED = (0, 1, 10, 100)
"""Steps at which a schedule of the user's own is asked whether it falls."""

ROUNDING = 32
"""Units of rounding below which no relative tolerance is asked for."""


def schedule_of(tol: Any, first_tol: float) -> Schedule:
    """The tolerance as a function of the step, from a name, a function or a fixed number."""
    if isinstance(tol, str):
        if tol not in FACTORS:
            raise ValueError(
                f"`tol` must be one of {', '.join(FACTORS)}, a function step -> tolerance, or a "
                f"number, got {tol!r}."
            )
        return lambda k: first_tol * FACTORS[tol](k)
    if is_function(tol):
        check_takes("tol", tol, "tol(step)")
        _check_falls(tol)
        return tol
    check_one_real("tol", tol, 0, strict=True)
    return lambda k: jnp.asarray(tol)


def _check_falls(tol: Schedule) -> None:
    """Refuse a function that does not fall: its errors would never vanish."""
    values = [tol(jnp.asarray(k, jnp.int32)) for k in PROBED]
    for value in values:
        check_one_real("tol(step)", value, 0)
    if not all(concrete(value) for value in values):
        return
    numbers = [float(value) for value in values]
    if numbers[0] <= 0 or any(b >= a for a, b in zip(numbers, numbers[1:], strict=False) if a):
        listed = ", ".join(f"{k}: {x:g}" for k, x in zip(PROBED, numbers, strict=True))
        raise ValueError(
            f"`tol` must be positive and fall with the step, but its values are ({listed}): the "
            "hyperparameters converge only if the tolerances have a finite sum, such as "
            "`lambda step: 1e-3 * 0.9**step`. For solves of one accuracy pass a number."
        )


def at_step(schedule: Schedule, step: jax.Array, factor: Scalar) -> Scalar:
    """The tolerance of a step, in the dtype of ``factor``, which it is multiplied with."""
    least = ROUNDING * jnp.finfo(factor.dtype).eps
    return jnp.maximum(jnp.asarray(schedule(step)).astype(factor.dtype) * factor, least)
