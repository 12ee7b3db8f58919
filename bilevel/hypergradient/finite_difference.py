r"""One look-ahead step and a finite difference: hypergradients from first derivatives only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params, Scalar, Stats, Vector
from bilevel.ground.cost import Cost
from bilevel.ground.loops import keep_types
from bilevel.ground.settings import check_settings, real
from bilevel.ground.status import Status, code, status_of
from bilevel.hypergradient.base import Pullback
from bilevel.hypergradient.reach import check_reaches
from bilevel.hypergradient.unroll import Advanced, UnrollState, zeros_for_shapes
from bilevel.inner.descend import KEEP, InnerState, descend, start
from bilevel.inner.optimizer import (
    InnerTx,
    build_tx,
    check_inner_tx,
    compute_updates,
    reads_value,
    refresh_injected,
)
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner, check_same_tree, require_loss

LOST = 0.05
"""Largest part of the perturbation that the parameters' dtype may lose: it errs by as much."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FiniteDifference:
    r"""The pullback of one optimizer step, its mixed product by central differences.

    With the step :math:`w^+ = w + u(∇_w h(w, λ), λ)` and
    :math:`v = -(∂u/∂∇h)ᵀ g`, which is :math:`a g` for SGD at learning
    rate a and Adam's diagonal times g for Adam,

    .. math::
        indirect = (∂_λ u)ᵀ g
            + \frac{∇_λ h(w - ϵ v) - ∇_λ h(w + ϵ v)}{2ϵ}
        ≈ (∂_λ u)ᵀ g - Bᵀ v,  ϵ = radius/‖v‖

    The error is :math:`O(ϵ^2)`, zero where :math:`∇_λ h` is quadratic in w;
    in float32 cancellation leaves about three digits. ``Unroll(inner_tx, steps=1)`` computes
    the same number exactly, usually for less than a quarter more.

    Args:
      inner_tx: the optax transformation of the step, or ``hparams -> transformation``.
        ``optax.sgd(a)`` makes this the estimator of DARTS, Adam and others that of SAMA.
      radius: length of the perturbation :math:`ϵ v`, in units of the parameters. The
        status is ``rounding`` where the dtype of the parameters loses more than a twentieth
        of it: it is too small, or they are in half precision.
      lookahead: take the step, and the outer gradient after it (DARTS). ``False`` leaves the
        parameters where they are, for a point that the caller's own training has reached (SAMA
        around a solution; with SGD, T1-T2).

    ``inner_batch`` is one batch, without a leading axis. The optimizer's state is carried, so
    a step is not paid twice. Model state is advanced by the step and not differentiated.

    Cost: one inner gradient and two gradients in the hyperparameters (a third where ``inner_tx``
    reads the loss, as ``optax.polyak_sgd``); two vectors of memory.
    Stats as :class:`~bilevel.Unroll`, and ``epsilon``.

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable architecture search", ICLR 2019;
    Choe et al., "Making scalable meta learning practical", NeurIPS 2023.
    """

    inner_tx: InnerTx = dataclasses.field(metadata={"static": True})
    radius: float | jax.Array = real(0.01, low=0, strict=True)
    lookahead: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        check_inner_tx(self.inner_tx)
        check_settings(self)

    def cost(self, hparams: Hparams, stats: Stats) -> Cost:
        """The gradient of the step, and two in the hyperparameters."""
        return Cost(3)

    def init(self, problem: Problem, params: Params, hparams: Hparams) -> UnrollState:
        """A fresh optimizer's state, and the model state."""
        params, hparams, model_state = jax.tree.map(
            zeros_for_shapes, (params, hparams, problem.model_state)
        )
        carry = start(build_tx(self.inner_tx, hparams), params, model_state)
        return UnrollState(carry.opt_state, carry.model_state)

    def _carry(self, problem: Problem, params: Params, hparams: Hparams, state: Any) -> InnerState:
        tx = build_tx(self.inner_tx, hparams)
        fresh = start(tx, params, problem.model_state)
        if state is None:
            return fresh
        return fresh._replace(opt_state=refresh_injected(state.opt_state, tx, params))

    def check(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: Any,
    ) -> None:
        """Raise what this response can tell is wrong, at trace time."""
        require_loss(problem, "FiniteDifference")
        check_inner(problem, params, hparams, inner_batch)
        if state is not None:
            expected = jax.eval_shape(lambda: self.init(problem, params, hparams))
            check_same_tree(state, expected, "state")

        def advance(lam: Hparams, in_loss: Hparams) -> Any:
            carry = self._carry(problem, params, lam, state)
            stack = jax.tree.map(lambda x: x[None], inner_batch)
            tx = build_tx(self.inner_tx, lam)
            end, _ = descend(problem, tx, carry, in_loss, stack, steps=1, unroll=False)
            return end.params

        check_reaches(
            problem, advance, params, hparams, inner_batch, outer_batch, inner_tx=self.inner_tx
        )

    def vjp(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        state: UnrollState | None,
        *,
        key: Key | None = None,
    ) -> tuple[Params | Advanced, Pullback]:
        """The parameters after the step (or before it), and the pullback through it."""
        (loss, model_state), grads = jax.value_and_grad(problem.inner_loss_and_state, has_aux=True)(
            params, hparams, inner_batch, problem.model_state
        )
        carry = self._carry(problem, params, hparams, state)
        model_state = keep_types(model_state, carry.model_state, "model_state", KEEP)

        def value_fn(params: Params) -> Any:
            return problem.inner_loss(params, hparams, inner_batch)

        def update(lam: Hparams, grads: Vector, loss: Scalar) -> tuple[Params, Any]:
            carry = self._carry(problem, params, lam, state)
            tx = build_tx(self.inner_tx, lam)
            updates, opt_state = compute_updates(
                tx, grads, carry.opt_state, params, value=loss, value_fn=value_fn
            )
            moved = optax.apply_updates(params, updates)
            return moved, keep_types(opt_state, carry.opt_state, "opt_state", KEEP)

        moved, transpose, opt_state = jax.vjp(update, hparams, grads, loss, has_aux=True)
        if self.lookahead:
            end = InnerState(moved, opt_state, model_state)
        else:
            end = carry
        new_state = UnrollState(end.opt_state, end.model_state)
        told_the_loss = reads_value(build_tx(self.inner_tx, hparams), params, loss)

        def pullback(g: Any) -> tuple[Hparams, UnrollState, jax.Array, Stats]:
            g = g.params if isinstance(g, Advanced) else g
            of_settings, through_grads, through_loss = transpose(g)
            v = tree.scale(-1, tree.accumulate(through_grads))
            length = tree.norm(v)
            epsilon = self.radius / jnp.where(length > 0, length, 1)

            def shifted(sign: int) -> Params:
                return tree.cast_like(tree.axpy(sign * epsilon, v, tree.accumulate(params)), params)

            def hparams_grad(at: Params) -> Hparams:
                return jax.grad(problem.inner_loss, argnums=1)(at, hparams, inner_batch)

            low, high = shifted(-1), shifted(1)
            difference = tree.sub(hparams_grad(low), hparams_grad(high))
            indirect = tree.axpy(1 / (2 * epsilon), difference, of_settings)
            if told_the_loss:
                indirect = tree.axpy(through_loss, hparams_grad(params), indirect)
            # The distance that the two points really have, in the dtype of the parameters.
            apart = tree.sub(tree.accumulate(high), tree.accumulate(low))
            lost = tree.norm(tree.sub(tree.scale(1 / (2 * epsilon), apart), v))
            stats = {"stationarity": tree.norm(grads), "inner_loss": loss, "epsilon": epsilon}
            result = status_of(code(Status.ok), (~(lost <= LOST * length), Status.rounding))
            return indirect, new_state, result, stats

        if problem.has_state:
            return Advanced(end.params, end.model_state), pullback
        return end.params, pullback
