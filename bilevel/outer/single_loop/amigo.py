"""AmIGO: training steps, then steps of a warm adjoint, on fresh batches."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.hypergradient.implicit import Implicit
from bilevel.inner.optimizer import InnerTx
from bilevel.linear.stochastic import Stochastic
from bilevel.outer.alternate import alternate
from bilevel.outer.base import Algorithm


def amigo(
    outer: Loss,
    inner: Loss,
    inner_tx: InnerTx,
    linear_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int,
    linear_steps: int,
    certify: bool = False,
    **options: Any,
) -> Algorithm:
    """:func:`~bilevel.alternate` with a warm ``Implicit(Stochastic(...), fresh_batches=True)``.

    ``inner_batches`` are stacked along a leading axis of ``inner_steps + linear_steps + 1``: one
    batch for each training step, each step of the adjoint, and the mixed product. The adjoint is
    carried from step to step; the state of ``linear_tx`` begins anew in each.

    Args:
      outer, inner, inner_tx, outer_tx, inner_steps, options: as :func:`~bilevel.alternate`.
      linear_tx: optax transformation of the adjoint, with a step size below 2 over the largest
        curvature of any batch.
      linear_steps: steps of the adjoint.
      certify: recompute the residual of each solve, for one product more. Without it, as in the
        paper, ``info.stats`` has no ``residual_norm``, and the status judges what was met on the
        way.

    Cost: ``inner_steps`` inner gradients, ``linear_steps + 1`` products, one outer gradient.

    Reference: Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel
    optimization", ICLR 2022.
    """
    solver = Stochastic(linear_tx, linear_steps)
    response = Implicit(solver, fresh_batches=True, certify=certify)
    return alternate(outer, inner, response, inner_tx, outer_tx, inner_steps, **options)
