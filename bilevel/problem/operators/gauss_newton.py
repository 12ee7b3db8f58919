r"""The Gauss–Newton matrix of the inner loss: its product, diagonal and factors."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params, Scalar, Vector
from bilevel.ground.batches import select_batch
from bilevel.ground.linear_map import Dual, Factors, Kronecker, LinearMap, Parts, SampledDiagonal
from bilevel.ground.loops import must_unroll
from bilevel.ground.settings import check_settings, real
from bilevel.ground.traced import BACKWARD_RULE, contains_primitive
from bilevel.problem.layers import (
    block_root,
    dual_kernel,
    kronecker,
    ordered_outputs,
    output_kernel,
)
from bilevel.problem.operators.base import BoundOperator
from bilevel.problem.operators.linear_model import LinearModel
from bilevel.problem.operators.stored import with_stored
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussNewton:
    r""":math:`A = Jᵀ Q J + ∇^2 r + ρ I` for :math:`h = ℓ(z(w)) + r(w)`.

    J is the Jacobian of the model's outputs z, Q the Hessian of the loss in z, r a penalty:
    positive semi-definite whenever :math:`ℓ` and r are convex, whatever the network.
    Equal to the Hessian when the model is linear in its parameters. :math:`B` stays that of
    the inner loss you pass; :meth:`loss` is the one that agrees with this operator.

    Args:
      model: ``model(params, hparams, batch) -> outputs`` (any pytree; with
        ``has_state=True`` it also receives ``model_state``), or a :class:`LinearModel`.
      output_loss: ``output_loss(outputs, hparams, batch) -> scalar``, convex in the outputs.
      damping: :math:`ρ ≥ 0`, in units of curvature.
      penalty: ``penalty(params, hparams) -> scalar``, or ``None``. ``Woodbury`` and ``Diagonal``
        take it to be a sum over the weights.
      independent_examples: every leaf of the batch has the examples as its leading axis, and
        the outputs of an example depend on that example alone (no batch norm). ``Woodbury``
        then takes each Jacobian row from one example instead of the whole batch, and none at all
        for the layers it finds.

    Cost: about 0.75 of a Hessian product (a forward tangent and a backward pass); on CPU at most
    one vector of memory for transposed activations.

    Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 2002.
    """

    model: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    output_loss: Callable[..., Scalar] = dataclasses.field(metadata={"static": True})
    damping: float | jax.Array = real(0.0, low=0)
    penalty: Callable[[Params, Hparams], Scalar] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    independent_examples: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        check_settings(self)

    def loss(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        r"""The inner loss this operator belongs to, :math:`ℓ(z(w)) + r(w)`."""
        value = self.output_loss(self.model(params, hparams, batch), hparams, batch)
        return value if self.penalty is None else value + self.penalty(params, hparams)

    def bind(
        self, problem: Problem, params: Params, hparams: Hparams, batch: Batch, *, fresh: bool
    ) -> BoundOperator:
        """Linearize model, output loss and penalty at ``params``."""
        if fresh:
            first = select_batch(batch, 0)
            bound = self.bind(problem, params, hparams, first, fresh=False)

            def product(v: Vector, i: Any) -> Vector:
                one = select_batch(batch, i)
                mv, _ = _gauss_newton(self, problem, params, hparams, one, repeated=False)
                return tree.axpy(self.damping, v, tree.cast_like(mv(v), v))

            return BoundOperator(bound.inner_grad, dataclasses.replace(bound.mv, fresh=product))
        check_split(self, problem, params, hparams, batch)
        mv, sample = _gauss_newton(self, problem, params, hparams, batch)
        diagonal, model = None, self.model
        if isinstance(model, LinearModel):
            diagonal = functools.partial(
                _linear_model_diagonal, self, model, params, hparams, batch
            )
        return BoundOperator(
            problem.inner_grad(params, hparams, batch),
            LinearMap(
                mv,
                self.damping,
                must_unroll(problem.inner_loss, params, hparams, batch),
                diagonal,
                SampledDiagonal(lambda: _separable_penalty(self, params, hparams), sample),
                lambda: _factors(self, problem, params, hparams, batch),
                self.penalty is not None,
                dual=lambda: _dual(self, problem, params, hparams, batch),
                parts=lambda: _parts(self, problem, params, hparams, batch),
                kronecker=functools.partial(_kronecker, self, problem, params, hparams, batch),
            ),
        )


def _outputs(op: GaussNewton, problem: Problem, hparams: Hparams, batch: Batch) -> Callable:
    return lambda w: op.model(w, hparams, batch, *problem.state_arguments)


def _gauss_newton(
    op: GaussNewton,
    problem: Problem,
    params: Params,
    hparams: Hparams,
    batch: Batch,
    repeated: bool = True,
) -> tuple[Callable[[Vector], Vector], Callable[[Key], Vector]]:
    """The product, and a sample of the diagonal of its part without the penalty."""
    z, push, pull = _jacobian(op, problem, params, hparams, batch, repeated)
    weigh = jax.linearize(jax.grad(lambda z: op.output_loss(z, hparams, batch)), z)[1]
    bend, penalty = None, op.penalty
    if penalty is not None:
        bend = jax.linearize(jax.grad(lambda w: penalty(w, hparams)), params)[1]

    def mv(v: Vector) -> Vector:
        v = tree.cast_like(v, params)
        image = pull(weigh(push(v)))
        return image if bend is None else tree.add(image, bend(v))

    def sample(key: Key) -> Vector:
        # With s = +-1 on the outputs, E[J's * J'Qs] = diag(J'QJ) and its error is of the size
        # of the entry itself; Hutchinson's is of the size of the whole row.
        s = tree.cast_like(tree.random_like(key, z, jax.random.rademacher), z)
        return jax.tree.map(jnp.multiply, pull(s), pull(weigh(s)))

    return mv, sample


def _jacobian(
    op: GaussNewton,
    problem: Problem,
    params: Params,
    hparams: Hparams,
    batch: Batch,
    repeated: bool,
) -> tuple[Any, Callable[[Vector], Any], Callable[[Any], Vector]]:
    r"""``(z, v -> J v, u -> J^T u)``, the model's outputs and its two linear maps."""
    model = op.model
    if isinstance(model, LinearModel):
        x = model.features(hparams, batch)
        z = model.apply(params, x)
        stored = model.stored(x, z) if repeated else None
        return (
            z,
            lambda v: model.apply(v, x),
            lambda u: model.transpose(params, x, u, stored),
        )
    outputs = _outputs(op, problem, hparams, batch)
    if contains_primitive(outputs, params, prefix=BACKWARD_RULE):
        # JAX pushes no tangent through a backward rule of the user's own, but the rule is linear:
        # its transpose is the tangent map.
        z, pull = jax.vjp(outputs, params)
        transposed = jax.linear_transpose(pull, z)
        return z, lambda v: transposed((v,))[0], lambda u: pull(u)[0]
    z, push = jax.linearize(outputs, params)
    transposed = jax.linear_transpose(push, params)
    if repeated:
        return z, push, with_stored(lambda u: transposed(u)[0], z, room=params)
    return z, push, lambda u: transposed(u)[0]


