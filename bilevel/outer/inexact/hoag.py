r"""HOAG: hypergradients from solves that become more accurate as the run goes on."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar
from bilevel.ground.cost import Cost
from bilevel.ground.loops import keep_types
from bilevel.ground.settings import check_one_real, concrete
from bilevel.ground.status import worst
from bilevel.linear.cg import CG
from bilevel.outer.base import KEEP, Algorithm, Info, own, own_params
from bilevel.outer.inexact.solves import HESSIAN, SOLVER, Solved, Solves, check_solves
from bilevel.outer.inexact.tolerance import Schedule, at_step, schedule_of
from bilevel.outer.variable import Mover, Variable
from bilevel.problem.operators.base import Operator
from bilevel.problem.validate import check_point
from bilevel.space.space import Space

REJECTED = 2.0
"""What the Lipschitz estimate is multiplied with after a step that is turned down."""

LOOSEST = 0.5
"""No linear system is solved less accurately, relative to its right side."""


class HoagState(NamedTuple):
    """Everything a run is: save this one tree and nothing is forgotten.

    Attributes:
      params: the inner minimum of the last step, where the next one starts.
      outer: the hyperparameters to be tried next.
      response: the last solution of the linear system.
      kept: the last hyperparameters that were not turned down.
      kept_grads: the hypergradient there, in what moves.
      kept_value: the outer loss there.
      kept_error: by how much that loss may err, to first order.
      lipschitz: the estimate L: a step is the hypergradient over L.
      factor: what rejections have multiplied the tolerance with.
      scale: norm of the inner gradient at the start of the run, the unit of the tolerance.
      step: int32, steps made.
    """

    params: Params
    outer: Variable
    response: Any
    kept: Variable
    kept_grads: Hparams
    kept_value: Scalar
    kept_error: Scalar
    lipschitz: Scalar
    factor: Scalar
    scale: Scalar
    step: jax.Array

    @property
    def model_state(self) -> ModelState:
        """None: the solves are deterministic."""
        return None

    @property
    def hparams(self) -> Hparams:
        """What the losses read."""
        return self.outer.hparams


def hoag(
    outer: Loss,
    inner: Loss,
    tol: Any = "exponential",
    *,
    first_tol: float = 1e-3,
    first_step: float = 1.0,
    linear_factor: float = 1.0,
    shrink: float = 0.95,
    solver: CG = SOLVER,
    operator: Operator = HESSIAN,
    constrain: Space | None = None,
    has_aux: bool = False,
    max_steps: int = 1000,
) -> Algorithm:
    r"""Hyperparameter optimization with approximate gradients (HOAG).

    .. math::
        ‖∇_w h(w_k, λ_k)‖ ≤ ϵ_k ‖∇_w h(w_0, λ_0)‖,
        ‖H q_k - g‖ ≤ c ϵ_k ‖g‖, \\
        p_k = ∂_λ f - Bᵀ q_k,  λ_{k+1} = λ_k - p_k / L_k

    with both solves started from those of the step before. The tolerances :math:`ϵ_k` fall
    with the steps: early hypergradients are cheap, late ones are accurate, and the iterates
    converge to a stationary point if :math:`∑_k ϵ_k < ∞`. The error is
    :math:`‖p_k - ∇F(λ_k)‖ = O(ϵ_k)`.

    The step follows an estimate L of the Lipschitz constant of the hypergradient. The computed loss
    is off by about :math:`e_k = |q_kᵀ ∇_w h|` (and its rounding), and with
    :math:`Δ = λ_k - λ_{k-1}` L becomes 0.95 L (``shrink``) if
    :math:`f_k ≤ f_{k-1} - ½ L ‖Δ‖^2 + e_k + e_{k-1}`, and stays if
    :math:`f_k ≤ f_{k-1} + e_k + e_{k-1}`. Otherwise :math:`λ_k` is turned down: L becomes
    2 L, the tolerances are halved from here on, and the next step leaves from
    :math:`λ_{k-1}` again. (The published rule bounds :math:`e_k` by constants times the
    tolerances and allows a rise by a fifth, which needs a positive loss.)

    Args:
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss of the same form: deterministic, smooth, strongly convex near its
        minimum.
      tol: ``"exponential"`` (:math:`ϵ_k = ϵ_0 0.9^k`), ``"quadratic"`` (:math:`ϵ_0/(k+1)^2`),
        ``"cubic"``; a function step -> tolerance that falls; or one number for all steps: a small
        one makes exact solves.
      first_tol: :math:`ϵ_0`. No tolerance is below 32 units of rounding.
      first_step: root mean square of the first move, in the units of what moves, from which the
        first L is found.
      linear_factor: c, how many times looser the linear system is solved than the inner problem,
        but never looser than to half its right side. Products are often most of the work, and 10
        saves many of them.
      shrink: what L is multiplied with after a good step. Where the hypergradient is much steeper
        at the start than at the end, most steps are spent until L has fallen: 0.5 is then faster,
        at the price of some steps that are turned down.
      solver: conjugate gradients: its ``max_steps`` and preconditioner.
      operator: the curvature in place of H, as for ``Implicit``.
      constrain: bounds; None leaves the hyperparameters free.
      has_aux: ``outer`` returns ``(scalar, aux)``.
      max_steps: most steps of an inner minimization (:func:`~bilevel.minimize`).

    Returns:
      ``Algorithm(init, step, deploy)``; ``init(params, hparams) -> HoagState``, and
      ``step(state, *, inner_batches, outer_batch, key=None)``, where ``inner_batches`` has a
      leading axis of 1: the one batch that all steps solve on. ``deploy(state)`` is
      ``state.params``. ``info.stats`` has ``tol``, ``lipschitz``, ``accepted``, ``num_gradients``
      and those of the linear solve; a value that was turned down is reported as any other.

    Raises:
      TypeError, ValueError: at construction or when traced, for settings, trees and axes that do
        not fit.

    Cost: what the two solves take, counted in ``info.cost``, one outer gradient, and one inner
    gradient in the first step. Memory: twenty vectors (those of L-BFGS), one of warm start.

    Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + jnp.exp(lam) * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.hoag(valid, train)
      >>> state = alg.init(jnp.zeros(1), jnp.array(1.0))
      >>> step = jax.jit(alg.step)
      >>> for _ in range(20):
      ...     state, info = step(state, inner_batches=jnp.full((1, 1), 2.0),
      ...                        outer_batch=jnp.ones(1))
      >>> bool(abs(info.hparams) < 0.05)  # the decay that halves the mean, e^lam = 1
      True
    """
    solves = check_solves(outer, inner, solver, operator, constrain, has_aux, max_steps)
    check_one_real("first_tol", first_tol, 0, strict=True)
    check_one_real("first_step", first_step, 0, strict=True)
    check_one_real("linear_factor", linear_factor, 0, strict=True)
    check_one_real("shrink", shrink, 0, strict=True)
    if concrete(shrink) and not shrink <= 1:
        raise ValueError(f"`shrink` must be at most 1, got {shrink}.")
    schedule = schedule_of(tol, first_tol)
    mover = Mover(optax.scale(-1.0), constrain)
    run = _Hoag(solves, schedule, first_step, linear_factor, shrink, mover)
    return Algorithm(run.init, run.step, own_params)


@dataclasses.dataclass(frozen=True)
class _Hoag:
    """The settings of :func:`hoag`, checked, and the step they make."""

    solves: Solves
    schedule: Schedule
    first_step: float
    linear_factor: float
    shrink: float
    mover: Mover

    def init(self, params: Params, hparams: Hparams) -> HoagState:
        """The first state; see :func:`hoag`."""
        check_point(params, hparams)
        params, hparams = own(params), own(hparams)
        variable = self.mover.begin(hparams)
        zero = jnp.zeros((), tree.norm(params).dtype)
        none = jax.tree.map(jnp.zeros_like, variable.moving)
        response = self.solves.begin(params, hparams)
        step = jnp.zeros((), jnp.int32)
        one = zero + 1
        return own(
            HoagState(
                params, variable, response, variable, none, zero, zero, one, one, zero, step
            )
        )  # fmt: skip

    def step(
        self,
        state: HoagState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[HoagState, Info]:
        """One step; see :func:`hoag`."""
        batch = self.solves.batch(state, HoagState, inner_batches, outer_batch)
        lam = state.hparams
        scale = self._scale(state, batch)
        tol = at_step(self.schedule, state.step, state.factor)
        minimum = self.solves.minimum(state.params, lam, batch, tol * scale)
        rtol = jnp.minimum(self.linear_factor * tol, jnp.maximum(tol, LOOSEST))
        solved = self.solves.hypergradient(
            minimum, lam, batch, outer_batch, state.response, key, rtol=rtol
        )
        solution = solved.solution
        grads = self.mover.pull(state.outer, solution.grads)
        new, accepted = self._move(state, solved, grads)
        new = new._replace(params=minimum.params, response=solution.state, scale=scale)
        stats = {
            **solution.stats,
            "tol": tol,
            "lipschitz": new.lipschitz,
            "accepted": accepted,
            "num_gradients": solved.gradients,
        }
        info = Info(
            solution.value,
            minimum.stats["value"],
            tree.norm(grads),
            lam,
            worst(minimum.result, solution.result),
            stats,
            Cost(solved.gradients + (state.step == 0), solved.products, 1).arrays(),
            solution.aux,
        )
        return keep_types(new, state, "state", KEEP), info

    def _scale(self, state: HoagState, batch: Batch) -> Scalar:
        """The inner gradient's norm at the start of the run, taken in the first step."""

        def measured() -> Scalar:
            gradient = self.solves.problem.inner_grad(state.params, state.hparams, batch)
            return tree.norm(gradient).astype(state.scale.dtype)

        return jax.lax.cond(state.step == 0, measured, lambda: state.scale)

    def _move(
        self, state: HoagState, solved: Solved, grads: Hparams
    ) -> tuple[HoagState, jax.Array]:
        """Judge the hyperparameters that were tried, and leave them or those kept before."""
        first = state.step == 0
        value, dtype = solved.solution.value, state.scale.dtype
        rounding = 4 * jnp.finfo(dtype).eps * jnp.abs(value)
        error = jnp.abs(solved.solution.stats["predicted_change"]) + rounding
        length = tree.norm(tree.sub(state.outer.moving, state.kept.moving))
        slack = state.kept_value + error + state.kept_error
        # A NaN is not turned down: it moves on into the hyperparameters.
        rejected = ~first & (value > slack)
        good = ~first & (value <= slack - 0.5 * state.lipschitz * length**2)
        norm = tree.norm(grads)
        begun = norm / (self.first_step * jnp.sqrt(tree.size(grads)))
        lipschitz = state.lipschitz * jnp.where(rejected, REJECTED, jnp.where(good, self.shrink, 1))
        lipschitz = jnp.where(first, jnp.where(norm == 0, 1, begun), lipschitz)
        kept = tree.where(rejected, state.kept, state.outer)
        kept_grads = tree.where(rejected, state.kept_grads, grads)
        outer, _ = self.mover.move(kept, tree.scale(1 / lipschitz, kept_grads), value=value)
        new = state._replace(
            outer=outer,
            kept=kept,
            kept_grads=kept_grads,
            kept_value=jnp.where(rejected, state.kept_value, value).astype(dtype),
            kept_error=jnp.where(rejected, state.kept_error, error).astype(dtype),
            lipschitz=lipschitz,
            factor=state.factor * jnp.where(rejected, 0.5, 1),
            step=state.step + 1,
        )
        return new, ~rejected
