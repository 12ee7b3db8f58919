r"""``check_hypergrad``: a hypergradient against differences of the re-solved inner problem."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Vector
from bilevel.ground.batches import check_batch
from bilevel.ground.keys import check_key
from bilevel.ground.settings import (
    check_count,
    check_flag,
    check_one_real,
    check_takes,
    is_function,
)
from bilevel.ground.status import Status
from bilevel.hypergradient.base import Response, no_loss
from bilevel.hypergradient.transform import hypergrad_solve
from bilevel.hypergradient.unroll_map import UnrollMap
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.problem.conditions import Condition
from bilevel.problem.operators.hessian import Hessian
from bilevel.problem.operators.jacobian import Jacobian
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner_problem, check_losses, check_point, check_response

NEWTON_STEPS = 50
LINE_SEARCH = 25


@dataclasses.dataclass(frozen=True)
class HypergradCheck:
    r"""What :func:`check_hypergrad` found, one entry per direction; the gradient's own is first.

    Attributes:
      derivatives: :math:`⟨d, hypergrad⟩`.
      differences: central differences of :math:`F` along :math:`d`.
      errors: relative, ``|derivatives - differences|`` over the larger of the two, and of
        the root mean square derivative in a random direction.
      noise: what rounding and the unfinished re-solves alone can contribute to ``errors``.
      step: the half-width of the differences, in units of the hyperparameters.
      stationarity: :math:`‖∇_w h‖` where the hypergradient was evaluated, and the largest
        one after a re-solve.
      distance: from ``params`` to the re-solved parameters, relative to the longer of the two.
      status: that of the hypergradient itself, as ``hypergrad_solve`` reports it.
      residual: relative residual of its linear solve, or None where it makes none.
      converged: every re-solve left less noise than ``tolerance``.
      passed: ``converged``, and every error is below ``tolerance`` plus its noise.
      tolerance: the one asked for.
      message: one sentence.
    """

    derivatives: np.ndarray
    differences: np.ndarray
    errors: np.ndarray
    noise: np.ndarray
    step: float
    stationarity: tuple[float, float]
    distance: float
    status: Status
    residual: float | None
    converged: bool
    passed: bool
    tolerance: float
    message: str


def check_hypergrad(
    outer: Loss,
    inner: Loss | Condition | None,
    response: Response,
    params: Params,
    hparams: Hparams,
    *,
    inner_batch: Batch,
    outer_batch: Batch,
    solve: Callable[[Params, Hparams, Batch], Params] | None = None,
    directions: int = 3,
    key: Key | None = None,
    step: float | None = None,
    tolerance: float | None = None,
    resolve_first: bool = False,
    has_aux: bool = False,
    has_state: bool = False,
    model_state: ModelState = None,
) -> HypergradCheck:
    r"""Compare ``hypergrad`` with

    .. math:: \frac{F(λ + s d) - F(λ - s d)}{2 s},
        F(λ) = f(w^*(λ), λ)

    where :math:`w^*` is solved anew on both sides, along the hypergradient's own direction and
    ``directions`` - 1 random ones.

    Args:
      outer, inner, response, params, hparams, inner_batch, outer_batch: as for
        :func:`~bilevel.hypergrad`. The hypergradient is evaluated at ``params``.
      solve: ``solve(params, hparams, inner_batch) -> params``, your own solver, to rounding
        error. By default Newton's method with CG and a line search, jitted, from ``params``; the
        steps of an :class:`~bilevel.UnrollMap`.
      directions: how many.
      key: of the random directions; also handed to ``response``. Fixed by default.
      step: s, for directions of length one; by default :math:`ϵ^{1/3}max(1,
        ‖λ‖)`, the best compromise between rounding and curvature.
      tolerance: relative; 1e-4 in float64 and 5e-2 in float32 by default.
      resolve_first: evaluate the hypergradient at the re-solved parameters instead, to tell a
        wrong response from parameters that are not at a minimum.
      has_aux, has_state, model_state: as for :func:`~bilevel.hypergrad`; the re-solves read
        ``model_state`` frozen, as the hypergradient does.

    Returns:
      :class:`HypergradCheck`. A re-solve that did not converge is never passed over: then
      ``converged`` and ``passed`` are False and the message says how much noise it left, as
      estimated by :math:`|∇_w fᵀ H^{-1}∇_w h|`.

    Raises:
      ValueError: for a ``step`` so small that the differences would be rounding error
        (below :math:`\sqrt ϵ max(1, ‖λ‖)`), and what ``hypergrad`` raises.

    Cost: one hypergradient and ``2 * directions + 1`` inner solves. A tool for tests and for the
    host: not for use under ``jit``. Give your own ``solve`` for networks with convolutions on
    CPU, where the default one's loops are slow. For non-convex problems it follows the minimum that
    Newton's method finds from ``params``: look at ``distance``.
    """
    runs = isinstance(response, UnrollMap)
    if runs:  # what it returns depends on the start, and there is no minimum to be found
        inner, resolve_first = no_loss, False
        solve = jax.jit(response.run) if solve is None else solve
    _check_arguments(outer, inner, response, params, hparams, inner_batch, outer_batch, solve, key)
    check_count("directions", directions)
    for name, flag in (
        ("resolve_first", resolve_first), ("has_aux", has_aux), ("has_state", has_state),
    ):  # fmt: skip
        check_flag(name, flag)
    check_inner_problem(inner, has_state)
    for name, given in (("step", step), ("tolerance", tolerance)):
        if given is not None:
            check_one_real(name, given, 0, strict=True)
    half, eps = _half_width(step, params, hparams)
    tolerance = (5e-2 if eps > 1e-10 else 1e-4) if tolerance is None else tolerance
    key = jax.random.key(0) if key is None else key
    losses = _Losses(outer, inner, has_aux, has_state)

    def value(lam: Hparams, start: Params) -> tuple[_Value, Params]:
        if solve is None:
            w = _newton(losses, start, lam, inner_batch, model_state)
        else:
            w = solve(params if runs else start, lam, inner_batch)
        return _evaluate(losses, w, lam, inner_batch, outer_batch, model_state), w

    here, w = value(hparams, params)
    longer = jnp.maximum(tree.norm(params), tree.norm(w))
    distance = float(tree.norm(tree.sub(w, params)) / jnp.where(longer > 0, longer, 1))
    found = _analytic(
        losses, response, w if resolve_first else params, hparams, inner_batch, outer_batch,
        model_state, key,
    )  # fmt: skip
    grads, length = found.grads, float(tree.norm(found.grads))
    typical = length / np.sqrt(tree.size(hparams))

    derivatives, differences, noise, worst = [], [], [], float(here.stationarity)
    for i in range(directions):
        d = grads
        if i or not (np.isfinite(length) and length > 0):
            d = tree.random_like(jax.random.fold_in(key, i), hparams, jax.random.normal)
        d = tree.scale(1 / tree.norm(d), d)
        above, _ = value(tree.cast_like(tree.axpy(half, d, hparams), hparams), w)
        below, _ = value(tree.cast_like(tree.axpy(-half, d, hparams), hparams), w)
        derivatives.append(float(tree.vdot(d, grads)))
        differences.append((float(above.value) - float(below.value)) / (2 * half))
        rounding = 4 * eps * max(abs(float(above.value)), abs(float(below.value)))
        unsolved = float(above.unsolved) + float(below.unsolved)
        noise.append((rounding + unsolved) / (2 * half))
        worst = max(worst, float(above.stationarity), float(below.stationarity))

    a, b = np.array(derivatives), np.array(differences)
    size = np.maximum(np.maximum(np.abs(a), np.abs(b)), max(typical, 1e-30))
    errors, noise = np.abs(a - b) / size, np.array(noise) / size
    converged = bool(np.all(noise <= tolerance))  # False for NaN
    check = HypergradCheck(
        derivatives=a,
        differences=b,
        errors=errors,
        noise=noise,
        step=half,
        stationarity=(float(found.stationarity), worst),
        distance=distance,
        status=Status(int(found.result)),
        residual=None if found.residual is None else float(found.residual),
        converged=converged,
        passed=converged and bool(np.all(errors <= tolerance + noise)),
        tolerance=tolerance,
        message="",
    )
    return dataclasses.replace(check, message=_message(check, response))


def _check_arguments(
    outer: Any, inner: Any, response: Any, params: Any, hparams: Any, inner_batch: Any,
    outer_batch: Any, solve: Any, key: Any,
) -> None:  # fmt: skip
    check_losses(outer=outer)
    check_inner_problem(inner)
    check_response(response)
    check_point(params, hparams)
    check_batch(inner_batch, "inner_batch")
    check_batch(outer_batch, "outer_batch")
    check_key(key)
    for path, leaf in (*tree.paths(params, "params"), *tree.paths(hparams, "hparams")):
        if not jnp.all(jnp.isfinite(leaf)):
            raise ValueError(
                f"{path} is not finite, where no difference can be taken: pass finite numbers."
            )
    if solve is not None:
        if not is_function(solve):
            raise TypeError(
                f"`solve` must be a function solve(params, hparams, batch), got {solve!r}."
            )
        check_takes("solve", solve, "solve(params, hparams, batch)")


def _half_width(step: float | None, params: Params, hparams: Hparams) -> tuple[float, float]:
    """The half-width of the differences, and the spacing of the numbers they are made of."""
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params), *jax.tree.leaves(hparams))
    eps = float(jnp.finfo(dtype).eps)
    scale = max(1.0, float(tree.norm(hparams)))
    half = float(eps ** (1 / 3) * scale if step is None else step)
    if half < np.sqrt(eps) * scale:
        raise ValueError(
            f"`step`={half:.1e} is below {np.sqrt(eps) * scale:.1e}, where differences in {dtype} "
            "are rounding error: use a larger step (`None` chooses one), or float64 "
            "(`jax.config.update('jax_enable_x64', True)` and float64 inputs)."
        )
    return half, eps


def _message(check: HypergradCheck, response: Any) -> str:
    if check.passed:
        return f"The hypergradient agrees to {check.errors.max():.1e}."
    if not check.converged:
        return (
            f"Inconclusive: rounding and unfinished inner solves leave noise of "
            f"{check.noise.max():.1e}, above the tolerance {check.tolerance:.1e}. Give `solve` a "
            "solver that goes to rounding error, use float64, or a larger `step`."
        )
    said = (
        f"The hypergradient is off by {check.errors.max():.1e} (tolerance {check.tolerance:.1e})."
    )
    if check.residual is not None and not check.residual <= check.tolerance:
        solver = getattr(response, "solver", response)
        steps = getattr(solver, "max_steps", None)
        remedy = "solve more accurately" if steps is None else f"raise its `max_steps`={steps}"
        said += (
            f" Its linear solve left {check.residual:.1e} of the right side (status "
            f"{check.status.name}) with {solver!r}: {remedy}, before the parameters are blamed."
        )
    elif check.status != Status.ok:
        said += f" Its status is {check.status.name}."
    return said + (
        f" The inner gradient's norm is {check.stationarity[0]:.1e} at its point and "
        f"{check.stationarity[1]:.1e} after the re-solves; `resolve_first=True` tells a wrong "
        "response from parameters that are not at a minimum."
    )


class _Losses(NamedTuple):
    """The static part of the problem: one compilation per pair of losses."""

    outer: Loss
    inner: Any
    has_aux: bool
    has_state: bool

    def problem(self, model_state: ModelState) -> Problem:
        return Problem(
            self.outer, self.inner, self.has_aux, self.has_state, model_state=model_state
        )


class _Analytic(NamedTuple):
    grads: Hparams
    stationarity: Any
    result: jax.Array
    residual: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def _analytic(
    losses: _Losses, response: Any, w: Params, lam: Hparams, inner_batch: Batch,
    outer_batch: Batch, model_state: ModelState, key: Key,
) -> _Analytic:  # fmt: skip
    """The hypergradient under test, with what it says about itself."""
    solution = hypergrad_solve(
        losses.outer, losses.inner, response, w, lam,
        inner_batch=inner_batch, outer_batch=outer_batch, key=key, has_aux=losses.has_aux,
        has_state=losses.has_state, model_state=model_state,
    )  # fmt: skip
    stats, residual = solution.stats, None
    if "residual_norm" in stats and "rhs_norm" in stats:
        scale = stats["rhs_norm"]
        residual = stats["residual_norm"] / jnp.where(scale == 0, 1, scale)
    return _Analytic(solution.grads, stats.get("stationarity", jnp.nan), solution.result, residual)


class _Value(NamedTuple):
    value: jax.Array
    stationarity: jax.Array
    unsolved: jax.Array


# Compiled once for a pair of losses, not once a call.
@functools.partial(jax.jit, static_argnums=0)
def _evaluate(
    losses: _Losses,
    w: Params,
    hparams: Hparams,
    inner_batch: Batch,
    outer_batch: Batch,
    model_state: ModelState,
) -> _Value:
    """The outer value, the inner gradient's norm, and what the latter can do to the former."""
    problem = losses.problem(model_state)
    value, pull = jax.vjp(lambda w: problem.outer_loss(w, hparams, outer_batch)[0], w)
    gradient, direction, _ = _newton_direction(problem, w, hparams, inner_batch)
    slope = tree.vdot(pull(jnp.ones_like(value))[0], direction)
    return _Value(value, tree.norm(gradient), jnp.abs(slope))