def _separable_penalty(op: GaussNewton, params: Params, hparams: Hparams) -> Vector:
    """Damping plus the diagonal of a separable penalty's Hessian (its product with ones)."""
    ones = jax.tree.map(jnp.ones_like, params)
    damping = tree.scale(op.damping, tree.accumulate(ones))
    penalty = op.penalty
    if penalty is None:
        return damping
    bend = jax.jvp(jax.grad(lambda w: penalty(w, hparams)), (params,), (ones,))[1]
    return tree.add(damping, tree.accumulate(bend))


def _linear_model_diagonal(
    op: GaussNewton, model: LinearModel, params: Params, hparams: Hparams, batch: Batch
) -> Vector:
    r"""Exact for a loss that is a sum over examples: :math:`(X ∘ X)ᵀ diag(Q)`."""
    x = model.features(hparams, batch)
    z = model.apply(params, x)
    weigh = jax.linearize(jax.grad(lambda z: op.output_loss(z, hparams, batch)), z)[1]
    if z.ndim == 1:
        weights = weigh(jnp.ones_like(z))
    else:
        # One direction per output, the same for all examples: Q has one block per example.
        def column(c: jax.Array) -> jax.Array:
            direction = jax.nn.one_hot(c, z.shape[-1], dtype=z.dtype)
            return weigh(jnp.broadcast_to(direction, z.shape))[:, c]

        weights = jax.lax.map(column, jnp.arange(z.shape[-1])).T
    data = _squared_transpose(model, params, x, weights)
    return tree.add(data, _separable_penalty(op, params, hparams))


BLOCK = 1024
"""Examples whose squared features are in memory at a time."""


