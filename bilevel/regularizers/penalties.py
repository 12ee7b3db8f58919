r"""Penalties on weights: one strength for all, or one per tensor, unit or weight.

Strengths are logarithms, :math:`e^{λ}`: any finite :math:`λ` is legal, and a step of
an outer optimizer is a relative change.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Params, Scalar
from bilevel.ground.leaves import select
from bilevel.ground.settings import check_real, concrete
from bilevel.ground.tree import accumulate
from bilevel.regularizers.strength import describe, real_dtype


def l2_penalty(
    params: Params, log_strength: Any, *, leaves: str | Sequence[str] | None = None
) -> Scalar:
    r""":math:`½ ∑_j e^{λ_j} w_j^2`.

    Args:
      params: the weights, any pytree.
      log_strength: :math:`λ`: a scalar for all, or a dictionary from the path of a leaf to
        a scalar, to ``(out,)`` (one per unit, along the last axis) or to the shape of the leaf,
        as made by :func:`penalty_init`.
      leaves: part of the path of the leaves to penalize, such as ``"kernel"``; all if ``None``.
        With a dictionary, those it names.

    Returns:
      A scalar, summed in at least float32. Its gradient is :math:`e^{λ} w`: plain weight
      decay of strength :math:`e^{λ}`.

    Raises:
      TypeError: a strength that is not a real number, or a penalized leaf that is not
        floating-point.
      ValueError: no leaf has that name, a strength's shape does not fit its leaf, or a known one
        is not finite.
    """
    return 0.5 * _penalty(params, log_strength, leaves, jnp.square)


def l1_penalty(
    params: Params, log_strength: Any, *, leaves: str | Sequence[str] | None = None
) -> Scalar:
    r""":math:`∑_j e^{λ_j} |w_j|`. Arguments and errors as :func:`l2_penalty`.

    At zero the derivative is taken as 0 and the curvature everywhere as 0. Wherever some weight
    is zero at the solution, the gradient of the loss is not zero there, and an implicit
    hypergradient is wrong in *every* component, also for the weights that are not at the kink:
    the solve lets the weights at zero respond, which they do not. Its status is then
    ``not_stationary``. Three ways are right:

    - ``Composite(loss, prox)`` in place of the loss, with :func:`bilevel.prox.l1` and the loss
      without the penalty (see ``docs/nonsmooth.md``);
    - restrict ``params`` to the support: fit, keep the weights that are not zero, and pass only
      those to the losses;
    - ``Unroll`` with a step of soft-thresholding, which keeps zeros at zero. The penalty then
      stands in the optimizer and not in the loss::

        def proximal(log_strength, step_size):
            def update(updates, state, params):
                moved = optax.apply_updates(params, updates)
                kept = jnp.abs(moved) - step_size * jnp.exp(log_strength)
                return jnp.sign(moved) * jnp.maximum(kept, 0) - params, state
            soft = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
            return optax.chain(optax.sgd(step_size), soft)

        response = bilevel.Unroll(lambda h: proximal(h, step_size), steps)
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
      strength: :math:`e^{λ}`, one number above 0.
      level: one number per leaf, per output unit (last axis) or per weight.
      leaves: part of the paths of the leaves to penalize; all if ``None``.

    Raises:
      TypeError: a strength that is not a real number, or a chosen leaf that is not floating-point.
      ValueError: no leaf has that name, an unknown level, or a known strength that is not above 0
        and finite.
    """
    shapes: dict[str, Callable[[jax.Array], tuple[int, ...]]] = {
        "tensor": lambda leaf: (),
        "unit": lambda leaf: jnp.shape(leaf)[-1:],
        "weight": jnp.shape,
    }
    if not isinstance(level, str) or level not in shapes:
        raise ValueError(f"`level` must be one of {sorted(shapes)}, got {level!r}.")
    real_dtype("strength", strength)
    if np.shape(strength) != ():
        raise ValueError(
            f"`strength` has shape {np.shape(strength)}, expected one number: set the entries of "
            "the result where they should differ."
        )
    if concrete(strength):
        # In double precision: 1e-60 has a logarithm, but is 0 in float32.
        strength = float(strength)
        if not 0 < strength < np.inf:
            raise ValueError(
                "`strength` must be above 0 and finite (its logarithm is kept), got "
                f"{strength}: leave a leaf out of `leaves` for no penalty."
            )
        log_strength = np.log(strength)
    else:
        log_strength = jnp.log(strength)
    chosen = _chosen(params, leaves)
    for path, leaf in chosen:
        _check_weights(path, leaf)
    return {
        path: jnp.full(shapes[level](leaf), log_strength, accumulate(leaf).dtype)
        for path, leaf in chosen
    }


def _chosen(params: Params, leaves: str | Sequence[str] | None) -> list[tuple[str, jax.Array]]:
    """``(path, leaf)`` of the leaves to penalize, which must be floating-point."""
    names = [] if leaves is None else [leaves] if isinstance(leaves, str) else leaves
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "`leaves` must be a part of the path of a leaf, such as 'kernel', a sequence of them, "
            f"or None for all, got {leaves!r}."
        )
    if leaves is not None and not names:
        raise ValueError("`leaves` is empty: name at least one leaf, or pass None for all.")
    found = select(params, leaves)
    if not found:
        raise ValueError("`params` has no arrays: there is nothing to penalize. Pass the weights.")
    return found


def _check_weights(path: str, leaf: Any) -> None:
    real = isinstance(leaf, float) or jnp.issubdtype(getattr(leaf, "dtype", int), jnp.floating)
    if not real:
        raise TypeError(
            f"`params`{path} is {describe(leaf)}, expected floating-point weights: name those to "
            "penalize with `leaves`."
        )


def _penalty(
    params: Params,
    log_strength: Any,
    leaves: str | Sequence[str] | None,
    of_weight: Callable[[jax.Array], jax.Array],
) -> Scalar:
    chosen = dict(_chosen(params, leaves))
    per_leaf = isinstance(log_strength, Mapping)
    if per_leaf:
        unknown = sorted(str(path) for path in set(log_strength) - set(chosen))
        if unknown:
            raise ValueError(
                f"`log_strength` names {', '.join(unknown)}, but the parameters have only "
                f"{', '.join(sorted(chosen))}."
            )
        if not log_strength:
            raise ValueError(
                "`log_strength` is an empty dictionary: name at least one leaf, of "
                f"{', '.join(sorted(chosen))}."
            )
        strengths = {path: log_strength[path] for path in log_strength}
    elif np.ndim(log_strength) != 0:
        raise ValueError(
            f"`log_strength` has shape {np.shape(log_strength)}, expected a scalar, or a "
            "dictionary from the path of each leaf (see `penalty_init`)."
        )
    else:
        strengths = dict.fromkeys(chosen, log_strength)
    total = jnp.zeros((), jnp.float32)
    for path, log_s in strengths.items():
        total = total + _of_leaf(path, chosen[path], log_s, of_weight)
    return total


def _of_leaf(
    path: str, leaf: Any, log_s: Any, of_weight: Callable[[jax.Array], jax.Array]
) -> Scalar:
    """The penalty of one leaf, in at least float32."""
    _check_weights(path, leaf)
    name = f"log_strength{path}"
    dtype = real_dtype(name, log_s)
    check_real(name, log_s, hint=" Leave the leaf out for no penalty.")
    leaf, log_s = accumulate(leaf), jnp.asarray(log_s, dtype)
    # Weighing the sums and not the weights saves a pass over them where one strength serves.
    if log_s.shape == ():
        return jnp.exp(log_s) * jnp.sum(of_weight(leaf))
    if log_s.shape == leaf.shape:
        return jnp.sum(jnp.exp(log_s) * of_weight(leaf))
    if log_s.shape == leaf.shape[-1:]:
        return jnp.sum(jnp.exp(log_s) * jnp.sum(of_weight(leaf), range(leaf.ndim - 1)))
    raise ValueError(
        f"`log_strength` of {path} has shape {log_s.shape}, expected (), "
        f"{leaf.shape[-1:]} or {leaf.shape}."
    )
