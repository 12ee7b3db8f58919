r"""Gauss–Newton steps as an optax transformation: a system of the size of the batch is solved."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Params, Scalar, Vector
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.settings import check_flag, check_one_real, concrete, is_function
from bilevel.linear.base import LinearSolver
from bilevel.linear.woodbury import Woodbury
from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.two_losses import Problem

ARMIJO = 0.1
"""Part of the decrease that the slope promises which a step of the search must reach."""

SHORTER, LONGER, TRIALS = 0.8, 1.5, 15
"""How the search changes a length: after a refusal, from step to step, and how often at most."""

GOOD, BAD = 0.75, 0.25
"""Actual over predicted decrease: above the damping is lowered, below it is raised."""


class GaussNewtonState(NamedTuple):
    """State of :func:`gauss_newton`: steps made, the mean of the directions, the damping where it
    adapts and the last length where it is searched (``None`` otherwise)."""

    count: jax.Array
    mean: Vector | None
    damping: jax.Array | None
    length: jax.Array | None


def gauss_newton(
    model: Callable[[Params, Hparams, Batch], Any],
    output_loss: Callable[[Any, Hparams, Batch], Scalar],
    learning_rate: float | optax.Schedule = 1.0,
    *,
    damping: float | jax.Array = 1.0,
    penalty: Callable[[Params, Hparams], Scalar] | None = None,
    independent_examples: bool = False,
    momentum: float | jax.Array = 0.0,
    line_search: bool = False,
    adaptation: float | jax.Array = 1.0,
    min_damping: float | jax.Array = 0.1,
    solver: LinearSolver | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exact Gauss–Newton: the damped system of one batch, solved in the size of the batch.

    .. math:: d = (Jᵀ Q J + ∇^2 r + ρ I)^{-1} g,  w ← w - α d

    for a loss :math:`ℓ(z(w)) + r(w)`, with J the Jacobian of the model's outputs z on the batch,
    Q the Hessian of the loss in them, and g the gradient that comes in. ``Woodbury`` solves it by
    the push-through identity with a matrix of batch x outputs rows, however many parameters there
    are, with the factors that implicit differentiation uses; the curvature is the symmetric one,
    also for cross-entropy, whose Q is singular and is never inverted.

    Args:
      model: ``model(params, hparams, batch) -> outputs``, as in :class:`~bilevel.GaussNewton`.
      output_loss: ``output_loss(outputs, hparams, batch) -> scalar``, convex in the outputs.
      learning_rate: :math:`α`, or a schedule of the step; with ``line_search`` the longest.
      damping: :math:`ρ > 0`, in units of curvature: 1 is large for a mean over examples. Of the
        first step, where it adapts.
      penalty: ``penalty(params, hparams) -> scalar``, a sum over the weights, or ``None``.
      independent_examples: as in :class:`~bilevel.GaussNewton`; no row of J is then stored for
        dense layers and convolutions.
      momentum: decay of a mean of the directions, corrected for its start; 0 keeps none.
      line_search: shorten the step until the loss of the batch falls by a tenth of what its slope
        promises (Armijo), at most 15 times by a factor of 0.8; the next search begins 1.5 times as
        long.
      adaptation: factor by which the damping changes in a step: it falls where the loss of the
        batch fell by more than 75 % of what the quadratic model predicts, and rises below 25 %.
        1 keeps it, 1.01 is that of the paper.
      min_damping: the least that it adapts to.
      solver: of the system; ``None`` is ``Woodbury()``. With ``CG(max_steps=10)`` it is a
        Hessian-free Gauss–Newton method, for any number of outputs.

    Returns:
      An optax transformation. ``update`` needs ``hparams=`` and ``batch=`` (what the loss reads) as
      extra arguments, with a search or an adapting damping ``value=`` and ``value_fn=`` too;
      ``descend``, ``alternate`` and ``Unroll`` pass them. Settings may be traced: under ``Unroll``
      they can be tuned, and the derivative runs through the solve (with ``line_search`` in
      ``mode="forward"``).

    Raises:
      TypeError, ValueError: for settings out of range; for a loop that has no batch to pass
        (``self_tuning``, single loops); and what ``Woodbury`` refuses.

    Cost: a solve (for ``Woodbury`` batch x outputs backward passes, or as many as an example has
    outputs through layers, and a factorization of that size), one product for the prediction where
    the damping adapts, and a value of the loss for each trial.

    Reference: Korbit, Adeoye, Bemporad, Zanon, "Exact Gauss-Newton optimization for training deep
    neural networks", 2024.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def model(w, lam, batch):
      ...     return jnp.tanh(batch[0] @ w)
      >>> def squares(z, lam, batch):
      ...     return 0.5 * jnp.mean((z - batch[1]) ** 2)
      >>> def train(w, lam, batch):
      ...     return squares(model(w, lam, batch), lam, batch)
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> batches = jax.tree.map(lambda a: jnp.stack([a] * 20), (x, jnp.tanh(x @ jnp.ones(3))))
      >>> tx = bilevel.gauss_newton(model, squares, damping=1e-3)
      >>> w = jnp.zeros(3)
      >>> state, info = bilevel.descend(
      ...     train, tx, bilevel.InnerState(w, tx.init(w)), None, batches, steps=20)
      >>> bool(info.loss[-1] < 1e-6)
      True
    """
    _check(learning_rate, damping, momentum, adaptation, min_damping)
    check_flag("line_search", line_search)
    fixed = concrete(adaptation) and adaptation == 1
    keeps_mean = not (concrete(momentum) and momentum == 0)
    by = Woodbury() if solver is None else solver
    # Checks the functions and flags as the operator's own are.
    GaussNewton(model, output_loss, 1.0, penalty, independent_examples)

    def init(params: Params) -> GaussNewtonState:
        dtype = tree.norm(params).dtype
        rate = 1.0 if is_function(learning_rate) else learning_rate
        return GaussNewtonState(
            jnp.zeros((), jnp.int32),
            tree.zeros_accumulated(params) if keeps_mean else None,
            None if fixed else jnp.asarray(damping, dtype),
            jnp.asarray(rate, dtype) if line_search else None,
        )

    def update(
        updates: Vector,
        state: GaussNewtonState,
        params: Params | None = None,
        *,
        hparams: Hparams,
        batch: Batch,
        value: Any = None,
        value_fn: Callable[[Params], Scalar] | None = None,
        **_: Any,
    ) -> tuple[Vector, GaussNewtonState]:
        if params is None:
            raise ValueError(
                "`params` is missing: `gauss_newton` linearizes the model there. Pass it to "
                "`update`."
            )
        if (line_search or not fixed) and (value is None or value_fn is None):
            raise TypeError(
                "`gauss_newton` with `line_search` or `adaptation` looks at the loss of the batch: "
                "pass `value=loss(params)` and `value_fn=loss` to its `update`."
            )
        at: Any = damping if state.damping is None else state.damping
        operator = GaussNewton(model, output_loss, at, penalty, independent_examples)
        problem = Problem(operator.loss, operator.loss)
        mv = operator.bind(problem, params, hparams, batch, fresh=False).mv
        grads = tree.accumulate(updates)
        direction = solved(mv, grads, by)
        count, mean = jnp.asarray(optax.safe_increment(state.count)), state.mean
        if mean is not None:
            mean = jax.tree.map(
                lambda m, d: (momentum * m + (1 - momentum) * d).astype(m.dtype), mean, direction
            )
            direction = tree.scale(1 / (1 - jnp.asarray(momentum) ** count), mean)
        direction = tree.scale(-1, direction)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        length, after = jnp.asarray(rate, tree.norm(grads).dtype), None
        if state.length is not None:
            first = jnp.minimum(LONGER * state.length, length)
            slope = tree.vdot(grads, direction)
            length, after = _search(value_fn, value, params, direction, slope, first)
        step = tree.scale(length, direction)
        if not fixed:
            after = _moved(value_fn, params, step) if after is None else after
            predicted = -tree.vdot(grads, step) - 0.5 * tree.vdot(step, mv.undamped(step))
            at = _adapted(at, value - after, predicted, adaptation, min_damping)
        new = GaussNewtonState(
            count,
            mean,
            None if state.damping is None else jnp.asarray(at, state.damping.dtype),
            None if state.length is None else length.astype(state.length.dtype),
        )
        return tree.cast_like(step, params), new

    functions: Any = (init, update)  # optax's types know no required arguments beside its own
    return optax.GradientTransformationExtraArgs(*functions)


