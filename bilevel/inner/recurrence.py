r"""The recurrence of an LSTM over time; its kernels get their gradient in one product."""

from typing import Any

import jax
import jax.numpy as jnp

Carry = tuple[jax.Array, jax.Array]


def lstm(
    carry: Carry,
    projected: jax.Array,
    kernel: jax.Array,
    response: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> tuple[Carry, jax.Array]:
    r"""All steps of an LSTM whose input-side products are made already.

    .. math::
        z_t = x_t + h_{t-1} W + s \odot (h_{t-1} R), \qquad
        c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \qquad
        h_t = \sigma(o) \odot \tanh(c_t)

    with the gates i, f, g, o in this order in :math:`z_t`.

    Reverse mode through a loop adds :math:`h_{t-1}^\top \delta_t` to a gradient as large as W at
    every step, which for few rows costs more than the products themselves. Here the tangents of W
    and R enter as :math:`H \, \dot W` with all :math:`h_{t-1}` stacked as H, so that the gradient
    is :math:`H^\top \Delta`, one product after the loop. All modes and orders of differentiation
    work.

    Args:
      carry: ``(c, h)`` before the first step, each ``(B, n)``.
      projected: :math:`x_t`, ``(T, B, 4n)``.
      kernel: W, ``(n, 4n)``.
      response: R, ``(n, 4n)``, of a best-response layer; with ``scale``, or neither.
      scale: s, ``(B, 4n)`` or ``(1, 4n)``.

    Returns:
      The last ``(c, h)``, and all h, ``(T, B, n)``.

    Cost: T small products; a derivative keeps all :math:`z_t`, as a plain loop would.

    Reference: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997.
    """
    kernels = (kernel,) if response is None else (kernel, response)
    return _lstm(kernels, scale, carry, projected)


def _steps(kernels: Any, scale: Any, carry: Carry, projected: jax.Array) -> Any:
    def step(carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        c, h = carry
        i, f, g, o = jnp.split(x + _products(kernels, scale, h), 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    return jax.lax.scan(step, carry, projected)


def _products(kernels: Any, scale: Any, h: jax.Array) -> jax.Array:
    """Linear in ``kernels``; of one step, or of all steps stacked."""
    z = h @ kernels[0]
    if len(kernels) == 1:
        return z
    return z + jnp.expand_dims(scale, range(h.ndim - scale.ndim)) * (h @ kernels[1])


_lstm = jax.custom_jvp(_steps)


def _jvp(primals: Any, tangents: Any) -> Any:
    kernels, scale, carry, projected = primals
    # Tangents that are zero by construction come as such: a product with zeros is a product.
    kernel_dots, scale_dot, carry_dot, projected_dot = jax.tree.map(
        lambda t: None if _is_zero(t) else t, tangents, is_leaf=_is_zero
    )
    moved, moved_dots = (carry, projected), (carry_dot, projected_dot)
    if scale_dot is not None:
        moved, moved_dots = (*moved, scale), (*moved_dots, scale_dot)

    def steps(carry: Carry, projected: jax.Array, scale: Any = scale) -> Any:
        return _steps(kernels, scale, carry, projected)

    (last, outputs), push = jax.linearize(steps, *moved)
    carry_dot, projected_dot, *rest = jax.tree.map(_filled, moved, moved_dots)
    if any(t is not None for t in kernel_dots):
        before = jnp.concatenate([carry[1][None], outputs[:-1]])
        dots = jax.tree.map(_filled, kernels, kernel_dots)
        projected_dot = projected_dot + _products(dots, scale, before)
    return (last, outputs), push(carry_dot, projected_dot, *rest)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _filled(x: jax.Array, tangent: Any) -> jax.Array:
    return jnp.zeros_like(x) if tangent is None else tangent


_lstm.defjvp(_jvp, symbolic_zeros=True)
