r"""The curvature of a likelihood in function space: :math:`M = R J P_0^{-1} Jᵀ R`.

J is the Jacobian of the model's outputs, :math:`P_0` the prior precision and :math:`R = Q^{1/2}`
the root of the Hessian of each example's loss in its outputs. Then :math:`log|I + M|` is
:math:`log|P| - log|P_0|` of the Laplace approximation, from a matrix of examples x outputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Params, Scalar, Vector
from bilevel.ground.batches import is_single_key
from bilevel.ground.factor import cholesky
from bilevel.ground.tree import paths


@jax.custom_jvp
def psd_root(q: jax.Array) -> jax.Array:
    """The symmetric root of a positive semi-definite matrix; NaN for one that is indefinite.

    Its derivative exists for singular and repeated eigenvalues, unlike that of ``eigh``: that of a
    softmax has both.
    """
    values, vectors = jnp.linalg.eigh(q)
    # Rounding of a zero, 1e-17, would be 3e-9 in the root.
    zero = (jnp.abs(values) <= _rounding(values)) | (values < 0)
    values = jnp.where(is_psd(values), jnp.where(zero, 0, values), jnp.nan)
    return (vectors * jnp.sqrt(values)[None]) @ vectors.T


@psd_root.defjvp
def _root_rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (q,), (dq,) = primals, tangents
    root = psd_root(q)
    values, vectors = jnp.linalg.eigh(root)
    # R dR + dR R = dQ, in the basis of R. Where both eigenvalues vanish, so does dQ on the cone.
    sums = values[:, None] + values[None, :]
    cut = values.shape[0] * jnp.sqrt(jnp.finfo(q.dtype).eps) * jnp.max(jnp.abs(values))
    kept = sums > cut
    parts = vectors.T @ dq @ vectors
    return root, vectors @ jnp.where(kept, parts / jnp.where(kept, sums, 1), 0) @ vectors.T


def is_psd(eigenvalues: jax.Array) -> jax.Array:
    """Whether eigenvalues are at least zero, rounding aside.

    That of a sure classifier, diag(p) - p pᵀ, is a small difference of numbers near one, so that
    its rounding does not shrink with it.
    """
    absolute = eigenvalues.shape[-1] * jnp.finfo(eigenvalues.dtype).eps
    floor = jnp.maximum(_rounding(eigenvalues), 2 * absolute)
    return jnp.min(eigenvalues, axis=-1, keepdims=True) >= -floor


def _rounding(eigenvalues: jax.Array) -> jax.Array:
    """What cannot be told from zero."""
    eps = 100 * eigenvalues.shape[-1] * jnp.finfo(eigenvalues.dtype).eps
    return eps * jnp.max(jnp.abs(eigenvalues), axis=-1, keepdims=True)


def num_in(batch: Batch) -> int:
    """How many examples a batch has: the leading axis of its arrays."""
    lengths = {
        path: jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0
        for path, leaf in paths(batch, "batch")
        if not is_single_key(leaf)
    }
    if not lengths or 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(
            "`batch`: an evidence needs examples along the leading axis of every array, as many in "
            f"each, got lengths {lengths or 'of no arrays'}: what is no example belongs in "
            "`hparams` or a closure."
        )
    return next(iter(lengths.values()))


def per_example(function: Callable[[Batch, jax.Array], Any], batch: Batch) -> Any:
    """``function(batch of this example alone, index)``, mapped; a single key is split."""
    index = jnp.arange(num_in(batch))
    keys = jax.tree.map(is_single_key, batch)
    each = jax.tree.map(
        lambda x, key: jax.vmap(lambda i: jax.random.fold_in(x, i))(index) if key else x,
        batch, keys,
    )  # fmt: skip

    def one(example: Batch, i: jax.Array) -> Any:
        alone = jax.tree.map(lambda x, key: x if key else x[None], example, keys)
        return function(alone, i)

    return jax.vmap(one)(each, index)


def outputs_of(
    model: Callable[..., Any], params: Params, hparams: Hparams, example: Batch
) -> jax.Array:
    """The outputs of one example, as a vector."""
    out = model(params, hparams, example)
    shape = getattr(out, "shape", None)
    if shape is None or len(shape) not in (1, 2) or shape[0] != 1:
        raise ValueError(
            "`model` must return one array of outputs, of shape (examples,) or (examples, "
            f"outputs), got {_shape_of(out)} for one example."
        )
    return out.reshape(-1)


def _shape_of(value: Any) -> Any:
    return getattr(value, "shape", jax.tree.structure(value))


def likelihood_of(
    likelihood: Callable[..., Any], outputs: jax.Array, flat: bool, hparams: Hparams, example: Batch
) -> Scalar:
    """The negative log-likelihood of one example, from its outputs as a vector."""
    value = likelihood(outputs if flat else outputs[None], hparams, example)
    if getattr(value, "shape", None) != (1,):
        raise ValueError(
            "`likelihood` must return one negative log-likelihood per example, of shape "
            f"(examples,), got {_shape_of(value)} for one example: leave the sum or the mean over "
            "examples out."
        )
    return value[0]


def log_volume(rows: Vector, scales: Vector, ids: jax.Array | None) -> Scalar:
    r""":math:`log|I + G P_0^{-1} Gᵀ|` for rows ``(m, *leaf)`` and :math:`P_0^{-1/2}` of each leaf.

    Where there are fewer parameters than rows, the same determinant of a matrix of parameters.
    With ``ids``, a number per row, rows of different numbers are taken apart.
    """
    parts = []
    for g, s in zip(jax.tree.leaves(rows), jax.tree.leaves(scales), strict=True):
        wide = s.reshape((1,) * (g.ndim - s.ndim) + s.shape)
        parts.append((g * wide).reshape(g.shape[0], -1))
    if ids is None and sum(g.shape[1] for g in parts) < parts[0].shape[0]:
        whole = jnp.concatenate(parts, axis=1)
        return log_det(whole.T @ whole)
    matrix = functools.reduce(jnp.add, [g @ g.T for g in parts])
    if ids is not None:  # a permutation of blocks: zeros between groups
        matrix = jnp.where(ids[:, None] == ids[None, :], matrix, 0)
    return log_det(matrix)


def log_det(matrix: jax.Array) -> Scalar:
    """:math:`\\log|I + M|` of a positive semi-definite M."""
    factor = cholesky(matrix + jnp.eye(matrix.shape[0], dtype=matrix.dtype))
    return 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