def solved(mv: LinearMap, grads: Vector, solver: LinearSolver) -> Vector:
    r""":math:`A^{-1} g`, whose derivative is that of the exact solution, by the same solver."""
    return jax.lax.custom_linear_solve(
        lambda v: mv(v),
        grads,
        lambda _, g: solver.solve(mv, g, None, certify=False).value,
        symmetric=True,
    )


def _check(
    learning_rate: Any, damping: Any, momentum: Any, adaptation: Any, min_damping: Any
) -> None:
    if not is_function(learning_rate):
        check_one_real("learning_rate", learning_rate, 0, strict=True)
    check_one_real("damping", damping, 0, strict=True)
    check_one_real("momentum", momentum, 0)
    check_one_real("adaptation", adaptation, 1)
    check_one_real("min_damping", min_damping, 0, strict=True)
    if concrete(momentum) and not momentum < 1:
        raise ValueError(f"`momentum` must be below 1, got {momentum}: it is the decay of a mean.")


def _moved(value_fn: Any, params: Params, step: Vector) -> Scalar:
    return value_fn(optax.apply_updates(params, tree.cast_like(step, params)))


def _search(
    value_fn: Any, value: Any, params: Params, direction: Vector, slope: Scalar, first: Scalar
) -> tuple[Scalar, Scalar]:
    """The first of a series of shorter lengths that lowers the loss enough, and the loss there."""

    def trial(length: Scalar) -> Scalar:
        return _moved(value_fn, params, tree.scale(length, direction))

    def goes_on(carry: Any) -> Any:
        length, after, trials = carry
        return (trials < TRIALS) & ~(after <= value + ARMIJO * length * slope)

    def shorten(carry: Any) -> Any:
        length, _, trials = carry
        return SHORTER * length, trial(SHORTER * length), trials + 1

    length, after, _ = jax.lax.while_loop(goes_on, shorten, (first, trial(first), 1))
    return length, after


def _adapted(damping: Any, actual: Scalar, predicted: Scalar, factor: Any, least: Any) -> jax.Array:
    """The damping after a step that lowered the loss by ``actual``; the model had ``predicted``."""
    # A step so long that the model itself predicts a rise is a bad one, whatever came of it.
    ratio = jnp.where(predicted > 0, actual / predicted, -1.0)
    change = jnp.where(ratio > GOOD, 1 / factor, jnp.where(ratio >= BAD, 1.0, factor))
    # A damping that was chosen below the least stays where it is.
    return jnp.maximum(damping * change, jnp.minimum(damping, least))
