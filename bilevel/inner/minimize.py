r"""The inner problem solved to a tolerance: L-BFGS, or accelerated (proximal) gradient steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar, Stats, Vector
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


class _Search(NamedTuple):
    params: Params
    memory: Any
    value: Scalar
    size: Scalar
    steps: jax.Array
    gradients: jax.Array
    stuck: jax.Array


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
) -> Minimum:
    r"""A minimum of a deterministic, smooth inner loss, for the user without a training loop.

    .. math:: \|\nabla_w h(w, \lambda)\| \le \text{tol} \qquad\text{or, with a proximal operator,}
        \qquad \tfrac1s\,\bigl\|w - \operatorname{prox}_{s r}(w - s\nabla_w h(w))\bigr\|
            \le \text{tol}

    Without ``prox`` by L-BFGS with a zoom line search (optax). With it by accelerated proximal
    gradient steps, whose momentum starts anew where it points uphill. Their length s begins with
    the ``step_size`` of a ``Composite``, or else is doubled or halved until it fits; after that it
    grows by a tenth with every step and is halved where it is too long. Values of the loss decide,
    which cost no gradient, as far as rounding lets them.

    With ``curvatures`` :math:`(\mu, L)` by Nesterov's accelerated gradient steps of length
    :math:`1/L`, whose momentum is that of a loss whose Hessian has all eigenvalues between the two:
    one gradient per step and no search, and from :math:`\|\nabla h\| = \delta` to tol in about
    :math:`\sqrt{L/\mu}\,\log(\delta L/(\mu\,\text{tol}))` steps.

    Args:
      inner: the smooth part h, ``loss(params, hparams, batch) -> scalar``; or a
        :class:`~bilevel.Composite`, which has a proximal operator with it.
      params: the start; a warm one saves most of the work in a loop.
      hparams, batch: passed to the loss.
      tol: absolute; may be traced (an outer method that tightens it). ``None``:
        :math:`\sqrt\epsilon\,\max(1, \|\nabla h(w_0)\|)`.
      max_steps: most steps.
      prox: ``prox(params, hparams, step_size) -> params``, of the part r that is not smooth:
        soft-thresholding for L1, a projection for a constraint.
      curvatures: :math:`(\mu, L)`, numbers that may be traced, :math:`0 \le \mu \le L`. An L that
        is too small makes the steps diverge; a :math:`\mu` that is too large makes them slow.

    Returns:
      :class:`Minimum`. It is not differentiated: pass its ``params`` to ``hypergrad``, or call it
      in the ``solve`` of ``with_response``; with ``prox`` the condition is
      ``Composite(inner, prox)``.

    Raises:
      TypeError, ValueError: at trace time, for trees, dtypes, functions and settings that do not
        fit.

    Cost: ``num_gradients`` inner gradients; L-BFGS keeps twenty vectors, the others four.

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

    if curvatures is not None:
        _check_curvatures(curvatures, prox)
        start, advance = _accelerated(loss, params, *curvatures)
    elif prox is None:
        start, advance = _lbfgs(loss, params)
    else:
        if not is_function(prox):
            raise TypeError(f"`prox` must be a function prox(params, hparams, step), got {prox!r}.")
        check_takes("prox", prox, "prox(params, hparams, step_size)")
        check_prox(prox, params, hparams)
        start, advance = _proximal(loss, params, lambda w, s: prox(w, hparams, s), first)
    eps = jnp.finfo(start.size.dtype).eps
    bound = jnp.sqrt(eps) * jnp.maximum(1, start.size) if tol is None else jnp.asarray(tol)
    bound = bound.astype(start.size.dtype)

    def goes_on(search: _Search) -> jax.Array:
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


