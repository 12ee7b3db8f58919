r"""The inner problem solved to a tolerance: L-BFGS, or accelerated (proximal) gradient steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar, Stats
from bilevel.ground.batches import check_batch
from bilevel.ground.loops import strong_types
from bilevel.ground.settings import (
    check_count,
    check_one_real,
    check_takes,
    concrete,
    is_function,
)
from bilevel.ground.status import Status, status_of
from bilevel.inner.optimistix import minimised
from bilevel.inner.searches import Search, accelerated, lbfgs, proximal
from bilevel.problem.conditions import Composite, Prox
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner, check_losses, check_point, check_prox


class Minimum(NamedTuple):
    r"""What :func:`minimize` found.

    Attributes:
      params: the last iterate.
      result: int32 :class:`~bilevel.Status`: ``ok``, ``max_steps``, ``stagnated`` (a step that no
        longer moves anything, at the level of rounding), ``nonfinite_output``.
      stats: ``stationarity``, the norm that was to fall below the tolerance; ``tol``; ``value``,
        the (smooth) loss; ``num_steps``; ``num_gradients``, inner gradients evaluated.
    """

    params: Params
    result: jax.Array
    stats: Stats


def minimize(
    inner: Loss | Composite,
    params: Params,
    hparams: Hparams,
    batch: Batch,
    *,
    tol: float | jax.Array | None = None,
    max_steps: int = 1000,
    prox: Prox | None = None,
    curvatures: tuple[Any, Any] | None = None,
    solver: Any = None,
) -> Minimum:
    r"""A minimum of a deterministic, smooth inner loss, for the user without a training loop.

    .. math:: ‖∇_w h(w, λ)‖ ≤ tol  \text{or, with a proximal operator,}
        1/s ‖w - prox_{s r}(w - s∇_w h(w))‖
            ≤ tol

    Without ``prox`` by L-BFGS with a zoom line search (optax), or by ``solver``. With it by
    accelerated proximal gradient steps, whose momentum starts anew where it points uphill. Their
    length s begins with the ``step_size`` of a ``Composite``, or else is doubled or halved until
    it fits; after that it grows by a tenth with every step and is halved where it is too long.
    Values of the loss decide, which cost no gradient, as far as rounding lets them.

    With ``curvatures`` :math:`(μ, L)` by Nesterov's accelerated gradient steps of length
    :math:`1/L`, whose momentum is that of a loss whose Hessian has all eigenvalues between the two:
    one gradient per step and no search, and from :math:`‖∇h‖ = δ` to tol in about
    :math:`\sqrt{L/μ} log(δ L/(μ tol))` steps.

    Args:
      inner: the smooth part h, ``loss(params, hparams, batch) -> scalar``; or a
        :class:`~bilevel.Composite`, which has a proximal operator with it.
      params: the start; a warm one saves most of the work in a loop.
      hparams, batch: passed to the loss.
      tol: absolute; may be traced (an outer method that tightens it). ``None``:
        :math:`\sqrt ϵ max(1, ‖∇h(w_0)‖)`.
      max_steps: most steps.
      prox: ``prox(params, hparams, step_size) -> params``, of the part r that is not smooth:
        soft-thresholding for L1, a projection for a constraint.
      curvatures: :math:`(μ, L)`, numbers that may be traced, :math:`0 ≤ μ ≤ L`. An L that
        is too small makes the steps diverge; a :math:`μ` that is too large makes them slow.
      solver: a minimizer of optimistix (extra ``optimistix``) in place of L-BFGS, such as
        ``optimistix.BFGS(rtol=1e-8, atol=1e-8)``. Its own tolerances and ``max_steps`` end it;
        ``tol`` judges what it returns. ``stats`` has no ``num_gradients``, which it does not tell.
        Not on a mesh with explicit axes, which optimistix does not know.

    Returns:
      :class:`Minimum`. It is not differentiated: pass its ``params`` to ``hypergrad``, or call it
      in the ``solve`` of ``with_response``; with ``prox`` the condition is
      ``Composite(inner, prox)``.

    Raises:
      TypeError, ValueError: at trace time, for trees, dtypes, functions and settings that do not
        fit.

    Cost: ``num_gradients`` inner gradients; L-BFGS keeps twenty vectors, the others four. On
    parameters that an explicit mesh divides L-BFGS takes one more gradient per step.

    Reference: Nocedal and Wright, "Numerical Optimization", 2006, Algorithm 7.5; Beck and Teboulle,
    "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sciences 2009; O'Donoghue
    and Candes, "Adaptive restart for accelerated gradient schemes", 2015; Chambolle and Pock, "An
    introduction to continuous optimization for imaging", Acta Numerica 2016, Algorithm 5.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> def loss(w, lam, y):
      ...     return 0.5 * jnp.sum((w - y) ** 2)
      >>> def soft(w, lam, step):
      ...     return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * lam, 0)
      >>> y = jnp.array([2.0, 0.3])
      >>> bool(jnp.allclose(bilevel.minimize(loss, jnp.zeros(2), 0.5, y).params, y))
      True
      >>> found = bilevel.minimize(loss, jnp.zeros(2), 0.5, y, prox=soft)
      >>> bool(jnp.allclose(found.params, jnp.array([1.5, 0.0]))), int(found.result)
      (True, 0)
    """
    first = None
    if isinstance(inner, Composite):
        if prox is not None:
            raise ValueError("`prox` is given twice: leave it out where `inner` is a `Composite`.")
        inner, prox, first = inner.loss, inner.prox, inner.step_size
    check_losses(inner=inner)
    check_point(params, hparams)
    check_batch(batch, "batch")
    check_count("max_steps", max_steps)
    if tol is not None:
        check_one_real("tol", tol, 0)
    problem = Problem(inner, inner)
    check_inner(problem, params, hparams, batch)
    params = strong_types(jax.tree.map(jnp.asarray, params))

    def loss(w: Params) -> Scalar:
        return problem.inner_loss(w, hparams, batch)

    if solver is not None:
        if prox is not None or curvatures is not None:
            raise ValueError(
                "`solver` minimizes a smooth loss and finds its own steps: leave out `prox` and "
                "`curvatures`, and pass the smooth loss as `inner`."
            )
        return _judged(loss, params, solver, tol, max_steps)
    if curvatures is not None:
        _check_curvatures(curvatures, prox)
        start, advance = accelerated(loss, params, *curvatures)
    elif prox is None:
        start, advance = lbfgs(loss, params)
    else:
        if not is_function(prox):
            raise TypeError(f"`prox` must be a function prox(params, hparams, step), got {prox!r}.")
        check_takes("prox", prox, "prox(params, hparams, step_size)")
        check_prox(prox, params, hparams)
        start, advance = proximal(loss, params, lambda w, s: prox(w, hparams, s), first)
    bound = _bound(start.size, tol)

    def goes_on(search: Search) -> jax.Array:
        return (search.steps < max_steps) & (search.size > bound) & ~search.stuck

    end = jax.lax.while_loop(goes_on, advance, start)
    result = status_of(
        Status.ok,
        (~(jnp.isfinite(end.size) & tree.all_finite(end.params)), Status.nonfinite_output),
        (end.size <= bound, Status.ok),
        (end.stuck, Status.stagnated),
        (jnp.asarray(True), Status.max_steps),
    )
    stats = {
        "stationarity": end.size,
        "tol": bound,
        "value": end.value,
        "num_steps": end.steps,
        "num_gradients": end.gradients,
    }
    return Minimum(end.params, result, stats)


def _bound(size: Scalar, tol: float | jax.Array | None) -> Scalar:
    eps = jnp.finfo(size.dtype).eps
    bound = jnp.sqrt(eps) * jnp.maximum(1, size) if tol is None else jnp.asarray(tol)
    return bound.astype(size.dtype)


def _judged(
    loss: Callable[[Params], Scalar],
    params: Params,
    solver: Any,
    tol: float | jax.Array | None,
    max_steps: int,
) -> Minimum:
    """Where optimistix ends, judged by the gradient there."""
    first = tree.norm(jax.grad(loss)(params)) if tol is None else jnp.zeros(())
    params, steps, ended = minimised(loss, params, solver, max_steps)
    value, gradient = jax.value_and_grad(loss)(params)
    size = tree.norm(gradient)
    bound = _bound(first.astype(size.dtype), tol)
    result = status_of(
        Status.ok,
        (~(jnp.isfinite(size) & tree.all_finite(params)), Status.nonfinite_output),
        (size <= bound, Status.ok),
        (ended, Status.stagnated),
        (jnp.asarray(True), Status.max_steps),
    )
    stats = {"stationarity": size, "tol": bound, "value": value, "num_steps": steps}
    return Minimum(params, result, stats)


def proximal_step(
    inner: Loss, prox: Prox, step_size: Any
) -> Callable[[Params, Hparams, Batch], Params]:
    r""":math:`w ↦ prox_{s r}(w - s∇_w h(w, λ))`.

    What a solution of :func:`minimize` with ``prox`` leaves where it is, for any step size
    :math:`s > 0`: the condition ``FixedPoint(proximal_step(...))``. A step of about one over the
    largest curvature conditions its system best, and makes the map contract. For an ordinary
    proximal operator :class:`~bilevel.Composite` has the symmetric system of the same condition.
    """

    def step(params: Params, hparams: Hparams, batch: Batch) -> Params:
        gradient = jax.grad(inner)(params, hparams, batch)
        return prox(
            tree.cast_like(tree.axpy(-step_size, gradient, params), params), hparams, step_size
        )

    return step


def _check_curvatures(curvatures: Any, prox: Any) -> None:
    """Refuse what are no bounds of curvature, as far as it is known when traced."""
    if prox is not None:
        raise ValueError(
            "`curvatures` is given together with a proximal operator, whose steps find their "
            "length themselves: leave `curvatures` out."
        )
    if not (isinstance(curvatures, tuple) and len(curvatures) == 2):
        raise TypeError(
            "`curvatures` must be a pair (mu, L), the least and the largest curvature of the "
            f"inner loss, got {curvatures!r}."
        )
    least, largest = curvatures
    check_one_real("curvatures[0]", least, 0)
    check_one_real("curvatures[1]", largest, 0, strict=True)
    if concrete(least) and concrete(largest) and float(least) > float(largest):
        raise ValueError(
            "`curvatures` must be (mu, L) with mu at most L, the least and the largest curvature "
            f"of the inner loss, got ({float(least):g}, {float(largest):g})."
        )
