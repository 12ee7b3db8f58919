"""SOBA: plain stochastic directions, one step each."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.outer.base import Algorithm
from bilevel.outer.single_loop.loop import single_loop


def soba(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    linear_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    **options: Any,
) -> Algorithm:
    """:func:`~bilevel.single_loop` without an estimator.

    With constant step sizes it stalls at the level of its noise; with decreasing ones (the paper:
    as the inverse square root of the step) it converges.

    Args:
      outer, inner, inner_tx, linear_tx, outer_tx, options: as :func:`~bilevel.single_loop`.

    Cost: one inner gradient, one product, one outer gradient.

    Reference: Dagreou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022.
    """
    return single_loop(outer, inner, inner_tx, linear_tx, outer_tx, **options)
