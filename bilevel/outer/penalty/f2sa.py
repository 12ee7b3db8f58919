r"""F2SA: hypergradients from first derivatives, as a finite difference over the penalty."""

import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Loss
from bilevel.ground.cost import Cost
from bilevel.ground.settings import check_count, check_one_real
from bilevel.outer.base import Algorithm, own_params
from bilevel.outer.penalty.difference import both_node, difference, inner_node, stencil
from bilevel.outer.penalty.loop import (
    Move,
    Penalty,
    PenaltyState,
    Schedule,
    check_penalty,
    make,
    penalty_at,
)
from bilevel.space.space import Space


def f2sa(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int,
    *,
    penalty: Schedule = 10.0,
    growth: float = 1 / 7,
    order: int = 1,
    penalized_tx: optax.GradientTransformation | None = None,
    constrain: Space | None = None,
    has_aux: bool = False,
    has_state: bool = False,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Fully first-order stochastic approximation: no second derivative anywhere.

    .. math::
        z &← z - u(∇_w h(z, λ)),
        y ← y - u(∇_w h(y, λ) + \tfrac1σ ∇_w f(y, λ))
            (K \text{ times each}) \\
        λ &← λ - v(∇_λ f(y, λ)
            + σ [∇_λ h(y, λ) - ∇_λ h(z, λ)]),
        σ_k = σ_0 (1 + k)^{1/7}

    The direction is a forward difference, in :math:`ν = 1/σ`, of
    :math:`∂_λ min_w (h + ν f)`: its bias falls as :math:`1/σ`. A difference of
    order p reads p penalized minimizers (at :math:`±ν, ± 2ν, …` for even p) and its
    bias falls as :math:`1/σ^p`. Written as above, the penalized loss is no steeper for a
    larger penalty: the same ``inner_tx`` stays stable while :math:`σ` grows.

    Args:
      outer: validation loss :math:`f`, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss :math:`h`, of the same form.
      inner_tx: an optax transformation, of the parameters :math:`z` that are deployed.
      outer_tx: an optax transformation of the hyperparameters.
      inner_steps: K, at least 1.
      penalty: :math:`σ_0`, positive; or a schedule, ``step -> penalty``, which is then used
        as it is. It must be so large that :math:`h + jν f` has a minimum: above :math:`p L/μ`
        where f may curve downwards by L and h curves upwards by :math:`μ`; the smaller it is,
        the larger the bias, the larger, the closer :math:`y` and :math:`z`, until rounding (or the
        noise of unfinished training) is all of their difference.
      growth: the exponent; 0 for a constant penalty.
      order: p, the order of the difference.
      penalized_tx: of :math:`y`; ``None`` for ``inner_tx``.
      constrain, has_aux, has_state, unroll: as in :func:`~bilevel.alternate`; with ``has_state``
        each copy of the parameters has statistics of its own.

    Returns:
      ``Algorithm(init, step, deploy)``. ``step(state, *, inner_batches, outer_batch,
      response_batch=None, key=None)``: ``inner_batches`` is a stack of K batches, read by all
      copies alike; the difference reads ``response_batch``, or the last of them. ``deploy`` gives
      :math:`z`, which has not seen the validation data, and ``info.value`` is :math:`f(z)`.

    ``info.stats``: ``residual_norm`` and ``rhs_norm`` are those of the linear system that an
    implicit method would solve: the difference :math:`σ(z - y)` stands for its solution.
    Status ``truncated`` says that y and z are not trained far enough for it (raise
    ``inner_steps``), ``rounding`` that they are as close as their dtype can tell (lower
    ``penalty``), ``negative_curvature`` that the inner loss curves downwards between them.
    ``min_curvature`` is its curvature there, ``distance`` their distance.

    Raises:
      TypeError, ValueError: at construction or at trace time, for settings, trees and axes that do
        not fit, and for hyperparameters that no loss reads; the message names the argument.

    Cost: (p + 1) K + p (+ 1 for odd p) inner gradients and p (K + 1) outer gradients; no
    products. Memory: p + 1 copies of the parameters and of the state of their optimizer.

    Reference: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel
    optimization", ICML 2023; the differences of higher order are those of Chen et al., "Faster
    gradient methods for highly-smooth stochastic bilevel optimization", 2025.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.f2sa(
      ...     valid, train, optax.sgd(0.2), optax.adam(0.1), inner_steps=20,
      ...     constrain=bilevel.Space(bilevel.Positive()))
      >>> state = alg.init(jnp.zeros(1), 1.5)
      >>> step = jax.jit(alg.step, donate_argnums=0)
      >>> for _ in range(100):
      ...     state, info = step(
      ...         state, inner_batches=jnp.full((20, 1), 2.0), outer_batch=jnp.array([1.0]))
      >>> bool(abs(info.value) < 0.01)  # the decay that halves the mean of the data is 1
      True
    """
    check_count("order", order)
    check_penalty(penalty)
    check_one_real("growth", growth, 0)
    weights = stencil(order)
    offsets = [j for j in weights if j]

    def advance(
        run: Penalty, state: PenaltyState, batches: Batch, batch: Batch, outer_batch: Batch
    ) -> Move:
        hparams = state.hparams
        nu = 1 / penalty_at(penalty, growth, state.step, state.params)
        trained, penalized, inner_value = run.train_together(
            state.trained, state.penalized, tuple(j * nu for j in offsets), hparams, batches,
            outer_batch,
        )  # fmt: skip
        nodes = [
            (j, weights[j], both_node(run.problem, y, hparams, batch, outer_batch))
            for j, y in zip(offsets, penalized, strict=True)
        ]
        if 0 in weights:
            nodes.append((0, weights[0], inner_node(run.problem, trained, hparams, batch)))
        found = difference(nodes, nu, run.part(state.params))
        grads = tree.axpy(1 / nu, found.inner[1], found.outer[1])
        steps, copies = run.inner_steps, len(offsets)
        cost = Cost((copies + 1) * steps + len(nodes), 0, copies * (steps + 1))
        return Move(trained, penalized, inner_value, grads, found.result, found.stats, cost)

    run = make(
        outer, inner, inner_tx, outer_tx, inner_steps, penalized_tx, constrain, has_aux, has_state,
        unroll, len(offsets), advance,
    )  # fmt: skip
    return Algorithm(run.init, run.step, own_params)
