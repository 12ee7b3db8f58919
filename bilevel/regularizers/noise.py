r"""Noise on inputs: additive and multiplicative, differentiable in its strength."""

import jax

from bilevel.ground.aliases import Key
from bilevel.ground.keys import require_key
from bilevel.regularizers.strength import floating, strengths, widened


def input_noise(key: Key, x: jax.Array, std: jax.Array | float) -> jax.Array:
    r""":math:`x + σ ε` with :math:`ε ∼ N(0, I)`.

    Args:
      key: a PRNG key.
      x: ``(B, ...)``, floating-point.
      std: :math:`σ ≥ 0` in units of ``x``; a scalar or ``(B,)``. Differentiable
        (reparametrized), so ``Implicit`` can tune it too.

    Returns:
      The shape and dtype of ``x``, computed in at least float32; NaN in the examples whose
      traced strength is negative or not finite.

    Raises:
      TypeError: integer inputs, or a `key` that is not a PRNG key.
      ValueError: a known strength out of range or of the wrong length.

    Reference: Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", 1995.
    """
    require_key(key, "`input_noise`")
    x = floating("x", x)
    wide = widened(x)
    std = strengths("std", std, x).astype(wide.dtype)
    return (wide + std * jax.random.normal(key, x.shape, wide.dtype)).astype(x.dtype)


def input_scaling(key: Key, x: jax.Array, strength: jax.Array | float) -> jax.Array:
    r""":math:`u x` with one :math:`u ∼ U(1/(1+k), 1+k)` an example.

    Args:
      key: a PRNG key.
      x: ``(B, ...)``, floating-point.
      strength: :math:`k ≥ 0`, a scalar or ``(B,)``. Differentiable (reparametrized).

    Returns and errors as :func:`input_noise`.

    Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel
    Optimization of Hyperparameters using Structured Best-Response Functions", 2019.
    """
    require_key(key, "`input_scaling`")
    x = floating("x", x, 1)
    wide = widened(x)
    high = 1 + strengths("strength", strength, x)
    u = jax.random.uniform(key, (x.shape[0],) + (1,) * (x.ndim - 1), high.dtype)
    return (wide * (1 / high + u * (high - 1 / high)).astype(wide.dtype)).astype(x.dtype)
