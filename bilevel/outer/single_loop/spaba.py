"""SPABA: PAGE on all three directions."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.outer.base import Algorithm
from bilevel.outer.single_loop.loop import single_loop
from bilevel.outer.single_loop.recursion import Page


def spaba(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    linear_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    probability: float,
    **options: Any,
) -> Algorithm:
    """:func:`~bilevel.single_loop` with ``Page(probability)``: full directions at random steps.

    Batches come as :class:`~bilevel.Anchored`, and each step needs a ``key``.

    Args:
      outer, inner, inner_tx, linear_tx, outer_tx, options: as :func:`~bilevel.single_loop`.
      probability: of :class:`~bilevel.Page`.

    Cost: two inner gradients, two products, two outer gradients; with ``probability`` those of
    all data.

    Reference: Chu, Xu, Yao, Zhang, "SPABA: a single-loop and probabilistic stochastic bilevel
    algorithm achieving optimal sample complexity", ICML 2024.
    """
    estimator = Page(probability)
    return single_loop(outer, inner, inner_tx, linear_tx, outer_tx, estimator, **options)
