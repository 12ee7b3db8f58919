r"""The recurrence of an LSTM over time; its kernel gets its gradient in one product."""

from typing import Any

import jax
import jax.numpy as jnp

Carry = tuple[jax.Array, jax.Array]


def lstm_step(carry: Carry, z: jax.Array) -> tuple[Carry, jax.Array]:
    r"""One step from what the gates receive: the new ``(c, h)``, and h.

    .. math::
        c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g),  h' = σ(o) ⊙ tanh(c')

    Args:
      carry: ``(c, h)``, each ``(B, n)``; h enters by way of ``z`` alone.
      z: the gates i, f, g, o in this order, ``(B, 4n)``.

    Reference: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997.
    """
    i, f, g, o = jnp.split(z, 4, axis=-1)
    c = jax.nn.sigmoid(f) * carry[0] + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def lstm(carry: Carry, projected: jax.Array, kernel: jax.Array) -> tuple[Carry, jax.Array]:
    r"""All steps of an LSTM whose input-side products are made: :math:`z_t = x_t + h_{t-1} W`.

    Reverse mode through a loop adds :math:`h_{t-1}ᵀ δ_t` to a gradient as large as W at
    every step, which for few rows costs more than the product itself. Here the tangent of W
    enters as :math:`H \dot W`, with all :math:`h_{t-1}` stacked as H, so that the gradient is
    :math:`Hᵀ Δ`, one product after the loop. All modes and orders of differentiation
    work. With five sequences at a time (a batch of 40 perturbed in eight groups) a training step
    takes 0.85 times what it takes through a plain loop on two CPU cores; with all 40, 0.98 times.

    Args:
      carry: ``(c, h)`` before the first step, each ``(B, n)``.
      projected: :math:`x_t`, ``(T, B, 4n)``.
      kernel: W, ``(n, 4n)``.

    Returns:
      The last ``(c, h)``, and all h, ``(T, B, n)``.

    Cost: T products of B rows. A derivative keeps all :math:`z_t`, as a plain loop does.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    n = kernel.shape[0]
    rows = projected.shape[1:2]
    fits = projected.ndim == 3 and kernel.shape[1:] == projected.shape[2:] == (4 * n,)
    if not fits or any(x.shape != (*rows, n) for x in carry):
        raise ValueError(
            "expected `projected` (T, B, 4n), `kernel` (n, 4n) and `carry` of two (B, n), got "
            f"{projected.shape}, {kernel.shape} and {[x.shape for x in carry]}."
        )
    return _lstm(carry, projected, kernel)


def _loop(carry: Carry, projected: jax.Array, kernel: jax.Array) -> tuple[Carry, jax.Array]:
    def step(carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        return lstm_step(carry, x + carry[1] @ kernel)

    return jax.lax.scan(step, carry, projected)


_lstm = jax.custom_jvp(_loop)


def _jvp(primals: Any, tangents: Any) -> Any:
    carry, projected, kernel = primals
    # Tangents that are zero by construction come as such: a product with zeros is a product.
    carry_dot, projected_dot, kernel_dot = jax.tree.map(
        lambda t: None if _is_zero(t) else t, tangents, is_leaf=_is_zero
    )
    moved = (carry, projected)
    (last, outputs), push = jax.linearize(lambda c, x: _loop(c, x, kernel), *moved)
    carry_dot, projected_dot = jax.tree.map(_filled, moved, (carry_dot, projected_dot))
    if kernel_dot is not None:
        before = jnp.concatenate([carry[1][None], outputs[:-1]])
        projected_dot = projected_dot + before @ kernel_dot
    return (last, outputs), push(carry_dot, projected_dot)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _filled(x: jax.Array, tangent: Any) -> jax.Array:
    return jnp.zeros_like(x) if tangent is None else tangent


_lstm.defjvp(_jvp, symbolic_zeros=True)