def _squared_transpose(
    model: LinearModel, params: Params, x: jax.Array, weights: jax.Array
) -> Vector:
    r""":math:`(X ∘ X)ᵀ U` by blocks of examples: X squared is never stored whole."""
    n, block = x.shape[0], min(x.shape[0], BLOCK)

    def body(total: Vector, k: jax.Array) -> tuple[Vector, None]:
        first = jnp.minimum(k * block, n - block)
        # The last block overlaps the one before it, whose examples count once.
        new = first + jnp.arange(block) >= k * block
        rows = jax.lax.dynamic_slice_in_dim(x, first, block)
        u = jax.lax.dynamic_slice_in_dim(weights, first, block)
        u = jnp.where(new.reshape(-1, *(1,) * (u.ndim - 1)), u, 0)
        part = tree.accumulate(model.transpose(params, rows * rows, u))
        return tree.add(total, part), None

    return jax.lax.scan(body, tree.zeros_accumulated(params), jnp.arange(-(-n // block)))[0]


def _dual(
    op: GaussNewton, problem: Problem, params: Params, hparams: Hparams, batch: Batch
) -> Dual | None:
    """The dual form from the layers of the model, where examples are independent."""
    if not op.independent_examples:
        return None
    # The kernel pairs all examples: every device has all of them.
    divided, (params, batch) = params, jax.tree.map(tree.replicated, (params, batch))

    def model(w: Params, examples: Batch) -> Any:
        return _outputs(op, problem, hparams, examples)(w)

    found = dual_kernel(model, params, batch, uniform=op.penalty is None)
    if found is None:
        return None
    kernel, covered = found
    z, push, pull = _jacobian(op, problem, params, hparams, batch, repeated=False)
    weigh = jax.linearize(jax.grad(lambda z: op.output_loss(z, hparams, batch)), z)[1]
    flat, back = ordered_outputs(z)

    def weigh_flat(u: jax.Array) -> jax.Array:
        return flat(weigh(back(u)))

    size, examples = sum(o.size for o in jax.tree.leaves(z)), jax.tree.leaves(z)[0].shape[0]
    outputs = size // examples
    root, is_root = block_root(weigh_flat, (examples, outputs), flat(z).dtype)
    return Dual(
        kernel,
        root,
        is_root,
        lambda v: flat(push(tree.cast_like(jax.tree.map(tree.replicated, v), params))),
        lambda u: jax.tree.map(tree.placed_like, pull(back(u)), divided),
        weigh_flat,
        _separable_penalty(op, divided, hparams),
        size,
        outputs + 2,
        covered,
    )


def _parts(
    op: GaussNewton, problem: Problem, params: Params, hparams: Hparams, batch: Batch
) -> Parts:
    """The factors of the product apart, and the dual product from the layers of the model."""
    z, push, pull = _jacobian(op, problem, params, hparams, batch, repeated=False)
    weigh = jax.linearize(jax.grad(lambda z: op.output_loss(z, hparams, batch)), z)[1]
    outputs = _outputs(op, problem, hparams, batch)
    kernel, covered = output_kernel(outputs, params, uniform=op.penalty is None)

    def narrow(function: Callable, like: Any) -> Callable:
        return lambda v: tree.accumulate(function(tree.cast_like(v, like)))

    def product(d: Vector) -> Callable[[Any], Any]:
        return narrow(kernel(d), z)

    diagonal = _separable_penalty(op, params, hparams)
    return Parts(
        narrow(push, params), narrow(pull, z), narrow(weigh, z), product, diagonal, covered
    )


def _kronecker(
    op: GaussNewton,
    problem: Problem,
    params: Params,
    hparams: Hparams,
    batch: Batch,
    num_samples: int | None,
    key: Key | None,
) -> Kronecker:
    """Kronecker factors from the layers of the model."""
    model = _outputs(op, problem, hparams, batch)
    gradient = jax.grad(lambda z: op.output_loss(z, hparams, batch))
    weigh = jax.linearize(gradient, model(params))[1]
    known = _separable_penalty(op, params, hparams)
    unroll = must_unroll(problem.inner_loss, params, hparams, batch)
    return kronecker(model, weigh, params, known, unroll, num_samples, key)


def _factors(
    op: GaussNewton, problem: Problem, params: Params, hparams: Hparams, batch: Batch
) -> Factors:
    """Jacobian rows, output Hessian and diagonal, for the exact inverse."""
    divided, (params, batch) = params, jax.tree.map(tree.replicated, (params, batch))

    def flat(w: Params) -> jax.Array:
        outputs = jax.tree.leaves(_outputs(op, problem, hparams, batch)(w))
        return jnp.concatenate([o.reshape(-1) for o in outputs])

    z, treedef = jax.tree.flatten(_outputs(op, problem, hparams, batch)(params))
    shapes = [o.shape for o in z]
    ends = np.cumsum([o.size for o in z])[:-1].tolist()

    def flat_loss(u: jax.Array) -> Scalar:
        parts = jnp.split(u, ends)
        leaves = [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]
        return op.output_loss(jax.tree.unflatten(treedef, leaves), hparams, batch)

    weights = jax.hessian(flat_loss)(jnp.concatenate([o.reshape(-1) for o in z]))
    if op.independent_examples:
        rows = _rows_by_example(op, problem, params, hparams, batch)
    else:
        outputs, pull = jax.vjp(flat, params)
        rows = jax.vmap(lambda e: pull(e)[0])(jnp.eye(outputs.size, dtype=outputs.dtype))
    rows = jax.tree.map(lambda r, w: jax.vmap(tree.placed_like, (0, None))(r, w), rows, divided)
    return Factors(rows, weights, _separable_penalty(op, divided, hparams))


def _rows_by_example(
    op: GaussNewton, problem: Problem, params: Params, hparams: Hparams, batch: Batch
) -> Vector:
    """The Jacobian's rows from each example's own backward passes, in the order of the outputs."""

    def one(example: Batch) -> list[Any]:
        alone = jax.tree.map(lambda x: x[None], example)

        def outputs(w: Params) -> list[jax.Array]:
            z = _outputs(op, problem, hparams, alone)(w)
            return [o.reshape(-1) for o in jax.tree.leaves(z)]

        return jax.jacrev(outputs)(params)

    def stacked(*parts: jax.Array) -> jax.Array:  # (examples, outputs, ...) of each output leaf
        return jnp.concatenate([p.reshape(-1, *p.shape[2:]) for p in parts])

    return jax.tree.map(stacked, *jax.vmap(one)(batch))
