r"""Directions without an adjoint: a truncated Neumann series in every step."""

import dataclasses

import jax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch
from bilevel.ground.batches import select_batch, select_batches
from bilevel.ground.cost import Cost
from bilevel.hypergradient.implicit import Implicit
from bilevel.outer.frozen import Part
from bilevel.outer.single_loop.base import Oracles, Point, Reading
from bilevel.problem.two_losses import Problem


@dataclasses.dataclass(frozen=True)
class Series:
    r"""Reads :math:`\nabla_w h` and an implicit hypergradient, with a fresh batch per product.

    Args:
      response: an implicit one, whose solver counts its products.
    """

    response: Implicit

    @property
    def count(self) -> int:
        """Inner batches of a reading: one for the gradient, those of the response."""
        return 1 + (self.response.num_inner_batches() or 1)

    @property
    def reads(self) -> str:
        """What the inner batches of a reading are for."""
        return (
            f"one batch for the gradient, {self.count - 2} for the products of the series, and one "
            "for the mixed product"
        )

    def cost(self) -> Cost:
        """Of one reading."""
        return Cost(1, self.count - 1, 1)

    def read(
        self, problem: Problem, part: Part, point: Point, inner: Batch, outer: Batch
    ) -> Reading:
        """One reading at ``point``."""
        small = part.problem(problem)
        (value, state), grads = jax.value_and_grad(
            lambda w: problem.inner_loss_and_state(
                w, point.hparams, select_batch(inner, 0), problem.model_state
            ),
            has_aux=True,
        )(part.whole(point.params))
        batches = select_batches(inner, 1, self.count - 1)
        _, pullback = self.response.vjp(small, point.params, point.hparams, batches, None)
        (outer_value, aux), (g, direct) = small.at(state).outer_grads(
            point.params, point.hparams, outer
        )
        indirect, _, result, stats = pullback(g)
        oracles = Oracles(
            tree.accumulate(part.of(grads)),
            None,
            tree.scale(-1, tree.accumulate(indirect)),
            None,
            tree.accumulate(direct),
        )
        kept = {name: stats[name] for name in ("residual_norm", "rhs_norm") if name in stats}
        return Reading(oracles, grads, value, outer_value, aux, state, result, kept)
