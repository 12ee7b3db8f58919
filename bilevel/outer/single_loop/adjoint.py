r"""Directions with a carried adjoint: one JVP gives all that the inner loss tells."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, ModelState, Scalar, Stats, Vector
from bilevel.ground.batches import select_batch
from bilevel.ground.cost import Cost
from bilevel.ground.status import Status, status_of
from bilevel.hypergradient.implicit import responding, restricted
from bilevel.outer.frozen import Part
from bilevel.outer.single_loop.base import Oracles, Point, Reading
from bilevel.problem.two_losses import Problem


@dataclasses.dataclass(frozen=True)
class Adjoint:
    r"""Reads :math:`∇_w h, Hq, Bᵀ q, ∇_w f, ∂_λ f` with a carried q.

    Args:
      independent: three inner batches, one for each of the first three, instead of one for all.
    """

    independent: bool = False

    @property
    def count(self) -> int:
        """Inner batches of a reading."""
        return 3 if self.independent else 1

    @property
    def reads(self) -> str:
        """What the inner batches of a reading are for."""
        if self.independent:
            return "one batch for the gradient, one for the product, one for the mixed product"
        return "one batch for all products"

    def cost(self) -> Cost:
        """Of one reading."""
        return Cost(1, 2 if self.independent else 1, 1)

    def read(
        self, problem: Problem, part: Part, point: Point, inner: Batch, outer: Batch
    ) -> Reading:
        """One reading at ``point``."""
        q = tree.cast_like(point.adjoint, point.params)
        batches = [select_batch(inner, i) for i in range(self.count)]
        value, state, grads, product, cross = _inner(problem, part, point, batches[0], q)
        small = part.problem(problem)
        if self.independent:
            product = small.hvp(point.params, point.hparams, batches[1], q)
            cross = small.cross_vjp(point.params, point.hparams, batches[2], q)
        # The statistics that this batch has just advanced are those the outer loss reads.
        (outer_value, aux), (g, direct) = small.at(state).outer_grads(
            point.params, point.hparams, outer
        )
        g = restricted(g, responding(small, point.params, point.hparams, batches[0]))
        oracles = Oracles(*map(tree.accumulate, (part.of(grads), product, cross, g, direct)))
        result, stats = _judge(point.adjoint, oracles)
        return Reading(oracles, grads, value, outer_value, aux, state, result, stats)


def _inner(
    problem: Problem, part: Part, point: Point, batch: Batch, q: Vector
) -> tuple[Scalar, ModelState, Vector, Vector, Any]:
    r"""The inner loss, its statistics and gradient, :math:`Hq` and :math:`Bᵀ q`: one JVP."""

    def gradients(trained: Vector) -> tuple[Any, Any]:
        (value, state), grads = jax.value_and_grad(
            lambda w, lam: problem.inner_loss_and_state(w, lam, batch, problem.model_state),
            argnums=(0, 1), has_aux=True,
        )(part.whole(trained), point.hparams)  # fmt: skip
        return grads, (value, state)

    try:
        grads, pushed, seen = jax.jvp(gradients, (point.params,), (q,), has_aux=True)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        # As in `Problem`: JAX pushes no tangent through such a function, but linearizes its
        # gradient.
        grads, push, seen = jax.linearize(gradients, point.params, has_aux=True)
        pushed = push(q)
    return *seen, grads[0], part.of(pushed[0]), pushed[1]


def _judge(q: Vector | None, oracles: Oracles) -> tuple[jax.Array, Stats]:
    """What these batches tell of the system, and how well the adjoint solves it."""
    image, right = oracles.product, oracles.outer
    bend, length = tree.vdot(q, image), tree.norm(q) * tree.norm(image)
    rounding = jnp.sqrt(jnp.finfo(bend.dtype).eps) * length
    result = status_of(Status.ok, (bend < -rounding, Status.negative_curvature))
    stats = {"residual_norm": tree.norm(tree.sub(image, right)), "rhs_norm": tree.norm(right)}
    return result, stats
