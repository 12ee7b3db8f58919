r"""Mixed examples and softened labels."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.aliases import Key
from bilevel.regularizers.strength import along_examples, check_strength


def mixup(key: Key, x: Any, targets: Any, alpha: jax.Array | float) -> tuple[Any, Any]:
    r"""Convex combinations of pairs, :math:`u\,x_i + (1-u)\,x_{\pi(i)}`, targets alike.

    One :math:`u_i \sim \mathrm{Beta}(\alpha_i, \alpha_i)` an example and one random permutation
    :math:`\pi` a batch. :math:`\alpha = 0` is the limit of no mixing.

    Args:
      key: a PRNG key.
      x: inputs, a pytree of arrays ``(B, ...)``.
      targets: the same with real targets: one-hot rows, not class numbers.
      alpha: at least 0; a scalar or ``(B,)``. Differentiable: the draw of a Beta variable has
        an implicit derivative.

    Returns:
      ``(x, targets)`` of the same shapes and dtypes.

    Raises:
      TypeError: integer targets; one-hot encode them first.
      ValueError: a known negative ``alpha``.

    Cost: two gamma draws an example (rejection sampling) and one gather of the batch.

    Reference: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization",
    2018.
    """
    check_strength("alpha", alpha)
    for leaf in jax.tree.leaves(targets):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"`targets` of `mixup` must be real (one-hot rows), got dtype {leaf.dtype}: use "
                "jax.nn.one_hot(labels, num_classes)."
            )
    batch = jax.tree.leaves(x)[0].shape[0]
    draw_key, permutation_key = jax.random.split(key)
    alpha = along_examples("alpha", alpha, jax.ShapeDtypeStruct((batch,), jnp.float32))
    mixes = alpha > 1e-6
    safe = jnp.where(mixes, alpha, 1.0)  # inside the draw too: its derivative at 0 is NaN
    u = jnp.where(mixes, jax.random.beta(draw_key, safe, safe, (batch,), safe.dtype), 1.0)
    other = jax.random.permutation(permutation_key, batch)

    def mix(leaf: jax.Array) -> jax.Array:
        weight = along_examples("alpha", u, leaf).astype(leaf.dtype)
        return weight * leaf + (1 - weight) * leaf[other]

    return jax.tree.map(mix, x), jax.tree.map(mix, targets)


def label_smoothing(targets: jax.Array, amount: jax.Array | float) -> jax.Array:
    r""":math:`(1 - a)\,y + a / K` over the last axis of ``targets``.

    Args:
      targets: ``(B, ..., K)`` one-hot or soft targets.
      amount: :math:`a \in [0, 1]`, a scalar or ``(B,)``. Differentiable.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture
    for Computer Vision", 2016.
    """
    check_strength("amount", amount, 0.0, 1.0)
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(
            f"`targets` must be real (one-hot rows), got dtype {targets.dtype}: use "
            "jax.nn.one_hot(labels, num_classes)."
        )
    amount = along_examples("amount", amount, targets).astype(targets.dtype)
    return (1 - amount) * targets + amount / targets.shape[-1]
