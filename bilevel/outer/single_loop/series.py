r"""Directions without an adjoint: a truncated Neumann series in every step."""

import dataclasses

import jax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch
from bilevel.ground.batches import Window, select_batch
from bilevel.ground.cost import Cost
from bilevel.hypergradient.implicit import responding, restricted
from bilevel.linear.neumann import Neumann
from bilevel.outer.frozen import Part
from bilevel.outer.single_loop.base import Oracles, Point, Reading
from bilevel.problem.operators.hessian import Hessian
from bilevel.problem.two_losses import Problem


@dataclasses.dataclass(frozen=True)
class Series:
    r"""Reads :math:`∇_w h` and a Neumann hypergradient, with a fresh batch per product.

    Args:
      solver: the series; its residual is not recomputed, which would take one more product.
    """

    solver: Neumann

    @property
    def count(self) -> int:
        """Inner batches of a reading: for the gradient, each product, the mixed product."""
        return self.solver.num_products() + 2

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
        small, at = part.problem(problem), (point.params, point.hparams)
        (value, state), grads = jax.value_and_grad(
            lambda w: problem.inner_loss_and_state(
                w, point.hparams, select_batch(inner, 0), problem.model_state
            ),
            has_aux=True,
        )(part.whole(point.params))
        batches = Window(inner, 1)
        mixed = select_batch(inner, self.count - 1)
        _, mv = Hessian().bind(small, *at, batches, fresh=True)
        (outer_value, aux), (g, direct) = small.at(state).outer_grads(*at, outer)
        g = restricted(g, responding(small, *at, mixed))
        q, result, stats = self.solver.solve(mv, g, certify=False)
        oracles = Oracles(
            tree.accumulate(part.of(grads)),
            None,
            tree.accumulate(small.cross_vjp(*at, mixed, q)),
            None,
            tree.accumulate(direct),
        )
        kept = {"rhs_norm": stats["rhs_norm"]}
        return Reading(oracles, grads, value, outer_value, aux, state, result, kept)
