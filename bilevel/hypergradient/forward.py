r"""Forward mode: one tangent per hyperparameter, pushed along with the training steps.

.. math:: Z_{t+1} = (∂_w U_t) Z_t + ∂_λ U_t,
    indirect = Z_Tᵀ g
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams
from bilevel.inner.descend import InnerState
from bilevel.inner.mixed import is_cotangent, is_float


def no_tangents(carry: InnerState, p: int) -> list[jax.Array]:
    """``p`` zero tangents of every floating-point leaf of a training state, stacked."""
    return tree.stacked_zeros(p, [x for x in jax.tree.leaves(carry) if is_float(x)])


def _floats(carry: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(carry) if is_float(x)]


def _with_floats(carry: InnerState, floats: list[Any]) -> InnerState:
    values = iter(floats)
    return jax.tree.map(lambda x: next(values) if is_float(x) else x, carry)


def _basis(hparams: Hparams) -> Hparams:
    """The p unit vectors of the space of hyperparameters, stacked along a leading axis."""
    leaves, treedef = jax.tree.flatten(hparams)
    p, offset, out = tree.size(hparams), 0, []
    for leaf in leaves:
        size = int(np.prod(jnp.shape(leaf)))
        block = jnp.eye(p, size, -offset, dtype=leaf.dtype)
        out.append(block.reshape(p, *jnp.shape(leaf)))
        offset += size
    return jax.tree.unflatten(treedef, out)


def push_forward(
    begin: Callable[[Hparams], InnerState],
    finish: Callable[[InnerState, Hparams], tuple[InnerState, Any]],
    hparams: Hparams,
    tangent: Any,
    read: Callable[[InnerState], Any] | None = None,
) -> tuple[InnerState, Any, list[jax.Array], Callable[[Any], Hparams]]:
    """Run ``finish(begin(hparams), hparams)`` with one tangent per hyperparameter.

    Args:
      begin: the carry before the first step.
      finish: the steps; returns the last carry and whatever else they tell.
      tangent: of the first carry, from an earlier call; ``None`` takes that of ``begin``.
      read: what of the last carry is to be differentiated; ``None``: parameters, model state.

    Returns:
      The last carry, what the steps told, the last tangent, and the transposed map
      ``(params cotangent, model state cotangent) -> hparams`` of what ``read`` returns.

    Cost: one run and p tangents of it; p copies of the carry.
    """
    basis = _basis(hparams)
    carry = begin(hparams)
    if tangent is None:
        tangent = jax.vmap(lambda e: jax.jvp(lambda lam: _floats(begin(lam)), (hparams,), (e,))[1])(
            basis
        )
    # The first tangents are mostly zeros. Behind the barrier the compiler cannot fold them into
    # the loss as constants, which some of its fused reductions get wrong.
    basis, tangent = jax.lax.optimization_barrier((basis, tangent))

    def column(e: Hparams, z: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        def run(lam: Hparams, floats: list[jax.Array]) -> tuple[Any, Any]:
            end, info = finish(_with_floats(carry, floats), lam)
            return _floats(end), (end, info)

        _, pushed, told = jax.jvp(run, (hparams, _floats(carry)), (e, z), has_aux=True)
        return told, pushed

    (end, info), tangent = jax.vmap(column, out_axes=(None, 0))(basis, tangent)

    def pull(cotangent: Any) -> Hparams:
        if read is None:
            cts = [c for c in jax.tree.leaves(cotangent) if is_cotangent(c)]
            # The tangent holds every float of (params, opt_state, model_state), in that order.
            n_params, n_state = (len(_floats(part)) for part in (end.params, end.model_state))
            n_all = len(tangent)
            seen = tangent[:n_params] + tangent[n_all - n_state :]
        else:

            def seen_by(floats: list[Any], read: Any = read) -> Any:
                return read(_with_floats(end, floats))

            _, back = jax.vjp(seen_by, _floats(end))
            cts, seen = back(cotangent)[0], tangent
        parts = jax.vmap(lambda *z: tree.vdot(list(z), cts))(*seen)
        leaves, treedef = jax.tree.flatten(hparams)
        ends = np.cumsum([int(np.prod(jnp.shape(x))) for x in leaves])[:-1].tolist()
        return jax.tree.unflatten(
            treedef,
            [
                part.reshape(jnp.shape(x)).astype(x.dtype)
                for part, x in zip(jnp.split(parts, ends), leaves, strict=True)
            ],
        )

    return end, info, tangent, pull


def check_few(hparams: Hparams, most: int, instead: str) -> None:
    """Refuse more hyperparameters than forward mode may carry tangents."""
    if tree.size(hparams) > most:
        raise ValueError(
            f"`mode='forward'` carries one tangent per hyperparameter, and `hparams` has "
            f"{tree.size(hparams)} scalars, more than `max_hparams`={most}. Use "
            f"`mode={instead!r}`, whose cost does not depend on their number, share values, or "
            "raise `max_hparams` if the memory (that many copies of all that a step carries) is "
            "there."
        )
