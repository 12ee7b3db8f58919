r"""Proximal operators of penalties that are not smooth: what :class:`~bilevel.Composite` takes.

.. math:: prox_{s r}(v) = argmin_w ½ ‖w - v‖^2 + s r(w)

Each is called ``operator(params, strength, step_size)``, as a condition calls it where the
hyperparameters are the strengths themselves; of logarithms, write
``lambda w, lam, s: prox.l1(w, jnp.exp(lam), s)``. Projections on constraints (boxes, simplices,
balls, half spaces) are in ``optax.projections`` and read no step size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Params
from bilevel.regularizers.strength import check_strength, floating, real_dtype


def l1(params: Params, strength: Any, step_size: Any = 1.0) -> Params:
    r"""Soft-thresholding, of :math:`r(w) = ∑_j a_j |w_j|`.

    .. math:: sign(v_j) max(|v_j| - s a_j, 0)

    Args:
      params: v, any pytree of floating-point arrays.
      strength: :math:`a ≥ 0`: a scalar for all, or a tree like ``params`` whose leaves are
        scalars, ``(out,)`` (one per unit, along the last axis) or of the shape of their leaf.
      step_size: s.

    Returns:
      A tree like ``params``.

    Raises:
      TypeError: what is not a real number.
      ValueError: a strength of another structure or shape, or a known one below 0 or not finite.
        Traced ones give NaN there.
    """
    return _by_leaf(_soft, params, {"strength": strength}, step_size)


def elastic_net(params: Params, strength: Any, step_size: Any = 1.0) -> Params:
    r"""Of :math:`r(w) = ∑_j a_j |w_j| + ½ b_j w_j^2`: soft-thresholding, then shrinkage.

    .. math:: sign(v_j) \frac{max(|v_j| - s a_j, 0)}{1 + s b_j}

    Args:
      params, step_size: as in :func:`l1`.
      strength: a pair (a, b), each as in :func:`l1`.

    Returns, raises: as :func:`l1`.
    """
    if not isinstance(strength, (tuple, list)) or len(strength) != 2:
        raise ValueError(
            f"`strength` must be a pair (of the L1 part, of the L2 part), got {strength!r}."
        )

    def shrunk(v: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return _soft(v, a) / (1 + b)

    named = {"strength[0]": strength[0], "strength[1]": strength[1]}
    return _by_leaf(shrunk, params, named, step_size)


def group_lasso(
    params: Params, strength: Any, step_size: Any = 1.0, *, axis: int | tuple[int, ...] = -1
) -> Params:
    r"""Block soft-thresholding, of :math:`r(w) = ∑_G a_G ‖w_G‖`.

    .. math:: v_G max \Bigl(1 - \frac{s a_G}{‖v_G‖}, 0\Bigr)

    Args:
      params, step_size: as in :func:`l1`. The groups are the vectors along ``axis`` of each leaf:
        with the default, all weights that leave one input of a kernel ``(in, out)``.
      strength: :math:`a ≥ 0`: a scalar for all, or a tree like ``params`` whose leaves are
        scalars or have one number per group, the shape of their leaf without ``axis``.
      axis: the axis, or axes, along which the numbers of a group lie.

    Returns, raises: as :func:`l1`.
    """

    def shrunk(v: jax.Array, a: jax.Array) -> jax.Array:
        square = jnp.sum(v * v, axis, keepdims=True)
        # No root of zero, whose derivative is infinite.
        norm = jnp.sqrt(jnp.where(square > 0, square, 1))
        return jnp.where((square <= a**2) & (a > 0), 0, v * (1 - a / norm))

    return _by_leaf(shrunk, params, {"strength": strength}, step_size, axis)


def _soft(v: jax.Array, threshold: jax.Array) -> jax.Array:
    # Neither a maximum nor a clip: at the threshold they have the mean of the derivatives of its
    # two sides. A threshold of zero changes nothing, nor does it the derivative.
    held = (jnp.abs(v) <= threshold) & (threshold > 0)
    return jnp.where(held, 0, v - jnp.sign(v) * threshold)


def _by_leaf(
    function: Any, params: Params, strengths: dict[str, Any], step_size: Any, axis: Any = None
) -> Params:
    """``function(v, s a, ...)`` on every leaf, with each of ``strengths`` laid along it."""
    check_strength("step_size", step_size)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not flat:
        raise ValueError("`params` has no arrays: there is nothing to penalize. Pass the weights.")
    laid = {name: _leaves(name, value, treedef) for name, value in strengths.items()}
    out = []
    for i, (path, leaf) in enumerate(flat):
        where = jax.tree_util.keystr(path)
        v = floating(f"params{where}", leaf)
        thresholds = []
        for name, leaves in laid.items():
            a = _along(f"{name}{where}", leaves[i], v, axis)
            thresholds.append((jnp.asarray(step_size) * a).astype(v.dtype))
        out.append(function(v, *thresholds))
    return jax.tree.unflatten(treedef, out)


def _leaves(name: str, value: Any, treedef: Any) -> list[Any]:
    """One strength per leaf: the leaves of a tree like ``params``, or one number for all."""
    if jax.tree.structure(value) == treedef:
        return jax.tree.leaves(value)
    if jax.tree.structure(value) == jax.tree.structure(0.0) and jnp.ndim(value) == 0:
        return [value] * treedef.num_leaves
    raise ValueError(
        f"`{name}` must be a scalar or have the tree structure of `params`, {treedef}, got "
        f"{jax.tree.structure(value)}."
    )


def _along(name: str, value: Any, v: jax.Array, axis: Any) -> jax.Array:
    """A strength, checked, with axes of length one where it says the same for all of ``v``."""
    dtype = real_dtype(name, value)
    check_strength(name, value)
    a = jnp.asarray(value, dtype)
    # A product and not a selection: the derivative in an impossible strength is NaN as well.
    a = a * jnp.where((a >= 0) & (a < jnp.inf), 1, jnp.nan).astype(dtype)
    if axis is None:
        fits = [(), v.shape[-1:], v.shape]
    else:
        axes = {i % max(v.ndim, 1) for i in ((axis,) if isinstance(axis, int) else axis)}
        fits = [(), tuple(n for i, n in enumerate(v.shape) if i not in axes)]
        if a.shape == fits[1]:
            return jnp.expand_dims(a, tuple(sorted(axes)))
    if a.shape not in fits:
        shapes = ", ".join(str(s) for s in dict.fromkeys(fits))
        raise ValueError(f"`{name}` has shape {a.shape}, expected one of {shapes}.")
    return a.reshape((1,) * (v.ndim - a.ndim) + a.shape) if a.ndim else a
