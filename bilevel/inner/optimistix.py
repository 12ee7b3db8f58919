"""The inner problem solved by a minimizer of optimistix (extra ``optimistix``)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Params, Scalar
from bilevel.ground.settings import require_extra


def minimised(
    loss: Callable[[Params], Scalar], params: Params, solver: Any, max_steps: int
) -> tuple[Params, jax.Array, jax.Array]:
    """Where ``solver`` ends, the steps it took, and whether it ended by itself.

    Its own tolerances, in its own norm, end it. Raises ``ImportError`` without optimistix and
    ``TypeError`` for what is not one of its minimizers, ``ValueError`` on explicit axes of a mesh.
    """
    optimistix = require_extra("optimistix", "optimistix", "`solver`")
    if not isinstance(solver, optimistix.AbstractMinimiser):
        raise TypeError(
            "`solver` must be a minimizer of optimistix, such as "
            f"`optimistix.BFGS(rtol=1e-8, atol=1e-8)`, got {solver!r}."
        )
    remedy = "leave it out for L-BFGS, or give `curvatures`"
    tree.refuse_explicit(jax.eval_shape(jax.grad(loss), params), "solver", "optimistix", remedy)
    found = optimistix.minimise(
        lambda w, _: loss(w), solver, params, max_steps=max_steps, throw=False
    )
    steps = jnp.asarray(found.stats["num_steps"], jnp.int32)
    ended = found.result == optimistix.RESULTS.successful
    return jax.tree.map(lambda new, old: new.astype(old.dtype), found.value, params), steps, ended
