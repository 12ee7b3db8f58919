r"""Activation regularizers of recurrent networks."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.regularizers.strength import axes, floating, strengths, widened


def activation_penalty(activations: jax.Array, strength: jax.Array | float) -> jax.Array:
    r"""AR: :math:`mean(α_i h^2)` over all entries.

    Args:
      activations: ``(B, ...)``, usually the dropped output of the last recurrent layer.
      strength: :math:`α ≥ 0`, a scalar or ``(B,)``. Differentiable.

    Returns:
      A scalar, summed in at least float32; NaN for a traced strength that is negative or not
      finite.

    Raises:
      TypeError: activations that are not floating-point.
      ValueError: no activations, or a known strength out of range or of the wrong length.

    Reference: Merity, McCann, Socher, "Revisiting Activation Regularization for Language RNNs",
    2017.
    """
    h = _activations(activations)
    alpha = strengths("strength", strength, h)
    return jnp.mean(alpha.astype(h.dtype) * h**2)


def temporal_activation_penalty(
    activations: jax.Array, strength: jax.Array | float, *, time_axis: int = 1
) -> jax.Array:
    r"""TAR: :math:`mean(β_i (h_{t+1} - h_t)^2)` over all entries.

    Args:
      activations: ``(B, T, d)``, usually the raw output of the last recurrent layer; T at
        least 2.
      strength: :math:`β ≥ 0`, a scalar or ``(B,)``. Differentiable.
      time_axis: the axis of the steps, counted as in NumPy. With 0 the leading axis holds no
        examples, and ``strength`` must be a scalar.

    Returns, errors and reference as :func:`activation_penalty`.
    """
    h = _activations(activations)
    (axis,) = axes("time_axis", (time_axis,), h.ndim)
    if h.shape[axis] < 2:
        raise ValueError(
            f"`activations` has {h.shape[axis]} step(s) along axis {time_axis}: "
            "a difference needs two."
        )
    if axis == 0 and np.ndim(strength):
        raise ValueError(
            f"`strength` has shape {np.shape(strength)}, but with `time_axis={time_axis}` the "
            "leading axis of `activations` holds steps and not examples: pass a scalar, or move "
            "the axis of the examples to the front."
        )
    steps = jnp.diff(h, axis=axis)
    beta = strengths("strength", strength, steps)
    return jnp.mean(beta.astype(h.dtype) * steps**2)


def _activations(activations: jax.Array) -> jax.Array:
    h = widened(floating("activations", activations))
    if h.size == 0:
        raise ValueError(f"`activations` is empty (shape {h.shape}): its mean is not defined.")
    return h
