r"""The Jacobian of a condition that is not a gradient: products with it and its transpose."""

import dataclasses
from typing import Any

import jax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Params, Vector
from bilevel.ground.batches import select_batch
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.loops import must_unroll
from bilevel.ground.settings import check_settings, real
from bilevel.problem.operators.base import BoundOperator
from bilevel.problem.operators.stored import with_stored
from bilevel.problem.two_losses import Problem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Jacobian:
    r""":math:`A = (∂_w R)ᵀ + ρ I` of the condition :math:`R(w, λ) = 0`.

    For a :class:`~bilevel.FixedPoint` :math:`R = w - T(w, λ)`, for a :class:`~bilevel.Root`
    the equation itself. Not symmetric, so that solvers which need that refuse it.

    Args:
      damping: :math:`ρ ≥ 0`; traced.

    Cost: one evaluation of R to bind, about one and a half a product, and the memory of one
    backward pass.
    """

    damping: float | jax.Array = real(0.0, low=0)

    def __post_init__(self) -> None:
        check_settings(self)

    def bind(
        self, problem: Problem, params: Params, hparams: Hparams, batch: Batch, *, fresh: bool
    ) -> BoundOperator:
        """Linearize the condition at ``params``."""
        if fresh:
            first = select_batch(batch, 0)
            bound = self.bind(problem, params, hparams, first, fresh=False)

            def product(v: Vector, i: Any) -> Vector:
                here = self.bind(problem, params, hparams, select_batch(batch, i), fresh=False)
                return here.mv(v)

            mv = dataclasses.replace(bound.mv, fresh=product)
            return BoundOperator(bound.inner_grad, mv)
        residual, push = jax.linearize(lambda w: problem.condition(w, hparams, batch), params)
        transposed = jax.linear_transpose(push, params)

        def forward(v: Vector) -> Vector:
            return push(tree.cast_like(v, params))

        def adjoint(v: Vector) -> Vector:
            return transposed(tree.cast_like(v, residual))[0]

        adjoint = with_stored(adjoint, residual, room=params)
        unroll = must_unroll(problem.condition, params, hparams, batch)
        return BoundOperator(residual, LinearMap(adjoint, self.damping, unroll, transpose=forward))
