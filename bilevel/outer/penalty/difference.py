r"""The hypergradient as a difference of gradients at minimizers of penalized losses.

With :math:`y_j = \operatorname*{argmin}_w h + jν f`, :math:`ν = 1/penalty`, and weights
:math:`c_j` of a finite difference for a first derivative,

.. math::
    dF/dλ ≈ \frac1ν ∑_j c_j ∇_λ (h + jν f)(y_j, λ),

because :math:`F` is the derivative of :math:`min_w (h + ν f)` in :math:`ν` at zero. The same
sum of gradients in :math:`w` is zero at exact minimizers: it is the residual
:math:`‖g - Hq‖` of the system that an implicit method would solve, with
:math:`q = -\tfrac1ν∑_j c_j y_j` and :math:`g = ∑_j j c_j ∇_w f(y_j)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, ModelState, Params, Scalar, Stats, Vector
from bilevel.ground.status import RESIDUAL, Status, status_of, worst
from bilevel.ground.traced import depends
from bilevel.ground.tree import paths
from bilevel.inner.descend import InnerState
from bilevel.outer.frozen import Part
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import unread_message


class Node(NamedTuple):
    """Gradients at one minimizer, of the inner and the outer loss in (params, hparams)."""

    params: Params
    inner: tuple[Vector, Hparams]
    outer: Any  # the same of the outer loss; ``None`` where its weight is zero
    value: Scalar
    model_state: ModelState


class Difference(NamedTuple):
    """The two sums over nodes, in the accumulator dtype, and how far to trust them."""

    inner: tuple[Vector, Hparams]
    outer: tuple[Vector, Hparams]
    result: jax.Array
    stats: Stats


def stencil(order: int) -> dict[int, float]:
    r"""Offsets and weights of a difference of this order: exact for polynomials of that degree.

    Even orders are central (their weight at zero vanishes), odd ones have one offset more to the
    right: ``{0: -1, 1: 1}``, ``{-1: -1/2, 1: 1/2}``, ...
    """
    low = -(order // 2)
    offsets = np.arange(low, low + order + 1)
    powers = offsets[None, :].astype(np.float64) ** np.arange(order + 1)[:, None]
    weights = np.linalg.solve(powers, np.eye(order + 1)[1])
    return {int(j): float(c) for j, c in zip(offsets, weights, strict=True) if abs(c) > 1e-12}


def inner_node(problem: Problem, at: InnerState, hparams: Hparams, batch: Batch) -> Node:
    """The inner gradient at ``at``."""

    def loss(w: Params, lam: Hparams) -> tuple[Scalar, ModelState]:
        return problem.inner_loss_and_state(w, lam, batch, at.model_state)

    pair = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(at.params, hparams)
    (value, model_state), grads = pair
    return Node(at.params, grads, None, value, model_state)


def both_node(
    problem: Problem, at: InnerState, hparams: Hparams, batch: Batch, outer_batch: Batch
) -> Node:
    """Both gradients at ``at``."""
    node = inner_node(problem, at, hparams, batch)
    _, grads = problem.at(at.model_state).outer_grads(at.params, hparams, outer_batch)
    return node._replace(outer=grads)


def difference(nodes: list[tuple[int, float, Node]], nu: Scalar, part: Part) -> Difference:
    """The sums over ``(offset, weight, node)``, and what they tell of their own quality.

    Only the leaves that are trained count as :math:`w`.
    """
    inner = _sum([(c, node.inner) for _, c, node in nodes])
    outer = _sum([(c * j, node.outer) for j, c, node in nodes if node.outer is not None])
    moved = part.of(_sum([(c, node.params) for _, c, node in nodes]))
    image, slope = part.of(inner[0]), part.of(outer[0])
    residual, rhs = tree.norm(tree.axpy(1 / nu, image, slope)), tree.norm(slope)
    length, eps = tree.norm(moved), _eps(moved, nodes)
    curvature = tree.vdot(moved, image) / jnp.where(length > 0, length, 1) ** 2
    largest = sum(abs(c) * tree.norm(part.of(node.inner[0])) for _, c, node in nodes)
    size = max_norm([part.of(node.params) for _, _, node in nodes])
    result = status_of(
        Status.ok,
        (curvature * length < -10 * eps * largest, Status.negative_curvature),
        (residual > 1.001 * rhs, Status.worse_than_zero),
        ((length <= 10 * eps * size) & (rhs > 0), Status.rounding),
        (residual > RESIDUAL * rhs, Status.truncated),
    )
    usable = jnp.isfinite(nu) & (nu > 0)
    result = worst(result, status_of(Status.ok, (~usable, Status.invalid_setting)))
    result = status_of(result, (~jnp.isfinite(rhs), Status.nonfinite_input))
    stats = {
        "residual_norm": residual,
        "rhs_norm": rhs,
        "min_curvature": curvature,
        "distance": length,
        "penalty": 1 / nu,
    }
    return Difference(inner, outer, result, stats)


def max_norm(vectors: list[Vector]) -> Scalar:
    """The largest norm of several vectors."""
    return jnp.max(jnp.stack([tree.norm(v) for v in vectors]))


def judged(result: jax.Array, value: Scalar, grads: Hparams) -> jax.Array:
    """``result``, with what is not finite said."""
    return status_of(
        result,
        (~jnp.isfinite(value), Status.nonfinite_input),
        (~tree.all_finite(grads), Status.nonfinite_output),
    )


def check_reaches(
    problem: Problem, params: Params, hparams: Hparams, inner_batch: Batch, outer_batch: Batch
) -> None:
    """Refuse hyperparameters of which neither difference can tell anything, by structure."""

    def direct(one: Any, params: Params, hparams: Hparams, batch: Batch) -> Hparams:
        value, pull = jax.vjp(lambda lam: problem.outer_loss(params, lam, batch)[0], hparams)
        return pull(one.astype(value.dtype))[0]

    def indirect(params: Params, hparams: Hparams, batch: Batch) -> Hparams:
        return jax.grad(problem.inner_loss, argnums=1)(params, hparams, batch)

    one = jax.ShapeDtypeStruct((), jnp.float32)
    through_outer = depends(direct, one, params, hparams, outer_batch)
    through_inner = depends(indirect, params, hparams, inner_batch)
    pairs = zip(paths(through_outer, "hparams"), paths(through_inner, "hparams"), strict=True)
    dead = [path for (path, a), (_, b) in pairs if not (a or b)]
    if dead:
        why = "neither the outer loss nor the gradient of the inner loss depends on it"
        raise ValueError(unread_message(dead, why))


def _sum(terms: list[tuple[float, Any]]) -> Any:
    total = None
    for weight, term in terms:
        term = tree.scale(weight, tree.accumulate(term))
        total = term if total is None else tree.add(total, term)
    return total


def _eps(like: Vector, nodes: list[tuple[int, float, Node]]) -> float:
    """One unit of rounding of the parameters."""
    leaves = jax.tree.leaves(nodes[0][2].params)
    return max(float(jnp.finfo(jnp.result_type(x)).eps) for x in leaves)
