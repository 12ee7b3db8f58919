"""stocBiO: training steps, then a Neumann series on fresh batches."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.hypergradient.implicit import Implicit
from bilevel.inner.optimizer import InnerTx
from bilevel.linear.neumann import Neumann
from bilevel.outer.alternate import alternate
from bilevel.outer.base import Algorithm


def stocbio(
    outer: Loss,
    inner: Loss,
    inner_tx: InnerTx,
    outer_tx: optax.GradientTransformation,
    inner_steps: int,
    num_matvecs: int,
    step_size: float,
    certify: bool = False,
    **options: Any,
) -> Algorithm:
    """:func:`~bilevel.alternate` with ``Implicit(Neumann(...), fresh_batches=True)``.

    ``inner_batches`` are stacked along a leading axis of ``inner_steps + num_matvecs + 1``: one
    batch for each training step, each product, and the mixed product. With the full batch in
    every place it is ``alternate`` with a Neumann series.

    Args:
      outer, inner, inner_tx, outer_tx, inner_steps, options: as :func:`~bilevel.alternate`.
      num_matvecs, step_size: of :class:`~bilevel.Neumann`; the step size must be below 2 over the
        largest curvature of any batch.
      certify: recompute the residual of each solve, for one product more. Without it, as in the
        paper, ``info.stats`` has no ``residual_norm``, and the status judges what was met on the
        way.

    Cost: ``inner_steps`` inner gradients, ``num_matvecs + 1`` products, one outer gradient.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design",
    ICML 2021. Batches of one size; the paper's grow towards the first product.
    """
    solver = Neumann(num_matvecs, step_size)
    response = Implicit(solver, fresh_batches=True, certify=certify)
    return alternate(outer, inner, response, inner_tx, outer_tx, inner_steps, **options)
