r"""Noise on inputs: additive and multiplicative, differentiable in its strength."""

import jax

from bilevel.aliases import Key
from bilevel.regularizers.strength import along_examples, check_strength


def input_noise(key: Key, x: jax.Array, std: jax.Array | float) -> jax.Array:
    r""":math:`x + \sigma\,\varepsilon` with :math:`\varepsilon \sim N(0, I)`.

    Args:
      key: a PRNG key.
      x: ``(B, ...)``.
      std: :math:`\sigma \ge 0` in units of ``x``; a scalar or ``(B,)``. Differentiable
        (reparametrised), so ``Implicit`` can tune it too.

    Reference: Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", 1995.
    """
    check_strength("std", std)
    std = along_examples("std", std, x).astype(x.dtype)
    return x + std * jax.random.normal(key, x.shape, x.dtype)


def input_scaling(key: Key, x: jax.Array, strength: jax.Array | float) -> jax.Array:
    r""":math:`u\,x` with one :math:`u \sim U(1/(1+k), 1+k)` an example.

    Args:
      key: a PRNG key.
      x: ``(B, ...)``.
      strength: :math:`k \ge 0`, a scalar or ``(B,)``. Differentiable (reparametrised).

    Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel
    Optimization of Hyperparameters using Structured Best-Response Functions", 2019.
    """
    check_strength("strength", strength)
    high = 1 + along_examples("strength", strength, x)
    u = jax.random.uniform(key, (x.shape[0],) + (1,) * (x.ndim - 1), high.dtype)
    return x * (1 / high + u * (high - 1 / high)).astype(x.dtype)
