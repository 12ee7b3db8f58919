r"""The symmetric system behind a composite condition, on the support that its prox identifies.

With J the Jacobian of the proximal operator, symmetric with eigenvalues in [0, 1], H the curvature
of the smooth loss and :math:`B = I - sH`, the condition has the Jacobian :math:`(I - JB)/s`. Of a
solution z of

.. math:: K z = J g,  K = J H J + 1/s J (I - J)

is made :math:`q = s g + B J z`, for which :math:`1/s (I - BJ) q = g` up to B times what z
leaves of its own system. K is positive semi-definite where H is on the range of J. The kernel of J
(weights at zero, bounds that are met) is that of K, and the right side has no share of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Params, Vector
from bilevel.ground.linear_map import LinearMap
from bilevel.problem.operators.base import BoundOperator, Operator
from bilevel.problem.two_losses import Problem


class SymmetricForm(NamedTuple):
    r"""What leads from the system of a composite condition to the symmetric one, and back.

    The adjoint system is the one with the transposed Jacobian of the condition; of the other one
    the solution w has :math:`K z = J B b`, :math:`w = s b + J z`.

    Attributes:
      step_size: s.
      jacobian: :math:`v ↦ J v`.
      curvature: :math:`v ↦ H v`, damped.
    """

    step_size: Any
    jacobian: Callable[[Vector], Vector]
    curvature: Callable[[Vector], Vector]

    def advanced(self, v: Vector) -> Vector:
        """:math:`B v`."""
        return tree.axpy(-self.step_size, self.curvature(v), v)

    def right_side(self, g: Vector, adjoint: bool) -> Vector:
        """That of the symmetric system."""
        return self.jacobian(g if adjoint else self.advanced(g))

    def solution(self, g: Vector, z: Vector, adjoint: bool) -> Vector:
        """That of the system of the condition, from that of the symmetric one."""
        x = self.jacobian(z)
        return tree.axpy(self.step_size, g, self.advanced(x) if adjoint else x)

    def forward(self, v: Vector) -> Vector:
        """The Jacobian of the condition, :math:`(v - J B v) / s`."""
        moved = tree.sub(v, self.jacobian(self.advanced(v)))
        return tree.scale(1 / self.step_size, moved)


def bind_composite(
    operator: Operator, problem: Problem, params: Params, hparams: Hparams, batch: Batch
) -> tuple[BoundOperator, SymmetricForm]:
    """The condition and K at ``params``, of a settled problem."""
    s = problem.inner.step_size
    inner_grad, curvature = operator.bind(problem.smooth, params, hparams, batch, fresh=False)
    ahead = tree.cast_like(tree.axpy(-s, tree.cast_like(inner_grad, params), params), params)
    moved, push = jax.linearize(lambda v: problem.proximal(v, hparams), ahead)
    residual = tree.scale(1 / s, tree.sub(params, moved))

    def jacobian(v: Vector) -> Vector:
        return tree.cast_like(push(tree.cast_like(v, params)), v)

    def product(v: Vector) -> Vector:
        x = jacobian(v)
        inside = tree.axpy(1 / s, tree.sub(v, x), curvature(x))
        return jacobian(inside)

    form = SymmetricForm(s, jacobian, curvature)
    return BoundOperator(residual, LinearMap(product, unroll=curvature.unroll)), form
