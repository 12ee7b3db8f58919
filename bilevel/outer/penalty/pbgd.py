r"""PBGD: gradient descent on the outer loss and a penalty on the suboptimality of training."""

from typing import Any

import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Loss, ModelState, Params, Vector
from bilevel.ground.cost import Cost
from bilevel.inner.descend import InnerState, take_step
from bilevel.outer.base import Algorithm, own_params
from bilevel.outer.penalty.difference import Node, both_node, difference, inner_node
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


def pbgd(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int = 1,
    *,
    penalty: Schedule = 10.0,
    penalized_tx: optax.GradientTransformation | None = None,
    constrain: Space | None = None,
    has_aux: bool = False,
    has_state: bool = False,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Penalty-based bilevel gradient descent on the value function, in a single loop.

    .. math::
        z &← z - u(∇_w h(z, λ))  (K \text{ times}) \\
        y &← y - u(∇_w h(y, λ) + \tfrac1σ∇_w f(y, λ)) \\
        λ &← λ - v(∇_λ f(y, λ)
            + σ [∇_λ h(y, λ) - ∇_λ h(z, λ)])

    Simultaneous descent in :math:`(y, λ)` on :math:`f + σ (h - min_w h)`: y and
    :math:`λ` move by the gradient of one evaluation, at their values before the step. Where
    f is Lipschitz and :math:`σ` large enough, minimizers are those of the bilevel problem up
    to :math:`O(1/σ)`; :func:`~bilevel.f2sa` lowers that bias by a growing penalty and K
    steps of y.

    Args:
      outer, inner, inner_tx, outer_tx: as in :func:`~bilevel.f2sa`.
      inner_steps: K, training steps of :math:`z` a step, at least 1.
      penalty: :math:`σ`, positive, or a schedule ``step -> penalty``. ``outer_tx`` sees
        gradients of differences that lag behind by one step of y: with a large penalty lower its
        rate.
      penalized_tx: of :math:`y`; ``None`` for ``inner_tx``.
      constrain, has_aux, has_state, unroll: as in :func:`~bilevel.alternate`.

    Returns:
      ``Algorithm(init, step, deploy)``, batches, deployed parameters and ``info.stats`` as
      :func:`~bilevel.f2sa`.

    Raises:
      TypeError, ValueError: as :func:`~bilevel.f2sa`.

    Cost: K + 2 inner gradients and one outer gradient; no products. Memory: two copies of the
    parameters and of the state of their optimizer.

    Reference: Shen, Chen, "On penalty-based bilevel gradient descent method", ICML 2023 (V-PBGD).

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.pbgd(
      ...     valid, train, optax.sgd(0.2), optax.sgd(0.05), inner_steps=2,
      ...     constrain=bilevel.Space(bilevel.Positive()))
      >>> state = alg.init(jnp.zeros(1), 1.5)
      >>> step = jax.jit(alg.step, donate_argnums=0)
      >>> for _ in range(400):
      ...     state, info = step(
      ...         state, inner_batches=jnp.full((2, 1), 2.0), outer_batch=jnp.array([1.0]))
      >>> bool(abs(info.value) < 0.01)  # the decay that halves the mean of the data is 1
      True
    """
    check_penalty(penalty)

    def advance(
        run: Penalty, state: PenaltyState, batches: Batch, batch: Batch, outer_batch: Batch
    ) -> Move:
        hparams = state.hparams
        nu = 1 / penalty_at(penalty, 0.0, state.step, state.params)
        trained, inner_value = run.train(state.trained, hparams, batches)
        (y,) = state.penalized
        high = both_node(run.problem, y, hparams, batch, outer_batch)
        low = inner_node(run.problem, trained, hparams, batch)
        found = difference([(1, 1.0, high), (0, -1.0, low)], nu, run.part(state.params))
        grads = tree.axpy(1 / nu, found.inner[1], found.outer[1])
        slope = tree.axpy(nu, tree.accumulate(high.outer[0]), tree.accumulate(high.inner[0]))
        y = move_penalized(run, y, high, slope)
        cost = Cost(run.inner_steps + 2, 0, 1)
        return Move(trained, (y,), inner_value, grads, found.result, found.stats, cost)

    run = make(
        outer, inner, inner_tx, outer_tx, inner_steps, penalized_tx, constrain, has_aux, has_state,
        unroll, 1, advance,
    )  # fmt: skip
    return Algorithm(run.init, run.step, own_params)


def move_penalized(run: Penalty, y: InnerState, node: Node, slope: Vector) -> InnerState:
    """One optimizer step of ``y``, where ``node`` was evaluated, along ``slope``."""
    slope = tree.cast_like(slope, y.params)

    def gradient(params: Params, model_state: ModelState) -> Any:
        return (node.value, node.model_state), slope

    def loss(params: Params, model_state: ModelState) -> Any:
        raise ValueError(
            "`penalized_tx` evaluates its loss at other parameters (a line search), where a single "
            "loop has none: pass an optimizer without a search as `penalized_tx`, such as "
            "`optax.sgd(0.1)`."
        )

    return take_step(loss, run.penalized_tx, y, gradient)[0]
