r"""The bilevel problem: two losses and the derivative products they offer.

.. math::
    w^*(λ) = \operatorname*{argmin}_w h(w, λ),
    F(λ) = f(w^*(λ), λ)

with ``inner`` :math:`h` and ``outer`` :math:`f`. Every method of the field is built from

============================  ==============================================================
:meth:`Problem.condition`     :math:`R`, zero at the solution: :math:`∇_w h` for a loss
:meth:`Problem.inner_grad`    :math:`∇_w h`
:meth:`Problem.hvp`           :math:`H v`, with :math:`H = ∇^2_{ww} h`
:meth:`Problem.cross_vjp`     :math:`Bᵀ v`, with :math:`B = ∂_λ ∇_w h`
:meth:`Problem.products`      both at once
:meth:`Problem.outer_grads`   :math:`f`, :math:`∇_w f` and :math:`∂_λ f`
============================  ==============================================================

Second derivatives commute, so one JVP of :math:`∇_{(w,λ)} h` along :math:`(v, 0)`
holds both products. All are forward-over-reverse: reverse-over-reverse costs up to three
times as much for convolutions and more memory everywhere.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Loss, ModelState, Params, Scalar, Vector
from bilevel.ground.traced import BACKWARD_RULE, contains_primitive, pushes_tangents
from bilevel.ground.tree import cast_like
from bilevel.problem.conditions import Composite, Condition, FixedPoint, Root


class Point:
    """Where a response sends the outer loss when that is more than parameters.

    A response may return, instead of plain parameters, a pytree of a subclass with
    ``params`` and ``outer_loss``: an unrolled one carries the model state that training
    advanced, a population its members. The outer gradient is then taken in all of it.
    """

    params: Params

    def outer_loss(self, problem: "Problem", hparams: Hparams, batch: Batch) -> tuple[Scalar, Any]:
        """As :meth:`Problem.outer_loss`, at this point."""
        return problem.outer_loss(self.params, hparams, batch)

    def outer_grads(
        self, problem: "Problem", hparams: Hparams, batch: Batch
    ) -> tuple[tuple[Scalar, Any], tuple[Any, Hparams]]:
        """As :meth:`Problem.outer_grads`; in place of the gradient, what its response reads."""
        # A point may hold integers (counters of a model state): they get no gradient.
        return jax.value_and_grad(
            lambda point, lam: point.outer_loss(problem, lam, batch),
            argnums=(0, 1), has_aux=True, allow_int=True,
        )(self, hparams)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    r"""Two losses and their products; the value every response receives.

    Attributes:
      outer: ``outer(params, hparams, batch) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
      inner: ``inner(params, hparams, batch) -> scalar``; or a :class:`~bilevel.Composite`,
        :class:`~bilevel.FixedPoint` or :class:`~bilevel.Root`, which have no loss of their own.
      has_aux: whether ``outer`` returns an auxiliary pytree beside its value.
      has_state: whether both losses are ``loss(params, hparams, batch, model_state) ->
        (scalar, model_state)``; with ``has_aux`` too, ``outer`` returns
        ``(scalar, (model_state, aux))``.
      model_state: the statistics that products and outer gradients read, frozen. What the
        losses return in its place is discarded here; only training steps advance it.

    ``params`` (n scalars) and ``hparams`` (p scalars) are any pytrees of real floating-point
    arrays. Vectors of the inner space may come in a wider dtype than ``params`` (a solver
    keeps float32 vectors for bfloat16 parameters): they are cast to it before they enter a
    product, and what comes back has the dtype of ``params``.
    """

    outer: Loss
    inner: Any  # a loss, or a condition
    has_aux: bool = False
    has_state: bool = False
    model_state: ModelState = None

    def at(self, model_state: ModelState) -> "Problem":
        """The same losses, reading these statistics."""
        return dataclasses.replace(self, model_state=model_state)

    @property
    def has_loss(self) -> bool:
        """Whether the inner problem is a loss to be minimized."""
        return not isinstance(self.inner, Condition)

    def condition(self, params: Params, hparams: Hparams, batch: Batch) -> Vector:
        r""":math:`R(w, λ)`, zero at the solution: :math:`∇_w h`, or :math:`w - T(w)`.

        For a composite condition :math:`(w - prox(w - s∇f)) / s`.
        """
        if isinstance(self.inner, Composite):
            composite = self.settled(params, hparams, batch)
            s, ahead = composite.inner.step_size, composite.ahead(params, hparams, batch)
            moved = tree.sub(params, composite.proximal(ahead, hparams))
            return jax.tree.map(lambda d: d / jnp.asarray(s).astype(d.dtype), moved)
        if isinstance(self.inner, FixedPoint):
            step = cast_like(self.inner.step(params, hparams, batch), params)
            return jax.tree.map(jnp.subtract, params, step)
        if isinstance(self.inner, Root):
            return self.inner.equation(params, hparams, batch)
        return self.inner_grad(params, hparams, batch)

    @property
    def smooth(self) -> "Problem":
        """The problem with its smooth loss alone: without the part of a proximal operator."""
        if isinstance(self.inner, Composite):
            return dataclasses.replace(self, inner=self.inner.loss)
        return self

    def settled(self, params: Params, hparams: Hparams, batch: Batch) -> "Problem":
        """The same problem; a composite condition gets its step size, where it has none.

        It counts as a constant: the solution does not depend on it. Cost: three products.
        """
        if not isinstance(self.inner, Composite) or self.inner.step_size is not None:
            return self
        grad, mv = self.smooth.linearize(*jax.lax.stop_gradient((params, hparams, batch)))
        curvature = largest_curvature(mv, params, grad)
        step = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 1)
        step = jax.lax.stop_gradient(step)
        return dataclasses.replace(self, inner=dataclasses.replace(self.inner, step_size=step))

    def ahead(self, params: Params, hparams: Hparams, batch: Batch) -> Params:
        r""":math:`w - s∇f(w)`, where the proximal operator of a settled problem stands."""
        grad = self.smooth.inner_grad(params, hparams, batch)
        return cast_like(tree.axpy(-self.inner.step_size, grad, params), params)

    def proximal(self, ahead: Params, hparams: Hparams) -> Params:
        """The proximal operator of a settled problem, in the dtype of its argument."""
        return cast_like(self.inner.prox(ahead, hparams, self.inner.step_size), ahead)

    @property
    def state_arguments(self) -> tuple[ModelState, ...]:
        """What a function of the model takes last: the statistics, or nothing."""
        return (self.model_state,) if self.has_state else ()

    def inner_loss(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        """:math:`h(w, λ)` on one batch; advanced model state is discarded."""
        if self.has_state:
            return self.inner(params, hparams, batch, self.model_state)[0]
        return self.inner(params, hparams, batch)

    def inner_loss_and_state(
        self, params: Params, hparams: Hparams, batch: Batch, model_state: ModelState
    ) -> tuple[Scalar, ModelState]:
        """One training evaluation: the loss at ``model_state`` and the advanced state."""
        if self.has_state:
            return self.inner(params, hparams, batch, model_state)
        return self.inner(params, hparams, batch), model_state

    def outer_loss(self, params: Params, hparams: Hparams, batch: Batch) -> tuple[Scalar, Any]:
        """:math:`f(w, λ)` on one batch, with its auxiliary output (``None`` without)."""
        if isinstance(params, Point):
            return params.outer_loss(self, hparams, batch)
        if self.has_state:
            value, rest = self.outer(params, hparams, batch, self.model_state)
            return value, (rest[1] if self.has_aux else None)
        if self.has_aux:
            return self.outer(params, hparams, batch)
        return self.outer(params, hparams, batch), None

    def inner_grad(self, params: Params, hparams: Hparams, batch: Batch) -> Vector:
        r""":math:`∇_w h`. Cost: one gradient."""
        return jax.grad(self.inner_loss)(params, hparams, batch)

    def linearize(
        self, params: Params, hparams: Hparams, batch: Batch
    ) -> tuple[Vector, Callable[[Vector], Vector]]:
        r"""``(\nabla_w h, v -> H v)`` with the primal computed once.

        Cost: one gradient now, about 1.2 gradients for each later product, and the memory of
        the linearization's residuals (about that of one backward pass). For a fixed batch.
        """
        gradient = functools.partial(self.inner_grad, hparams=hparams, batch=batch)
        has_rule = self._has_rule(params, hparams, batch)
        if has_rule and not pushes_tangents(gradient, params, params):
            grad, pull = jax.vjp(gradient, params)  # H is symmetric
            return grad, lambda v: pull(cast_like(v, params))[0]
        grad, mv = jax.linearize(gradient, params)
        return grad, lambda v: mv(cast_like(v, params))

    def hvp(self, params: Params, hparams: Hparams, batch: Batch, v: Vector) -> Vector:
        r""":math:`H v`. Cost: about 2.5 gradients, memory of one forward-mode gradient."""
        v = cast_like(v, params)
        return self._second((0,), (0,), (params, hparams, batch), v)[0]

    def cross_jvp(self, params: Params, hparams: Hparams, batch: Batch, mu: Hparams) -> Vector:
        r""":math:`B μ`, shaped like ``params``. Cost: about 2.5 gradients."""
        if not self.has_loss:
            return jax.jvp(lambda lam: self.condition(params, lam, batch), (hparams,), (mu,))[1]
        return self._second((0,), (1,), (params, hparams, batch), mu)[0]

    def cross_vjp(self, params: Params, hparams: Hparams, batch: Batch, v: Vector) -> Hparams:
        r""":math:`Bᵀ v`, shaped like ``hparams``, as the JVP of :math:`∇_λ h`.

        Cost: at most about 2.5 gradients. The compiler prunes it to a forward pass where
        hyperparameters only weigh examples, and to elementwise work where they only
        regularize. Never more than one gradient's memory.
        """
        v = cast_like(v, params)
        if isinstance(self.inner, Composite):
            problem = self.settled(params, hparams, batch)
            ahead = problem.ahead(params, hparams, batch)
            _, pull = jax.vjp(problem.proximal, ahead, hparams)
            through, beside = pull(v)
            smooth = problem.smooth.cross_vjp(params, hparams, batch, through)
            return tree.axpy(-1 / jnp.asarray(problem.inner.step_size), beside, smooth)
        if not self.has_loss:
            _, pull = jax.vjp(lambda lam: self.condition(params, lam, batch), hparams)
            return pull(v)[0]
        return self._second((1,), (0,), (params, hparams, batch), v)[0]

    def products(
        self, params: Params, hparams: Hparams, batch: Batch, v: Vector
    ) -> tuple[Vector, Hparams]:
        r""":math:`(H v, Bᵀ v)` from one JVP of :math:`∇_{(w,λ)} h`.

        Cost: about 2.5 to 3 gradients together.
        """
        v = cast_like(v, params)
        return self._second((0, 1), (0,), (params, hparams, batch), v)

    def _has_rule(self, params: Params, hparams: Hparams, batch: Batch) -> bool:
        """Whether the loss contains a function with a backward rule of its own."""
        return contains_primitive(self.inner_loss, params, hparams, batch, prefix=BACKWARD_RULE)

    def _second(
        self, of: tuple[int, ...], along: tuple[int], at: tuple[Params, Hparams, Batch], v: Any
    ) -> Any:
        """The gradients in the arguments ``of``, pushed along ``v`` in the argument ``along``.

        Where a function with a backward rule of its own stands inside the model no tangent can be
        pushed (one at its end, a fused loss, is no obstacle). As second derivatives commute, ``v``
        is then pulled back through the gradient in ``along``: reverse-over-reverse.
        """
        (moved,) = along

        def gradients(argnums: tuple[int, ...], moving: tuple[int, ...]) -> Callable[..., Any]:
            grad = jax.grad(self.inner_loss, argnums=argnums)

            def call(*values: Any) -> Any:
                args = list(at)
                for i, value in zip(moving, values, strict=True):
                    args[i] = value
                return grad(*args)

            return call

        pushed = gradients(of, along)
        if not self._has_rule(*at):
            return jax.jvp(pushed, (at[moved],), (v,))[1]
        if pushes_tangents(pushed, at[moved], v):
            # Outside `jit` a tangent stumbles even where nothing needs it, a linearization not.
            return jax.linearize(pushed, at[moved])[1](v)
        _, pull = jax.vjp(gradients(along, of), *(at[i] for i in of))
        return pull((v,))

    def outer_grads(
        self, params: Params, hparams: Hparams, batch: Batch
    ) -> tuple[tuple[Scalar, Any], tuple[Vector, Hparams]]:
        r""":math:`(f, aux), (∇_w f, ∂_λ f)`. Cost: one outer gradient."""
        if isinstance(params, Point):
            return params.outer_grads(self, hparams, batch)
        return jax.value_and_grad(self.outer_loss, argnums=(0, 1), has_aux=True)(
            params, hparams, batch
        )


def pushed(gradient: Callable[[Any], Any], point: Any, tangent: Any) -> Any:
    """The JVP of a gradient, or of a condition, at ``point``."""
    try:
        return jax.jvp(gradient, (point,), (tangent,))[1]
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
    # A function with a backward rule of its own (fused losses, attention kernels): JAX pushes
    # no tangent through it, but linearizes its gradient.
    return jax.linearize(gradient, point)[1](tangent)


def largest_curvature(mv: Callable[[Vector], Vector], *starts: Vector) -> Scalar:
    """About the largest absolute eigenvalue, by three power iterations from several vectors.

    The start has a share of each: parameters alone may lie in directions of little curvature.
    """
    v = functools.reduce(tree.add, (tree.unit(tree.accumulate(v)) for v in starts))
    curvature = jnp.zeros_like(tree.norm(v))
    for _ in range(3):
        v = tree.accumulate(mv(tree.unit(v)))
        curvature = jnp.maximum(curvature, tree.norm(v))
    return curvature