def _newton_direction(
    problem: Problem, w: Params, hparams: Hparams, batch: Batch
) -> tuple[Vector, Vector, jax.Array]:
    r"""``(\nabla h, p, p' \nabla h)`` with :math:`p ≈ -H^{-1}∇h`, which descends.

    For a condition :math:`(R, -A^{-1}R, -‖R‖^2)`, the slope of :math:`½ ‖R‖^2`.
    """
    if not problem.has_loss:
        residual, mv = Jacobian().bind(problem, w, hparams, batch, fresh=False)
        p = tree.scale(-1, Dense().solve(mv.transposed(), residual, certify=False).value)
        return residual, p, -tree.vdot(residual, residual)
    gradient, mv = Hessian().bind(problem, w, hparams, batch, fresh=False)
    gradient = tree.accumulate(gradient)
    p = tree.scale(-1, CG(max_steps=200, rtol=1e-3).solve(mv, gradient, certify=False).value)
    slope = tree.vdot(p, gradient)
    descends = slope < 0  # CG stops at zero where the first curvature is not positive
    p = tree.where(descends, p, tree.scale(-1, gradient))
    return gradient, p, jnp.where(descends, slope, -tree.vdot(gradient, gradient))


@functools.partial(jax.jit, static_argnums=0)
def _newton(
    losses: _Losses, params: Params, hparams: Hparams, batch: Batch, model_state: ModelState
) -> Params:
    """Newton-CG with a backtracking line search, until no step lowers the gradient or the loss."""
    problem = losses.problem(model_state)

    def merit(w: Params) -> tuple[jax.Array, Vector]:
        """What a step must lower, and what must vanish."""
        if problem.has_loss:
            return jax.value_and_grad(problem.inner_loss)(w, hparams, batch)
        residual = problem.condition(w, hparams, batch)
        return 0.5 * tree.vdot(residual, residual), residual

    def advance(carry):
        w, step, _ = carry
        gradient, p, slope = _newton_direction(problem, w, hparams, batch)
        here, size = merit(w)[0], tree.norm(gradient)

        def moved(t):
            return tree.cast_like(tree.axpy(t, p, tree.accumulate(w)), w)

        def good(t):
            value, gradient = merit(moved(t))
            # Near the minimum the loss no longer resolves a decrease; the gradient still does.
            flat = jnp.abs(slope) <= 100 * jnp.finfo(size.dtype).eps * (1 + jnp.abs(here))
            return jnp.where(flat, tree.norm(gradient) < size, value <= here + 1e-4 * t * slope)

        t, tries = jax.lax.while_loop(
            lambda c: (c[1] < LINE_SEARCH) & ~good(c[0]),
            lambda c: (c[0] / 2, c[1] + 1),
            (jnp.ones_like(size), 0),
        )
        moves = tries < LINE_SEARCH
        return tree.where(moves, moved(t), w), step + 1, ~moves

    start = (params, 0, jnp.asarray(False))
    return jax.lax.while_loop(lambda c: (c[1] < NEWTON_STEPS) & ~c[2], advance, start)[0]
