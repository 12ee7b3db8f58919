r"""Which matrix stands for the curvature of the inner problem: Hessian or Gauss–Newton.

An operator is a value with one method, ``bind``: given the problem and a point it returns a
:class:`~bilevel.linear.LinearMap`, a function :math:`v ↦ A v`, linearized once.
"""

from typing import NamedTuple, Protocol

from bilevel.ground.aliases import Batch, Hparams, Params, Vector
from bilevel.ground.linear_map import LinearMap
from bilevel.problem.two_losses import Problem


class BoundOperator(NamedTuple):
    """An operator at a point: the inner gradient there, and the product."""

    inner_grad: Vector
    mv: LinearMap


class Operator(Protocol):
    """Anything with this method is an operator.

    With ``fresh`` the batch has a leading axis; product ``i`` uses its slice ``i``.
    """

    def bind(
        self, problem: Problem, params: Params, hparams: Hparams, batch: Batch, *, fresh: bool
    ) -> BoundOperator: ...
