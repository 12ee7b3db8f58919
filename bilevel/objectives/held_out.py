"""Validation on held-out examples: the plain outer problem, as a value like the others."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from bilevel.ground.aliases import Batch, Loss, Params
from bilevel.objectives.folds import Split, check_data, checked_split, taken
from bilevel.problem.conditions import Condition
from bilevel.problem.validate import check_inner_problem, check_losses


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    r"""Train on some examples, judge on the others: :math:`F(λ) = f(w^*(λ), λ)`.

    Args:
      split: a pair (train, test) of index arrays, or of boolean masks, without a common example.
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss, or a condition such as :class:`~bilevel.Composite`.

    It has what every objective has, so that one can be put in the place of another:

    * ``outer``, ``inner``: the losses of the bilevel problem (here your own);
    * ``init(params)``: the parameters that they read (here ``params``);
    * ``inner_batch(data)``, ``outer_batch(data)``: what they read of all examples;
    * ``each(solve)``: a solver of ``inner`` from one of a single fit.

    Raises:
      TypeError, ValueError: for what is not a split, or has an example in both parts, and for
        losses that cannot be called; in ``inner_batch``, for arrays of fewer examples.

    Example:
      >>> import jax.numpy as jnp, numpy as np, bilevel
      >>> def error(w, lam, y):
      ...     return jnp.mean((w - y) ** 2)
      >>> def train(w, lam, y):
      ...     return error(w, lam, y) + lam * w**2
      >>> held_out = bilevel.objectives.HeldOut(([0, 1, 2], [3]), error, train)
      >>> print(held_out.inner_batch(jnp.array([1.0, 2.0, 3.0, 4.0])))
      [1. 2. 3.]

    Cost: one fit. It needs examples that the fit does not see, and its choice depends on which:
    with many hyperparameters those examples are fitted in their turn.
    """

    split: Any
    outer: Loss
    inner: Loss | Condition

    def __post_init__(self) -> None:
        check_losses(outer=self.outer)
        check_inner_problem(self.inner)
        object.__setattr__(self, "split", checked_split(self.split, "split"))

    def init(self, params: Params) -> Params:
        """``params``: there is one fit."""
        return params

    def inner_batch(self, data: Batch) -> Batch:
        """The examples to train on, of all ``data``."""
        return self._part(data, 0)

    def outer_batch(self, data: Batch) -> Batch:
        """The examples held out, of all ``data``."""
        return self._part(data, 1)

    def each(self, solve: Callable[..., Any]) -> Callable[..., Any]:
        """``solve``: there is one fit."""
        return solve

    def _part(self, data: Batch, which: int) -> Batch:
        split: Split = self.split
        check_data(data, 1 + int(max(np.max(part) for part in split)), exact=False)
        return taken(data, split[which])
