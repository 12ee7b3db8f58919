r"""Activation regularisers of recurrent networks."""

import jax
import jax.numpy as jnp

from bilevel.regularizers.strength import along_examples, check_strength
from bilevel.tree import accumulate


def activation_penalty(activations: jax.Array, strength: jax.Array | float) -> jax.Array:
    r"""AR: :math:`\mathrm{mean}(\alpha_i\,h^2)` over all entries.

    Args:
      activations: ``(B, ...)``, usually the dropped output of the last recurrent layer.
      strength: :math:`\alpha \ge 0`, a scalar or ``(B,)``. Differentiable.

    Returns:
      A scalar, summed in at least float32.

    Reference: Merity, McCann, Socher, "Revisiting Activation Regularization for Language RNNs",
    2017.
    """
    check_strength("strength", strength)
    h = accumulate(activations)
    return jnp.mean(along_examples("strength", strength, h).astype(h.dtype) * h**2)


def temporal_activation_penalty(
    activations: jax.Array, strength: jax.Array | float, *, time_axis: int = 1
) -> jax.Array:
    r"""TAR: :math:`\mathrm{mean}(\beta_i\,(h_{t+1} - h_t)^2)` over all entries.

    Args:
      activations: ``(B, T, d)``, usually the raw output of the last recurrent layer; T at
        least 2.
      strength: :math:`\beta \ge 0`, a scalar or ``(B,)``. Differentiable.
      time_axis: the axis of the steps.

    Reference: as :func:`activation_penalty`.
    """
    check_strength("strength", strength)
    if activations.shape[time_axis] < 2:
        raise ValueError(
            f"`activations` has {activations.shape[time_axis]} step(s) along axis {time_axis}: "
            "a difference needs two."
        )
    h = accumulate(activations)
    steps = jnp.diff(h, axis=time_axis)
    return jnp.mean(along_examples("strength", strength, h).astype(h.dtype) * steps**2)