def proximal_step(
    inner: Loss, prox: Prox, step_size: Any
) -> Callable[[Params, Hparams, Batch], Params]:
    r""":math:`w \mapsto \operatorname{prox}_{s r}(w - s\nabla_w h(w, \lambda))`.

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


Step = Callable[[_Search], _Search]
ZERO: Any = np.int32(0)  # an array of JAX would start its back end on import


def _lbfgs(loss: Callable[[Params], Scalar], params: Params) -> tuple[_Search, Step]:
    tx = optax.lbfgs()
    eps = jnp.finfo(tree.norm(params).dtype).eps

    def advance(search: _Search) -> _Search:
        gradient = optax.tree.get(search.memory, "grad")
        updates, memory = tx.update(
            gradient, search.memory, search.params,
            value=search.value, grad=gradient, value_fn=loss,
        )  # fmt: skip
        tried = optax.tree.get(memory, "info").num_linesearch_steps
        # The search has evaluated value and gradient where it stopped.
        return _Search(
            optax.apply_updates(search.params, updates),
            memory,
            optax.tree.get(memory, "value").astype(search.value.dtype),
            tree.norm(optax.tree.get(memory, "grad")),
            search.steps + 1,
            search.gradients + jnp.asarray(tried, jnp.int32),
            tree.norm(updates) <= eps * tree.norm(search.params),
        )

    value, gradient = jax.value_and_grad(loss)(params)
    memory = strong_types(optax.tree.set(tx.init(params), grad=gradient, value=value))
    stuck = jnp.asarray(False)
    return _Search(params, memory, value, tree.norm(gradient), ZERO, ZERO + 1, stuck), advance


class _Coasting(NamedTuple):
    gradient: Vector
    behind: Params
    weight: Scalar


def _accelerated(
    loss: Callable[[Params], Scalar], params: Params, least: Any, largest: Any
) -> tuple[_Search, Step]:
    dtype = tree.norm(params).dtype
    eps = jnp.finfo(dtype).eps
    longest = (1 / jnp.asarray(largest)).astype(dtype)
    q = jnp.clip(jnp.asarray(least).astype(dtype) * longest, 0, 1)

    def advance(search: _Search) -> _Search:
        gradient, behind, t = search.memory
        w = tree.cast_like(tree.axpy(-longest, gradient, search.params), search.params)
        flat = 1 - q * t**2
        following = (flat + jnp.sqrt(flat**2 + 4 * t**2)) / 2
        # Where all curvatures are one, a step ends at the minimum, and 1 - q is zero.
        push = (t - 1) * (1 - q * following) / (following * jnp.where(q < 1, 1 - q, 1))
        ahead = tree.cast_like(tree.axpy(push, tree.sub(w, behind), w), w)
        value, slope = jax.value_and_grad(loss)(ahead)
        return _Search(
            ahead,
            _Coasting(slope, w, following),
            value,
            tree.norm(slope),
            search.steps + 1,
            search.gradients + 1,
            longest * search.size <= eps * tree.norm(search.params),
        )

    value, gradient = jax.value_and_grad(loss)(params)
    memory = _Coasting(gradient, params, jnp.ones((), dtype))
    stuck = jnp.asarray(False)
    return _Search(params, memory, value, tree.norm(gradient), ZERO, ZERO + 1, stuck), advance


class _Momentum(NamedTuple):
    ahead: Params
    step: Scalar
    weight: Scalar


SHORTEST = 60
"""Halvings of the step size before a proximal search gives up."""

LONGEST = 30
"""Doublings of the first step size, from one."""

GROWTH = 1.1
"""Of the step size from step to step: curvature falls along the way, and a start may be short."""


def _proximal(
    loss: Callable[[Params], Scalar],
    params: Params,
    prox: Callable[[Params, Scalar], Params],
    first: Any = None,
) -> tuple[_Search, Step]:
    def moved(y: Params, gradient: Vector, s: Scalar) -> Params:
        return tree.cast_like(prox(tree.cast_like(tree.axpy(-s, gradient, y), y), s), y)

    def judged(y: Params, value: Scalar, gradient: Vector, s: Scalar) -> tuple[Any, Any]:
        """Whether a step is too long for its model, and whether rounding lets it tell."""
        w = moved(y, gradient, s)
        d = tree.sub(w, y)
        bend = tree.vdot(d, d) / (2 * s)
        slack = 4 * jnp.finfo(bend.dtype).eps * jnp.abs(value)
        too_long = ~(loss(w) <= value + tree.vdot(gradient, d) + bend + slack)
        return too_long, bend > slack

    def advance(search: _Search) -> _Search:
        y, s, t = search.memory
        value, gradient = jax.value_and_grad(loss)(y)

        def too_long(s: Scalar) -> jax.Array:
            return judged(y, value, gradient, s)[0]

        s, halvings = jax.lax.while_loop(
            lambda c: (c[1] < SHORTEST) & too_long(c[0]), lambda c: (c[0] / 2, c[1] + 1), (s, ZERO)
        )
        w, tells = moved(y, gradient, s), judged(y, value, gradient, s)[1]
        step = tree.sub(w, search.params)
        uphill = tree.vdot(tree.sub(y, w), step) > 0
        following = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        push = jnp.where(uphill, 0, (t - 1) / following)
        ahead = tree.cast_like(tree.axpy(push, step, w), w)
        return _Search(
            w,
            _Momentum(
                ahead,
                jnp.where(tells, GROWTH, 1).astype(s.dtype) * s,
                jnp.where(uphill, 1, following).astype(t.dtype),
            ),
            value,
            tree.norm(tree.sub(y, w)) / s,
            search.steps + 1,
            search.gradients + 1,
            halvings == SHORTEST,
        )

    value, gradient = jax.value_and_grad(loss)(params)
    one = jnp.ones((), tree.norm(params).dtype)
    size = tree.norm(tree.sub(params, moved(params, gradient, one)))

    def may_grow(s: Scalar) -> jax.Array:
        too_long, tells = judged(params, value, gradient, 2 * s)
        return tells & ~too_long

    if first is None:  # one in units of the loss says nothing: it may be far too short
        first = jax.lax.while_loop(
            lambda c: (c[1] < LONGEST) & may_grow(c[0]), lambda c: (2 * c[0], c[1] + 1), (one, ZERO)
        )[0]
    memory = _Momentum(params, jnp.asarray(first, one.dtype), one)
    stuck = jnp.asarray(False)
    return _Search(params, memory, value, size, ZERO, ZERO + 1, stuck), advance
