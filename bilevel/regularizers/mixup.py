r"""Mixed examples and softened labels."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Key
from bilevel.ground.keys import require_key
from bilevel.ground.tree import paths
from bilevel.regularizers.strength import floating, strengths, widened


def mixup(key: Key, x: Any, targets: Any, alpha: jax.Array | float) -> tuple[Any, Any]:
    r"""Convex combinations of pairs, :math:`u x_i + (1-u) x_{π(i)}`, targets alike.

    One :math:`u_i ∼ Beta(α_i, α_i)` an example and one random permutation
    :math:`π` a batch. :math:`α = 0` is the limit of no mixing.

    Args:
      key: a PRNG key.
      x: inputs, a pytree of floating-point arrays ``(B, ...)``.
      targets: the same with real targets: one-hot rows, not class numbers.
      alpha: at least 0; a scalar or ``(B,)``. Differentiable: the draw of a Beta variable has
        an implicit derivative.

    Returns:
      ``(x, targets)`` of the same shapes and dtypes, computed in at least float32; NaN in the
      examples whose traced ``alpha`` is negative or not finite.

    Raises:
      TypeError: inputs or targets that are not floating-point, or a `key` that is not a PRNG key.
      ValueError: arrays of different lengths, or a known ``alpha`` out of range.

    Cost: two gamma draws an example (rejection sampling) and one gather of the batch.

    Reference: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization",
    2018.
    """
    require_key(key, "`mixup`")
    x = _arrays("x", x)
    for path, leaf in paths(targets, "targets"):
        _refuse_class_numbers(path, leaf)
    targets = _arrays("targets", targets)
    leaves = paths(x, "x")
    if not leaves:
        raise ValueError("`x` has no arrays: there is nothing to mix. Pass inputs.")
    first, batch = leaves[0][0], leaves[0][1].shape[0]
    for path, leaf in leaves[1:] + paths(targets, "targets"):
        if leaf.shape[0] != batch:
            raise ValueError(
                f"`{path}` has {leaf.shape[0]} examples (shape {leaf.shape}), but `{first}` has "
                f"{batch}: pass inputs and targets of the same examples."
            )
    draw_key, permutation_key = jax.random.split(key)
    alpha = strengths("alpha", alpha, jax.ShapeDtypeStruct((batch,), jnp.float32))
    mixes = alpha > 1e-6
    safe = jnp.where(mixes, alpha, 1.0)  # inside the draw too: its derivative at 0 is NaN
    u = jnp.where(mixes, jax.random.beta(draw_key, safe, safe, (batch,), safe.dtype), 1.0)
    u = u + 0 * alpha  # NaN where an impossible alpha was marked by it
    other = jax.random.permutation(permutation_key, batch)

    def mix(leaf: jax.Array) -> jax.Array:
        wide = widened(leaf)
        weight = u.reshape((batch,) + (1,) * (leaf.ndim - 1)).astype(wide.dtype)
        return (weight * wide + (1 - weight) * wide[other]).astype(leaf.dtype)

    return jax.tree.map(mix, x), jax.tree.map(mix, targets)


def _arrays(name: str, tree: Any) -> Any:
    leaves = [floating(path, leaf, 1) for path, leaf in paths(tree, name)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def label_smoothing(targets: jax.Array, amount: jax.Array | float) -> jax.Array:
    r""":math:`(1 - a) y + a / K` over the last axis of ``targets``.

    Args:
      targets: ``(B, ..., K)`` one-hot or soft targets, floating-point.
      amount: :math:`a ∈ [0, 1]`, a scalar or ``(B,)``. Differentiable.

    Returns:
      The shape and dtype of ``targets``, computed in at least float32; NaN in the examples
      whose traced amount is outside [0, 1].

    Raises:
      TypeError: integer targets; one-hot encode them first.
      ValueError: targets without an axis of classes, or a known amount out of range.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture
    for Computer Vision", 2016.
    """
    _refuse_class_numbers("targets", targets)
    targets = floating("targets", targets, 2, "(B, ..., K)")
    # The classes of a row share one amount, or the row would no longer sum to one.
    rows = jax.ShapeDtypeStruct(targets.shape[:-1], targets.dtype)
    wide = widened(targets)
    amount = strengths("amount", amount, rows, 0.0, 1.0).astype(wide.dtype)[..., None]
    return ((1 - amount) * wide + amount / targets.shape[-1]).astype(targets.dtype)


def _refuse_class_numbers(name: str, targets: Any) -> None:
    dtype = getattr(targets, "dtype", jnp.float32)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be real (one-hot rows), got dtype {dtype}: use "
            "jax.nn.one_hot(labels, num_classes)."
        )
