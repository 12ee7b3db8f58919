r"""Hypergradient descent: a learning rate that follows the derivative of the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Params, Scalar, Vector
from bilevel.ground.loops import strong_types
from bilevel.ground.settings import check_flag, check_one_real, concrete
from bilevel.inner.optimizer import check_tx
from bilevel.outer.optimizers.alignment import alignment, check_interval, dtype_of, zeros_like


class HypergradientDescentState(NamedTuple):
    """State of :func:`hypergradient_descent`.

    Attributes:
      rate: the learning rate of the last update.
      direction: what that update was ``rate`` times.
      inner: state of the direction.
    """

    rate: Scalar
    direction: Vector
    inner: Any


def hypergradient_descent(
    learning_rate: float,
    hyper_rate: float = 0.02,
    direction: optax.GradientTransformation | None = None,
    *,
    normalized: bool = True,
    min_rate: float = 0.0,
    max_rate: float = 1e6,
) -> optax.GradientTransformation:
    r"""An optimizer that learns its learning rate while it trains.

    .. math::
        α_t &= α_{t-1} + β ⟨∇f(w_t), d_{t-1}⟩
            && \text{(additive)} \\
        α_t &= α_{t-1} (1 + β cos(∇f(w_t), d_{t-1}))
            && \text{(normalized)} \\
        w_{t+1} &= w_t - α_t d_t

    With :math:`d_{t-1}` the direction of the last step, :math:`-⟨∇f(w_t),
    d_{t-1}⟩` is the derivative of :math:`f(w_{t-1} - α d_{t-1})` in :math:`α`:
    the rate descends on the loss one step ahead. The normalized form depends neither on the
    scale of the loss nor on the number of parameters, and its rate stays positive.

    Args:
      learning_rate: the first rate, positive.
      hyper_rate: :math:`β`; below 1 in the normalized form. The additive form needs one that
        fits the squared norm of the gradient, 1e-3 to 1e-7 in the paper.
      direction: an optax transformation that turns a gradient into :math:`d`: ``None`` for the
        gradient itself (SGD), ``optax.scale_by_adam()`` for Adam, ``optax.trace(0.9)``. Without a
        learning rate and without a sign.
      normalized: which of the two forms.
      min_rate, max_rate: bounds of the rate. At 0 the weights stand still, and the rate can grow
        again. Set ``max_rate`` below the limit of stability (2 over the largest curvature, for
        SGD): where what is left of the gradient lies along flat directions, steps agree and the
        rate climbs past what the steep ones allow, in both forms; the loss then rises steeply
        before the rate comes down.

    Returns:
      An optax transformation; its state has the current ``rate``. A gradient that is NaN makes the
      rate NaN: ``optax.apply_if_finite`` skips it.

    Raises:
      TypeError, ValueError: for settings out of range; the message names the argument.

    Cost: one inner product per step. Memory: one vector beside the state of the direction.

    Reference: Baydin, Cornish, Martínez Rubio, Schmidt, Wood, "Online learning rate adaptation
    with hypergradient descent", ICLR 2018.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def loss(w):
      ...     return 0.5 * jnp.sum(w**2)
      >>> tx = bilevel.hypergradient_descent(1e-4, 0.1)  # far too low
      >>> w = jnp.array([1.0, -2.0])
      >>> state = tx.init(w)
      >>> for _ in range(150):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss(w) < 1e-6) and bool(state.rate > 0.1)
      True
    """
    check_one_real("learning_rate", learning_rate, 0, strict=True)
    check_one_real("hyper_rate", hyper_rate, 0)
    check_flag("normalized", normalized)
    check_interval(min_rate, max_rate, "min_rate", "max_rate", 0)
    if direction is not None:
        check_tx("direction", direction)
    if normalized and concrete(hyper_rate) and not hyper_rate < 1:
        raise ValueError(
            f"`hyper_rate` must be below 1 in the normalized form, got {hyper_rate}: one step "
            "against the last would make the learning rate zero or negative. Use 0.01 to 0.1, or "
            "`normalized=False`."
        )
    base = optax.identity() if direction is None else direction

    def init(params: Params) -> HypergradientDescentState:
        rate = jnp.asarray(learning_rate, dtype_of(params))
        return HypergradientDescentState(rate, zeros_like(params), strong_types(base.init(params)))

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Vector, HypergradientDescentState]:
        seen = alignment(tree.accumulate(updates), state.direction, normalized)
        change = jnp.asarray(hyper_rate, state.rate.dtype) * seen
        rate = state.rate * (1 + change) if normalized else state.rate + change
        rate = jnp.clip(rate, min_rate, max_rate).astype(state.rate.dtype)
        moved, inner = base.update(updates, state.inner, params)
        step = jax.tree.map(lambda d: (-rate * tree.accumulate(d)).astype(d.dtype), moved)
        return step, HypergradientDescentState(rate, tree.accumulate(moved), inner)

    return optax.GradientTransformation(init, update)
