r"""The Hessian of the inner loss, with damping."""

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
class Hessian:
    r""":math:`A = ∇^2_{ww} h + ρ I`.

    Args:
      damping: :math:`ρ ≥ 0`, in units of curvature; traced, so a change never recompiles.

    Symmetric but indefinite away from a minimum of a non-convex loss. Cost: one gradient to
    bind (linearized once at this batch), about 1.2 gradients a product, and one backward
    pass of memory, on CPU at most one vector more for transposed activations; with fresh batches
    about 2.5 gradients a product.
    """

    damping: float | jax.Array = real(0.0, low=0)

    def __post_init__(self) -> None:
        check_settings(self)

    def bind(
        self, problem: Problem, params: Params, hparams: Hparams, batch: Batch, *, fresh: bool
    ) -> BoundOperator:
        """Linearize the inner gradient at ``params``."""
        if fresh:
            first = select_batch(batch, 0)
            bound = self.bind(problem, params, hparams, first, fresh=False)

            def product(v: Vector, i: Any) -> Vector:
                image = problem.hvp(params, hparams, select_batch(batch, i), v)
                return tree.axpy(self.damping, v, tree.cast_like(image, v))

            return BoundOperator(bound.inner_grad, dataclasses.replace(bound.mv, fresh=product))
        inner_grad, mv = problem.linearize(params, hparams, batch)
        unroll = must_unroll(problem.inner_loss, params, hparams, batch)
        mv = with_stored(mv, params, room=params)
        return BoundOperator(inner_grad, LinearMap(mv, self.damping, unroll))
