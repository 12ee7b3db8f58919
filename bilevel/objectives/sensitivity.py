r"""How a fit follows the data it is fitted to: products with :math:`J = ∂\hat y/∂y`.

Either of a function :math:`y ↦ \hat y` that JAX can push tangents through, or of the solution
of an inner problem, by the implicit function theorem at the parameters an outer loss is asked at.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Params
from bilevel.ground.settings import check_takes, is_function
from bilevel.hypergradient.attach import differentiates_fully, tangent_in_data
from bilevel.hypergradient.rules import data_of
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner_problem

Push = Callable[[jax.Array], jax.Array]
"""Maps a direction of the observations to that of the fit, :math:`v \\mapsto J v`."""


def observations(batch: Batch) -> jax.Array:
    """The observations in a batch: its last leaf, ``y`` of ``(x, y)``."""
    return jax.tree.leaves(batch)[-1]


def push_function(estimate: Callable[[jax.Array], jax.Array], y: jax.Array) -> tuple[Any, Push]:
    r"""``(\hat y, v -> J v)`` of a function of the observations."""
    if not is_function(estimate):
        raise TypeError(f"`estimate` must be a function estimate(y) -> fit, got {estimate!r}.")
    y = checked_observations(y, "y")
    fit, push = jax.linearize(estimate, y)
    check_fit(fit, y, "estimate")
    return fit, push


def push_solution(
    inner: Any,  # a loss, or a condition
    predict: Callable[..., jax.Array],
    observed: Callable[[Batch], jax.Array],
    response: Any,
    params: Params,
    hparams: Hparams,
    batch: Batch,
) -> tuple[jax.Array, jax.Array, Push]:
    r"""``(y, \hat y, v -> J v)`` of the fit at ``params``, as a function of all three arguments.

    The implicit function theorem holds at a solution; elsewhere it is the formula at that point,
    and is differentiated as such.
    """
    problem = Problem(inner, inner)
    y, place = jax.vjp(observed, batch)
    y = checked_observations(y, "the result of `observed`")
    fit, push = jax.linearize(lambda w, b: predict(w, hparams, b), params, batch)
    check_fit(fit, y, "predict")

    def pushed(v: jax.Array) -> jax.Array:
        # `observed` selects, and the transpose of a selection puts back.
        (moved,) = place(v)
        data = data_of(batch, jax.tree.leaves(moved))
        w_dot = tangent_in_data(problem, response, params, hparams, batch, data)
        return push(w_dot, moved)

    return y, fit, pushed


def check_solution(inner: Any, predict: Any, observed: Any, response: Any) -> None:
    """Refuse what :func:`push_solution` cannot use; without both functions it is not used."""
    if (predict is None) != (inner is None):
        raise ValueError(
            "`predict` and `inner` go together: pass both for `outer`, or none for "
            "`risk(estimate, y)`."
        )
    if predict is None:
        return
    check_inner_problem(inner)
    check_takes("predict", predict, "predict(params, hparams, batch)")
    check_takes("observed", observed, "observed(batch)")
    if not differentiates_fully(response):
        raise ValueError(
            f"`response` is {response!r}, but how a solution follows its data is asked of an "
            "`Implicit(...)` with one fixed batch: pass `Implicit(Dense())` or "
            "`Implicit(CG(...))`, or give the solver itself, differentiable, to "
            "`risk(estimate, y)`."
        )


def checked_observations(y: Any, name: str) -> jax.Array:
    """Observations as one array of real floating-point numbers."""
    if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be one array of real floating-point numbers, the observations, got "
            f"{getattr(y, 'dtype', type(y).__name__)}: a derivative is taken in them."
        )
    return jnp.asarray(y)


def check_fit(fit: Any, y: jax.Array, name: str) -> None:
    """Refuse a fit that is not shaped like the observations."""
    if not hasattr(fit, "shape") or fit.shape != y.shape:
        got = getattr(fit, "shape", jax.tree.structure(fit))
        raise ValueError(
            f"`{name}` returned shape {got}, expected that of the observations, {y.shape}: it "
            "gives the fitted value of each of them."
        )


def matrix_of(push: Push, y: jax.Array) -> jax.Array:
    r"""J as an n x n matrix, for n observations: n products."""
    basis = jnp.eye(y.size, dtype=y.dtype).reshape(-1, *y.shape)
    return jax.vmap(push)(basis).reshape(y.size, y.size).T


def probes_like(y: jax.Array, count: int, seed: int) -> jax.Array:
    """``count`` random signs for each observation, the same in every call."""
    return jax.random.rademacher(jax.random.key(seed), (count, *y.shape), y.dtype)
