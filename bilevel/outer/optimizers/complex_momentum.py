r"""Momentum with a complex coefficient: it damps the rotation of games."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Params, Vector
from bilevel.ground.settings import check_one_real, concrete, is_function


class ComplexMomentumState(NamedTuple):
    """State of :func:`complex_momentum`: the two parts of the buffer, and the steps made."""

    real: Vector
    imag: Vector
    count: jax.Array


def complex_momentum(
    learning_rate: float | optax.Schedule, beta: float = 0.9, angle: float = 0.125
) -> optax.GradientTransformation:
    r"""Gradient descent with complex momentum, for parameters that stay real.

    .. math::
        μ ← b μ - ∇f(w),  w ← w + α \mathrm{Re} μ,
        b = β e^{i π φ}

    written with two real buffers. In a game (players that descend on losses of their own) the
    updates rotate: the eigenvalues of its Jacobian are imaginary, and real momentum makes the
    rotation grow. A complex one converges for real eigenvalues and for imaginary ones. Angle 0 is
    heavy ball, angle 1 negative momentum.

    Use it for the hyperparameters of an outer problem that works against the inner one
    (adversarial weights, min-max), and for the parameters of the inner one: as ``outer_tx`` and
    ``inner_tx`` of a loop, which updates them in turn.

    Args:
      learning_rate: :math:`α`, positive, or a schedule of the step. It is not that of real
        momentum: the gain at angle 0 is 1 / (1 - beta), ten for 0.9; at 0.125 it is
        :math:`\mathrm{Re} 1/(1-b)`, 1.15.
      beta: :math:`β`, at least 0 and below 1. On purely rotating games with simultaneous
        updates below 0.56 never converges.
      angle: :math:`φ`, in units of :math:`π`.

    Returns:
      An optax transformation (buffers in the dtypes of the parameters, at least float32).

    Raises:
      TypeError, ValueError: for settings out of range; the message names the argument.

    Cost: elementwise work. Memory: two vectors.

    Reference: Lorraine, Acuna, Vicol, Duvenaud, "Complex momentum for optimization in games",
    AISTATS 2022.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def play(tx, steps=500):  # x lowers x y, y raises it: plain descent spirals outwards
      ...     point, state = jnp.ones(2), tx.init(jnp.ones(2))
      ...     for _ in range(steps):
      ...         game = jnp.array([point[1], -point[0]])
      ...         updates, state = tx.update(game, state, point)
      ...         point = optax.apply_updates(point, updates)
      ...     return float(jnp.linalg.norm(point))
      >>> play(bilevel.complex_momentum(0.06)) < 1e-3 < 1 < play(optax.sgd(0.06))
      True
    """
    if not is_function(learning_rate):
        check_one_real("learning_rate", learning_rate, 0, strict=True)
    check_one_real("beta", beta, 0)
    check_one_real("angle", angle)
    if concrete(beta) and not beta < 1:
        raise ValueError(
            f"`beta` must be below 1, got {beta}: the buffers would grow without bound. The "
            "angle of a complex coefficient is `angle`, in units of pi."
        )

    def init(params: Params) -> ComplexMomentumState:
        zeros = tree.zeros_accumulated(params)
        return ComplexMomentumState(
            zeros, jax.tree.map(jnp.zeros_like, zeros), jnp.zeros((), jnp.int32)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Vector, ComplexMomentumState]:
        turn = jnp.pi * jnp.asarray(angle, tree.norm(state.real).dtype)
        low, high = beta * jnp.cos(turn), beta * jnp.sin(turn)

        def real(p: jax.Array, q: jax.Array, g: jax.Array) -> jax.Array:
            return (low * p - high * q).astype(p.dtype) - g.astype(p.dtype)

        def imag(p: jax.Array, q: jax.Array) -> jax.Array:
            return (high * p + low * q).astype(p.dtype)

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        p = jax.tree.map(real, state.real, state.imag, updates)
        q = jax.tree.map(imag, state.real, state.imag)
        step = jax.tree.map(lambda x, g: (rate * x).astype(g.dtype), p, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return step, ComplexMomentumState(p, q, count)

    return optax.GradientTransformation(init, update)
