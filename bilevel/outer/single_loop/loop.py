r"""Single loops: parameters, adjoint and hyperparameters move together, one step each."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.ground.settings import check_flag, check_takes, is_function
from bilevel.inner.optimizer import check_fixed_tx, check_tx
from bilevel.outer.base import Algorithm
from bilevel.outer.single_loop.adjoint import Adjoint
from bilevel.outer.single_loop.base import Estimator, Plain
from bilevel.outer.single_loop.memory import Saga
from bilevel.outer.single_loop.recursion import Page, Spider, Storm
from bilevel.outer.single_loop.series import Series
from bilevel.outer.single_loop.step import Schedule, SingleLoop, deploy
from bilevel.outer.variable import Mover, check_space
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_losses
from bilevel.space.space import Space


def single_loop(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    linear_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    estimator: Saga | Storm | Spider | Page | None = None,
    *,
    independent: bool = False,
    schedule: Schedule | None = None,
    constrain: Space | None = None,
    has_aux: bool = False,
    has_state: bool = False,
) -> Algorithm:
    r"""One step each of the parameters, of the adjoint and of the hyperparameters.

    .. math::
        D_w &= ∇_w h(w, λ) & w &← w - u(D_w) \\
        D_q &= H q - ∇_w f(w, λ) & q &← q - s(D_q) \\
        D_λ &= ∂_λ f - Bᵀ q & λ &← λ - v(D_λ)

    with the updates u, s, v of three optax optimizers. All directions are taken at the same
    :math:`(w, q, λ)`, before any of the three moves. Nothing is solved: :math:`q` follows
    the solution of :math:`H q = ∇_w f` while it moves, from zero, so that the first
    hypergradients are too short. (The literature writes :math:`v = -q`.)

    Args:
      outer: validation loss :math:`f`, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss :math:`h`, of the same form, strongly convex in the parameters around
        where they are.
      inner_tx, linear_tx, outer_tx: optax transformations of the parameters, the adjoint and the
        hyperparameters. The step size of ``linear_tx`` must be below 2 over the largest
        curvature of *any* batch. Its state (momentum) is carried; ``optax.add_decayed_weights(r)``
        before it damps the system, :math:`H + rI`. The step size of ``outer_tx`` must be small
        against both.
      estimator: ``None`` takes the directions of the step's batches as they are; ``Saga``,
        ``Storm``, ``Spider`` and ``Page`` reduce their variance, so that constant step sizes
        converge.
      independent: draw a batch of its own for each of :math:`∇_w h, Hq, Bᵀ q`; the
        products are then made one by one.
      schedule: what all three updates are multiplied with, ``schedule(step) -> factor``, such as
        ``lambda step: (1 + step) ** -0.5``. Papers let the three fall together; one schedule in
        each optimizer says the same with three more counts.
      constrain: bounds; None leaves the hyperparameters free.
      has_aux: ``outer`` returns ``(scalar, aux)``.
      has_state: both losses are ``loss(params, hparams, batch, model_state) -> (scalar,
        model_state)``. The inner gradient advances the statistics, and the outer loss of the
        same step reads them.

    Returns:
      ``Algorithm(init, step, deploy)``, with ``step(state, *, inner_batches, outer_batch,
      key=None)``. ``inner_batches`` are stacked along a leading axis of 1, or of 3 if
      ``independent``. For ``Saga`` both arguments are ``Indexed(batch, index)``, for ``Spider``
      and ``Page`` ``Anchored(batch, full)``; only ``Page`` needs a key.

      ``info.value`` is the outer loss at the point of the directions. ``deploy`` gives the
      parameters of that point, from before the step; ``state.params`` are one step ahead. The
      status judges the adjoint on the step's batches: ``worse_than_zero`` and ``diverged`` where
      :math:`‖D_q‖` is above 2 and above 10 of the largest :math:`‖∇_w f‖` so far,
      ``negative_curvature`` for :math:`qᵀ H q < 0`.

    Parameters that ``inner_tx`` freezes are constants, and have no adjoint.

    Raises:
      TypeError, ValueError: at construction or at trace time, for settings, trees, axes and values
        outside their bounds that do not fit; the message names the argument.

    Cost: one inner gradient, one product (which yields both), one outer gradient; the estimators
    say what they add. Memory: the state, with a second copy of the parameters, and one product.

    Reference: Dagreou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.single_loop(
      ...     valid, train, optax.sgd(0.2), optax.sgd(0.2), optax.sgd(0.2),
      ...     constrain=bilevel.Space(bilevel.Positive()))
      >>> state = alg.init(jnp.zeros(1), 0.5)
      >>> step = jax.jit(alg.step, donate_argnums=0)
      >>> for _ in range(500):
      ...     state, info = step(
      ...         state, inner_batches=jnp.full((1, 1), 2.0), outer_batch=jnp.array([1.0]))
      >>> bool(abs(info.value) < 0.01)  # the decay that halves the mean of the data is 1
      True
    """
    check_tx("linear_tx", linear_tx)
    kinds = (Saga, Storm, Spider, Page)
    if estimator is not None and not isinstance(estimator, kinds):
        raise TypeError(
            "`estimator` must be None, `Saga(...)`, `Storm(...)`, `Spider(...)` or `Page(...)`, "
            f"got {estimator!r}."
        )
    check_flag("independent", independent)
    return build(
        outer, inner, Adjoint(bool(independent)), inner_tx, linear_tx, outer_tx,
        Plain() if estimator is None else estimator, schedule, constrain, has_aux, has_state,
    )  # fmt: skip


def build(
    outer: Loss,
    inner: Loss,
    reader: Adjoint | Series,
    inner_tx: optax.GradientTransformation,
    linear_tx: optax.GradientTransformation | None,
    outer_tx: optax.GradientTransformation,
    estimator: Estimator,
    schedule: Any = None,
    constrain: Any = None,
    has_aux: Any = False,
    has_state: Any = False,
) -> Algorithm:
    """The loop of any reader and estimator, with what they have in common checked."""
    check_losses(outer=outer, inner=inner)
    check_fixed_tx("inner_tx", inner_tx)
    check_tx("outer_tx", outer_tx)
    check_flag("has_aux", has_aux)
    check_flag("has_state", has_state)
    check_space(constrain, "{'decay': Positive()}")
    if schedule is not None:
        if not is_function(schedule):
            raise TypeError(
                "`schedule` must be a function schedule(step) -> factor, such as "
                f"`lambda step: (1 + step) ** -0.5`, or None, got {schedule!r}."
            )
        check_takes("schedule", schedule, "schedule(step)")
    problem, mover = Problem(outer, inner, has_aux, has_state), Mover(outer_tx, constrain)
    loop = SingleLoop(problem, reader, inner_tx, linear_tx, mover, estimator, schedule)
    return Algorithm(loop.init, loop.step, deploy)
