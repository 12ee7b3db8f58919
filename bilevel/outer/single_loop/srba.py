"""SRBA: differences of batches between full directions."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.outer.base import Algorithm
from bilevel.outer.single_loop.loop import single_loop
from bilevel.outer.single_loop.recursion import Spider


def srba(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    linear_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    period: int,
    **options: Any,
) -> Algorithm:
    """:func:`~bilevel.single_loop` with ``Spider(period)``: full directions every so many steps.

    Batches come as :class:`~bilevel.Anchored`. The adjoint is not projected onto a ball.

    Args:
      outer, inner, inner_tx, linear_tx, outer_tx, options: as :func:`~bilevel.single_loop`.
      period: of :class:`~bilevel.Spider`.

    Cost: two inner gradients, two products, two outer gradients; every ``period`` steps those of
    all data.

    Reference: Dagreou, Moreau, Vaiter, Ablin, "A lower bound and a near-optimal algorithm for
    bilevel empirical risk minimization", AISTATS 2024.
    """
    estimator = Spider(period)
    return single_loop(outer, inner, inner_tx, linear_tx, outer_tx, estimator, **options)
