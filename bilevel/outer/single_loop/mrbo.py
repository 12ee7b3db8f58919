"""MRBO: STORM on parameters and hyperparameters, a Neumann series in place of the adjoint."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.ground.settings import check_count
from bilevel.linear.neumann import Neumann
from bilevel.outer.base import Algorithm
from bilevel.outer.single_loop.loop import build
from bilevel.outer.single_loop.recursion import Rate, Storm
from bilevel.outer.single_loop.series import Series


def mrbo(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_rate: Rate,
    outer_rate: Rate,
    num_matvecs: int,
    step_size: float,
    **options: Any,
) -> Algorithm:
    """One training step and one step along a Neumann hypergradient, both with STORM.

    ``inner_batches`` are stacked along a leading axis of ``num_matvecs + 2``: one batch for the
    gradient, one for each product, one for the mixed product.

    Args:
      outer, inner, inner_tx, outer_tx: as :func:`~bilevel.single_loop`.
      inner_rate, outer_rate: of :class:`~bilevel.Storm`.
      num_matvecs, step_size: of :class:`~bilevel.Neumann`; the step size must be below 2 over the
        largest curvature of any batch.
      options: ``constrain``, ``has_aux``, ``has_state`` as :func:`~bilevel.single_loop`.

    Cost: two inner gradients, ``2 (num_matvecs + 1)`` products, two outer gradients.

    Reference: Yang, Ji, Liang, "Provably faster algorithms for bilevel optimization", NeurIPS
    2021.
    """
    check_count("num_matvecs", num_matvecs, 0)
    series = Series(Neumann(num_matvecs, step_size))
    estimator = Storm(inner=inner_rate, outer=outer_rate)
    return build(outer, inner, series, inner_tx, None, outer_tx, estimator, **options)
