r"""BO-REP: normalized momentum, for outer functions whose curvature grows with their gradient."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar, Vector
from bilevel.ground.batches import check_stack, select_batch
from bilevel.ground.cost import Cost
from bilevel.ground.loops import keep_types, strong_types
from bilevel.ground.settings import check_count, check_flag, check_one_real, is_function
from bilevel.ground.status import Status, status_of
from bilevel.inner.descend import InnerState, descend, start
from bilevel.inner.optimizer import check_fixed_tx
from bilevel.outer.base import (
    KEEP,
    Algorithm,
    Info,
    check_model_state,
    check_state,
    own,
    own_params,
)
from bilevel.outer.variable import Mover, Variable, check_space
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import (
    check_inner,
    check_is_read,
    check_losses,
    check_point,
    check_problem,
)
from bilevel.space.space import Space


class BoRepState(NamedTuple):
    """Everything a run is: save this one tree and nothing is forgotten.

    Attributes:
      trained: inner parameters, state of ``inner_tx``, statistics of the model.
      outer: the hyperparameters and the momentum (in the state of their optimizer).
      response: the running solution q of the linear system.
      step: int32, steps made, those of the warm-up among them.
    """

    trained: InnerState
    outer: Variable
    response: Vector
    step: jax.Array

    @property
    def params(self) -> Params:
        """Inner parameters."""
        return self.trained.params

    @property
    def model_state(self) -> ModelState:
        """Statistics of the model."""
        return self.trained.model_state

    @property
    def hparams(self) -> Hparams:
        """What the losses read."""
        return self.outer.hparams


def bo_rep(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    rate: Any,
    inner_steps: int = 3,
    *,
    every: int = 2,
    momentum: float = 0.9,
    solve_rate: float = 1e-2,
    warm_up: int = 0,
    constrain: Space | None = None,
    has_aux: bool = False,
    has_state: bool = False,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Bilevel optimization under unbounded smoothness (BO-REP).

    .. math::
        w &← w - u(∇_w h(w, λ)),
            N \text{ times, in every } I\text{-th step} \\
        m &← β m + (1 - β)(∂_λ f - Bᵀ q),
        q ← q - ν (H q - ∇_w f) \\
        λ &← λ - η m / ‖m‖

    A step has the length :math:`η` whatever the hypergradient is. Where the curvature of F is
    bounded not by a constant but by :math:`L_0 + L_1‖∇F‖`, as in recurrent networks, a
    step along the gradient itself overshoots and diverges; this one cannot. In return it does not
    become short near a minimum: let ``rate`` decay.

    The theory begins near the inner minimum: the first ``warm_up`` steps only train (initialization
    refinement). It keeps w in a ball around its last update, which is left out here: short training
    phases stay near by themselves.

    Args:
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss of the same form.
      inner_tx: an optax transformation of the parameters.
      rate: :math:`η`, a number or an optax schedule of the steps after the warm-up; in the units
        of what moves.
      inner_steps: N, training steps of a phase.
      every: I, steps from one phase to the next.
      momentum: :math:`β`, in [0, 1).
      solve_rate: :math:`ν`, below 2 over the largest eigenvalue of H.
      warm_up: steps at the start that only train.
      constrain: bounds; None leaves the hyperparameters free.
      has_aux: ``outer`` returns ``(scalar, aux)``.
      has_state: both losses are ``loss(params, hparams, batch, model_state) -> (scalar,
        model_state)``; training steps advance the statistics.
      unroll: write the training steps out one by one; None decides by itself.

    Returns:
      ``Algorithm(init, step, deploy)``; ``init(params, hparams, model_state=None) -> BoRepState``,
      and ``step(state, *, inner_batches, outer_batch, key=None)``, where ``inner_batches`` has
      a leading axis of N + 1: the first N are trained on where the step trains, the last one is
      that of the product. ``deploy(state)`` is ``state.params``. ``info.stats`` has
      ``residual_norm`` :math:`‖H q - ∇_w f‖`, ``rhs_norm``, ``direct_norm``,
      ``indirect_norm``, ``moved``; a residual above the right side is ``worse_than_zero``: the
      parameters moved faster than q could follow, or ``solve_rate`` is too large.

    Raises:
      TypeError, ValueError: at construction or when traced, for settings, trees and axes that do
        not fit.

    Cost: N / I inner gradients, one product and one outer gradient per step. Memory: the state of
    training, one vector, and one of momentum like ``hparams``.

    Reference: Hao, Gong, Liu, "Bilevel optimization under unbounded smoothness: a new algorithm
    and convergence analysis", ICLR 2024.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + jnp.exp(lam) * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.bo_rep(valid, train, optax.sgd(0.1), optax.exponential_decay(0.1, 50, 0.3),
      ...                      solve_rate=0.2, warm_up=5)
      >>> state = alg.init(jnp.zeros(1), jnp.array(1.0))
      >>> step = jax.jit(alg.step)
      >>> for _ in range(200):
      ...     state, info = step(state, inner_batches=jnp.full((4, 1), 2.0),
      ...                        outer_batch=jnp.ones(1))
      >>> bool(abs(info.hparams) < 0.05)  # the decay that halves the mean, e^lam = 1
      True
    """
    check_losses(outer=outer, inner=inner)
    check_fixed_tx("inner_tx", inner_tx)
    for name, count, low in (("inner_steps", inner_steps, 1), ("every", every, 1)):
        check_count(name, count, low)
    check_count("warm_up", warm_up, 0)
    if not is_function(rate):
        check_one_real("rate", rate, 0, strict=True)
    check_one_real("solve_rate", solve_rate, 0, strict=True)
    check_one_real("momentum", momentum, 0)
    if not momentum < 1:
        raise ValueError(f"`momentum` must be less than 1, got {momentum}.")
    check_flag("has_aux", has_aux)
    check_flag("has_state", has_state)
    check_flag("unroll", unroll, optional=True)
    check_space(constrain, "{'decay': Positive()}")
    tx = optax.chain(
        optax.ema(momentum, debias=False), _unit_length(), optax.scale_by_learning_rate(rate)
    )
    run = _BoRep(
        Problem(outer, inner, has_aux, has_state), inner_tx, Mover(tx, constrain), inner_steps,
        every, solve_rate, warm_up, unroll,
    )  # fmt: skip
    return Algorithm(run.init, run.step, own_params)


