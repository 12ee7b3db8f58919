r"""Penalties on weights: one strength for all, or one a tensor, a unit or a weight.

Strengths are logarithms, :math:`e^{\lambda}`: any real :math:`\lambda` is legal, and a step of
an outer optimiser is a relative change.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bilevel.aliases import Params, Scalar
from bilevel.leaves import select
from bilevel.tree import accumulate


def l2_penalty(
    params: Params, log_strength: Any, *, leaves: str | Sequence[str] | None = None
) -> Scalar:
    r""":math:`\tfrac12 \sum_j e^{\lambda_j} w_j^2`.

    Args:
      params: the weights, any pytree.
      log_strength: :math:`\lambda`: a scalar for all, or a dictionary from the path of a leaf to
        a scalar, to ``(out,)`` (one a unit, along the last axis) or to the shape of the leaf,
        as made by :func:`penalty_init`.
      leaves: part of the path of the leaves to penalise, such as ``"kernel"``; all if ``None``.
        With a dictionary, those it names.

    Returns:
      A scalar, summed in at least float32. Its gradient is :math:`e^{\lambda} w`: plain weight
      decay of strength :math:`e^{\lambda}`.

    Raises:
      ValueError: no leaf has that name, or a strength's shape does not fit its leaf.
    """
    return 0.5 * _penalty(params, log_strength, leaves, jnp.square)


def l1_penalty(
    params: Params, log_strength: Any, *, leaves: str | Sequence[str] | None = None
) -> Scalar:
    r""":math:`\sum_j e^{\lambda_j} |w_j|`. Arguments and errors as :func:`l2_penalty`.

    At zero the derivative is taken as 0 and the curvature everywhere as 0: an implicit
    hypergradient is right on the weights that are not at a kink.
    """
    return _penalty(params, log_strength, leaves, jnp.abs)


def penalty_init(
    params: Params,
    strength: float,
    level: Literal["tensor", "unit", "weight"] = "tensor",
    *,
    leaves: str | Sequence[str] | None = None,
) -> dict[str, jax.Array]:
    r"""First hyperparameters for a penalty: ``{path of leaf: log strength}``.

    Args:
      params: the weights.
      strength: :math:`e^{\lambda}`, above 0.
      level: one number a leaf, one an output unit (last axis), or one a weight.
      leaves: part of the paths of the leaves to penalise; all if ``None``.
    """
    shapes: dict[str, Callable[[jax.Array], tuple[int, ...]]] = {
        "tensor": lambda leaf: (),
        "unit": lambda leaf: jnp.shape(leaf)[-1:],
        "weight": jnp.shape,
    }
    if level not in shapes:
        raise ValueError(f"`level` must be one of {sorted(shapes)}, got {level!r}.")
    if not strength > 0:
        raise ValueError(f"`strength` must be above 0 (its logarithm is kept), got {strength}.")
    return {
        path: jnp.full(shapes[level](leaf), jnp.log(strength), accumulate(leaf).dtype)
        for path, leaf in select(params, leaves)
    }


def _penalty(
    params: Params,
    log_strength: Any,
    leaves: str | Sequence[str] | None,
    of_weight: Callable[[jax.Array], jax.Array],
) -> Scalar:
    per_leaf = isinstance(log_strength, dict)
    chosen = dict(select(params, leaves))
    if per_leaf:
        unknown = sorted(set(log_strength) - set(chosen))
        if unknown:
            raise ValueError(
                f"`log_strength` names {', '.join(unknown)}, but the parameters have "
                f"{', '.join(sorted(chosen))}."
            )
        chosen = {path: chosen[path] for path in log_strength}
    elif jnp.ndim(log_strength) != 0:
        raise ValueError(
            f"`log_strength` has shape {jnp.shape(log_strength)}, expected a scalar, or a "
            "dictionary from the path of each leaf (see `penalty_init`)."
        )
    total = jnp.zeros((), jnp.float32)
    for path, leaf in chosen.items():
        leaf = accumulate(leaf)
        log_s = jnp.asarray(log_strength[path] if per_leaf else log_strength)
        # Weighing the sums and not the weights saves a pass over them where one strength serves.
        if log_s.shape == ():
            value = jnp.exp(log_s) * jnp.sum(of_weight(leaf))
        elif log_s.shape == leaf.shape:
            value = jnp.sum(jnp.exp(log_s) * of_weight(leaf))
        elif log_s.shape == leaf.shape[-1:]:
            value = jnp.sum(jnp.exp(log_s) * jnp.sum(of_weight(leaf), range(leaf.ndim - 1)))
        else:
            raise ValueError(
                f"`log_strength` of {path} has shape {log_s.shape}, expected (), "
                f"{leaf.shape[-1:]} or {leaf.shape}."
            )
        total = total + value
    return total
