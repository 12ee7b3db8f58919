r"""A model linear in its parameters, as a Gauss–Newton operator may use it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Params, Vector
from bilevel.ground.settings import check_settings, check_takes


@dataclasses.dataclass(frozen=True)
class LinearModel:
    r"""The model :math:`z = X W + b` for a :class:`GaussNewton` that may use its structure.

    Args:
      features: ``features(hparams, batch) -> X``, (N, D).

      store_transpose: keep :math:`Xᵀ` beside X for the products of a solve, which takes the
        memory of the features once more. ``None`` decides by itself: on CPU, for several outputs,
        where a product that reads X against its memory order is slower by half.

    ``params`` is W, (D, C) or (D,), or a pair ``(W, b)``, or a mapping with ``kernel`` and,
    optionally, ``bias``, (C,). Knowing this form buys two things: the exact diagonal of the
    Gauss–Newton matrix for less than a gradient (see :class:`~bilevel.Diagonal`), and products
    that read X in the order it is stored, which XLA's own transpose of a thin product does not.
    """

    features: Callable[[Hparams, Batch], jax.Array] = dataclasses.field(metadata={"static": True})
    store_transpose: bool | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        check_settings(self)
        check_takes("features", self.features, "features(hparams, batch)")

    def __call__(self, params: Params, hparams: Hparams, batch: Batch, *state: Any) -> jax.Array:
        """Outputs, (N, C) or (N,)."""
        return self.apply(params, self.features(hparams, batch))

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        """Outputs for given features."""
        kernel, bias = _kernel_and_bias(params)
        z = x @ kernel
        return z if bias is None else z + jnp.broadcast_to(bias, z.shape)

    def stored(self, x: jax.Array, z: jax.Array) -> jax.Array | None:
        """The transpose of the features, if it is to be kept for many products with such ``z``."""
        keep = self.store_transpose
        if keep is None:
            # With one output both orders take the time of reading X.
            keep = jax.default_backend() == "cpu" and z.ndim == 2
        # Without the barrier XLA folds the transpose back into each product.
        return jax.lax.optimization_barrier(x.T) if keep else None

    def transpose(
        self, params: Params, x: jax.Array, u: jax.Array, stored: jax.Array | None = None
    ) -> Vector:
        r""":math:`Jᵀ u`, shaped like ``params``; from :meth:`stored` where that is given."""
        kernel, bias = _kernel_and_bias(params)
        if stored is not None:
            d_kernel = stored @ u
        elif u.ndim == 2:
            # The barrier keeps XLA from folding the transpose back into `x.T @ u`, which
            # walks X against its memory order and takes twice the time for few columns.
            d_kernel = (jax.lax.optimization_barrier(u.T) @ x).T
        else:
            d_kernel = u @ x
        d_bias = None if bias is None else u.sum(0)
        return _assembled(params, d_kernel.astype(kernel.dtype), d_bias)


def _kernel_and_bias(params: Params) -> tuple[jax.Array, jax.Array | None]:
    if isinstance(params, (tuple, list)):
        kernel, bias = params
        return kernel, bias
    if hasattr(params, "keys"):
        extra = set(params.keys()) - {"kernel", "bias"}
        if extra or "kernel" not in params:
            raise ValueError(
                "LinearModel expects params with the keys 'kernel' and, optionally, 'bias', got "
                f"{sorted(map(str, params.keys()))}. Use a plain function for other models."
            )
        return params["kernel"], params.get("bias")
    return params, None


def _assembled(params: Params, kernel: jax.Array, bias: jax.Array | None) -> Vector:
    leaves = [kernel] if bias is None else [kernel, bias]
    if hasattr(params, "keys") and bias is not None:
        # A mapping flattens in its own order: sorted for most, as inserted for some.
        path = jax.tree_util.tree_flatten_with_path(params)[0][0][0]
        leaves = leaves if "kernel" in jax.tree_util.keystr(path[:1]) else leaves[::-1]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
