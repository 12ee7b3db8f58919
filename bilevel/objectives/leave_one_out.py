r"""Leave-one-out in closed form, for fits that are linear in the observations.

.. math::
    y_i - \hat y_i^{(-i)} = \frac{y_i - \hat y_i}{1 - S_{ii}},  \hat y = S y

Leaving an example out of a penalized least-squares fit changes its residual by this factor alone:
all n fits for the price of one and of a diagonal.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar
from bilevel.ground.settings import check_settings
from bilevel.hypergradient.implicit import Implicit
from bilevel.linear.dense import Dense
from bilevel.objectives.sensitivity import (
    Push,
    check_solution,
    matrix_of,
    observations,
    push_function,
    push_solution,
)
from bilevel.problem.conditions import Condition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    r"""The mean squared error of leaving out each observation in turn, from one fit.

    .. math:: 1/n ∑_i \Bigl(\frac{y_i - \hat y_i}{1 - S_{ii}}\Bigr)^2,
        S = \frac{∂\hat y}{∂y}

    Exact for a squared error *summed* over the examples and a quadratic penalty (ridge, splines,
    kernel ridge), as :class:`CrossValidation` with n folds; for a mean of errors the n fits would
    have a slightly stronger penalty. For other fits it is the first-order approximation.

    Args:
      predict: ``predict(params, hparams, batch) -> fit``, shaped like the observations.
      inner: the training loss, or its condition. Without both, use ``risk(estimate, y)``.
      generalized: put the mean :math:`tr S / n` in the place of each
        :math:`S_{ii}` (generalized cross-validation), which does not depend on the basis.
      observed: ``observed(batch) -> y``; by default the last leaf of the batch.
      response: how S is found for ``outer``: an ``Implicit(...)``.

    ``outer``, ``risk``, ``init`` and the batches are those of :class:`SURE`.

    Cost: one product with S per observation (one linear solve each, for ``outer``).

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> y = jnp.array([1.0, 2.0, 3.0, 6.0])
      >>> score = bilevel.objectives.LeaveOneOut().risk(lambda y: jnp.full(4, jnp.mean(y)), y)
      >>> left_out = jnp.array([(2 + 3 + 6) / 3, (1 + 3 + 6) / 3, (1 + 2 + 6) / 3, (1 + 2 + 3) / 3])
      >>> bool(jnp.allclose(score, jnp.mean((y - left_out) ** 2)))
      True

    Reference: Allen, "The relationship between variable selection and data augmentation",
    Technometrics 1974 (PRESS); Golub, Heath, Wahba, "Generalized cross-validation", Technometrics
    1979.
    """

    predict: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    inner: Loss | Condition | None = dataclasses.field(default=None, metadata={"static": True})
    generalized: bool = dataclasses.field(default=False, metadata={"static": True})
    observed: Callable[[Batch], jax.Array] = dataclasses.field(
        default=observations, metadata={"static": True}
    )
    response: Any = Implicit(Dense())

    def __post_init__(self) -> None:
        check_settings(self)
        check_solution(self.inner, self.predict, self.observed, self.response)

    def outer(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        """The leave-one-out error of the fit at ``params``, an outer loss."""
        if self.predict is None or self.inner is None:
            raise ValueError(
                "`outer` needs the fit: pass `predict` and `inner` too, as in "
                "`LeaveOneOut(predict, inner)`."
            )
        return self._of(
            *push_solution(
                self.inner, self.predict, self.observed, self.response, params, hparams, batch
            )
        )

    def risk(self, estimate: Callable[[jax.Array], jax.Array], y: jax.Array) -> Scalar:
        """The leave-one-out error of ``estimate(y)``, a function of the observations."""
        fit, push = push_function(estimate, y)
        return self._of(y, fit, push)

    def init(self, params: Params) -> Params:
        """``params``: there is one fit."""
        return params

    def inner_batch(self, data: Batch) -> Batch:
        """``data``: all of it is fitted."""
        return data

    outer_batch = inner_batch

    def _of(self, y: jax.Array, fit: jax.Array, push: Push) -> Scalar:
        leverage = jnp.diagonal(matrix_of(push, y)).reshape(y.shape)
        if self.generalized:
            leverage = jnp.mean(leverage)
        return jnp.mean(((fit - y) / (1 - leverage)) ** 2)