def _unit_length() -> optax.GradientTransformation:
    """A vector over its length; zero stays zero, and one NaN makes all of it NaN."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        length = tree.norm(updates)
        return tree.scale(1 / jnp.where(length == 0, 1, length), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _Solved(NamedTuple):
    """What a step after the warm-up adds: the next q, the next variable, and their evidence."""

    response: Vector
    outer: Variable
    norm: Scalar
    residual: Scalar
    indirect: Scalar


@dataclasses.dataclass(frozen=True)
class _BoRep:
    """The settings of :func:`bo_rep`, checked, and the step they make."""

    problem: Problem
    inner_tx: optax.GradientTransformation
    mover: Mover
    inner_steps: int
    every: int
    solve_rate: float
    warm_up: int
    unroll: bool | None

    def init(self, params: Params, hparams: Hparams, model_state: ModelState = None) -> BoRepState:
        """The first state; see :func:`bo_rep`."""
        check_model_state(self.problem.has_state, model_state)
        check_point(params, hparams)
        params, hparams = own(params), own(hparams)
        trained = start(self.inner_tx, params, model_state)
        zero = tree.zeros_accumulated(params)
        return own(BoRepState(trained, self.mover.begin(hparams), zero, jnp.zeros((), jnp.int32)))

    def step(
        self,
        state: BoRepState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[BoRepState, Info]:
        """One step; see :func:`bo_rep`."""
        check_state(state, BoRepState)
        reads = f"one batch for each of the inner_steps={self.inner_steps} steps, one for a product"
        check_stack(inner_batches, self.inner_steps + 1, "inner_batches", reads)
        batch, lam = select_batch(inner_batches, self.inner_steps), state.hparams
        here = self.problem.at(state.model_state)
        check_problem(here, state.params, lam, batch, outer_batch)
        check_inner(here, state.params, lam, batch)
        check_is_read(here, state.params, lam, batch, outer_batch)

        warming = state.step < self.warm_up
        trains = warming | ((state.step - self.warm_up) % self.every == 0)
        trained, inner_value = jax.lax.cond(
            trains,
            lambda: self._train(state, inner_batches),
            lambda: strong_types((state.trained, here.inner_loss(state.params, lam, batch))),
        )
        problem = self.problem.at(trained.model_state)
        (value, aux), (g, direct) = problem.outer_grads(trained.params, lam, outer_batch)
        solved = jax.lax.cond(
            warming,
            lambda: self._wait(state, g),
            lambda: self._solve(problem, trained.params, state, batch, value, g, direct),
        )
        moves = 1 - warming.astype(jnp.float32)
        stats = {
            "rhs_norm": tree.norm(g),
            "residual_norm": solved.residual,
            "direct_norm": tree.norm(direct),
            "indirect_norm": solved.indirect,
            "moved": moves,
        }
        result = status_of(
            Status.ok,
            (~(jnp.isfinite(value) & tree.all_finite(g)), Status.nonfinite_input),
            (~jnp.isfinite(inner_value), Status.nonfinite_input),
            (~jnp.isfinite(solved.norm + solved.residual), Status.nonfinite_output),
            (solved.residual > 1.001 * stats["rhs_norm"], Status.worse_than_zero),
        )
        new = BoRepState(trained, solved.outer, solved.response, state.step + 1)
        gradients = self.inner_steps * trains.astype(jnp.float32)
        cost = Cost(gradients, moves, 1).arrays()
        info = Info(value, inner_value, solved.norm, lam, result, stats, cost, aux)
        return keep_types(new, state, "state", KEEP), info

    def _train(self, state: BoRepState, batches: Batch) -> tuple[InnerState, Scalar]:
        """``inner_steps`` training steps, and the loss that the last of them saw."""
        trained, seen = descend(
            self.problem.at(state.model_state),
            self.inner_tx,
            state.trained,
            state.hparams,
            batches,
            steps=self.inner_steps,
            unroll=self.unroll,
        )
        return strong_types((trained, seen.loss[-1]))

    def _solve(
        self,
        problem: Problem,
        params: Params,
        state: BoRepState,
        batch: Batch,
        value: Scalar,
        g: Vector,
        direct: Hparams,
    ) -> _Solved:
        """The hypergradient with q as it is, and one step of q: one product yields both."""
        q = state.response
        image, mixed = problem.products(params, state.hparams, batch, q)
        grads = self.mover.pull(state.outer, tree.sub(direct, mixed))
        outer, norm = self.mover.move(state.outer, grads, value=value)
        residual = tree.sub(tree.cast_like(image, q), tree.cast_like(g, q))
        moved = tree.axpy(-self.solve_rate, residual, q)
        return strong_types(_Solved(moved, outer, norm, tree.norm(residual), tree.norm(mixed)))

    def _wait(self, state: BoRepState, g: Vector) -> _Solved:
        """Nothing but training, as in the warm-up: all of the right side is residual."""
        zero = jnp.zeros((), tree.norm(state.outer.moving).dtype)
        indirect = jnp.zeros((), tree.norm(state.hparams).dtype)
        residual = jnp.zeros_like(tree.norm(state.response)) + tree.norm(g)
        return strong_types(_Solved(state.response, state.outer, zero, residual, indirect))
