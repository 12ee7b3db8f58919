"""SABA: SOBA with gradient tables."""

from typing import Any

import optax

from bilevel.ground.aliases import Loss
from bilevel.outer.base import Algorithm
from bilevel.outer.single_loop.loop import single_loop
from bilevel.outer.single_loop.memory import Saga


def saba(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    linear_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    num_inner: int,
    num_outer: int,
    *,
    max_bytes: int = 2**30,
    **options: Any,
) -> Algorithm:
    """:func:`~bilevel.single_loop` with ``Saga(num_inner, num_outer)``: constant steps converge.

    Batches come as :class:`~bilevel.Indexed`. The paper fills the tables first; here they begin
    at zero, where the directions are unbiased too.

    Args:
      outer, inner, inner_tx, linear_tx, outer_tx, options: as :func:`~bilevel.single_loop`.
      num_inner, num_outer, max_bytes: as :class:`~bilevel.Saga`.

    Cost: one inner gradient, one product, one outer gradient. Memory: the tables.

    Reference: Dagreou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", NeurIPS 2022.
    """
    table = Saga(num_inner, num_outer, max_bytes)
    return single_loop(outer, inner, inner_tx, linear_tx, outer_tx, table, **options)
