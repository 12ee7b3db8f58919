"""FSLA: plain parameters and adjoint, STORM on the hyperparameters."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.outer.base import Algorithm
from bilevel.outer.single_loop.loop import single_loop
from bilevel.outer.single_loop.recursion import Rate, Storm


def fsla(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    linear_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    rate: Rate,
    **options: Any,
) -> Algorithm:
    """:func:`~bilevel.single_loop` with ``Storm(outer=rate)``.

    Args:
      outer, inner, inner_tx, linear_tx, outer_tx, options: as :func:`~bilevel.single_loop`.
      rate: of :class:`~bilevel.Storm`.

    Cost: one inner gradient, two products, two outer gradients.

    Reference: Li, Gu, Huang, "A fully single loop algorithm for bilevel optimization without
    Hessian inverse", AAAI 2022.
    """
    estimator = Storm(outer=rate)
    return single_loop(outer, inner, inner_tx, linear_tx, outer_tx, estimator, **options)
