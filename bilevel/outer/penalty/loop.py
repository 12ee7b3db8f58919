r"""What penalty methods share: two copies of the parameters, their training, the record."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from jax import Array

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar, Stats
from bilevel.ground.batches import check_stack, one_batch, select_batch
from bilevel.ground.cost import Cost
from bilevel.ground.loops import keep_types, must_unroll, strong_types
from bilevel.ground.settings import (
    check_count,
    check_flag,
    check_one_real,
    check_takes,
    is_function,
)
from bilevel.inner.descend import InnerState, StepInfo, descend, run_steps, take_step
from bilevel.inner.optimizer import check_fixed_tx, check_tx
from bilevel.outer.base import KEEP, Info, check_model_state, check_state, own
from bilevel.outer.frozen import Part, trained_leaves
from bilevel.outer.penalty.difference import check_reaches, judged
from bilevel.outer.variable import Mover, Variable, check_space
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import (
    check_inner,
    check_losses,
    check_point,
    check_problem,
)
from bilevel.space.space import Space

Schedule: TypeAlias = float | Callable[[Array], Any]


class PenaltyState(NamedTuple):
    """Everything a run of a penalty method is.

    Attributes:
      trained: parameters that are trained on the inner loss alone, and their optimizer and model
        state: what is deployed.
      penalized: as many more, trained on the inner loss plus a multiple of the outer one.
      outer: the hyperparameters, their raw twin and the state of ``outer_tx``.
      step: int32, outer updates made.
    """

    trained: InnerState
    penalized: tuple[InnerState, ...]
    outer: Variable
    step: Array

    @property
    def params(self) -> Params:
        """Inner parameters, trained on the inner loss alone."""
        return self.trained.params

    @property
    def model_state(self) -> ModelState:
        """Statistics of the model at those parameters."""
        return self.trained.model_state

    @property
    def hparams(self) -> Hparams:
        """What the losses read."""
        return self.outer.hparams


class Move(NamedTuple):
    """What a method did in a step: its states, its gradient and the evidence.

    Attributes:
      trained, penalized: after the step.
      inner_value: inner loss in the last training step.
      grads: in the hyperparameters that the losses read.
      result, stats: as in :class:`~bilevel.outer.Info`.
      cost: derivatives evaluated.
    """

    trained: InnerState
    penalized: tuple[InnerState, ...]
    inner_value: Scalar
    grads: Hparams
    result: Array
    stats: Stats
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Penalty:
    """The settings that penalty methods share, checked, and the frame of their step.

    Attributes:
      copies: how many penalized parameters there are.
      advance: ``(self, state, inner_batches, batch, outer_batch) -> Move``: the method.
    """

    problem: Problem
    inner_tx: optax.GradientTransformation
    penalized_tx: optax.GradientTransformation
    mover: Mover
    inner_steps: int
    unroll: bool | None
    copies: int
    advance: Callable[["Penalty", PenaltyState, Batch, Batch, Batch], Move]

    def init(
        self, params: Params, hparams: Hparams, model_state: ModelState = None
    ) -> PenaltyState:
        """The first state: all copies of the parameters stand at ``params``."""
        check_model_state(self.problem.has_state, model_state)
        check_point(params, hparams)
        trained = self.begin(self.inner_tx, params, model_state)
        penalized = tuple(
            self.begin(self.penalized_tx, params, model_state) for _ in range(self.copies)
        )
        outer = self.mover.begin(own(hparams))
        return own(PenaltyState(trained, penalized, outer, jnp.zeros((), jnp.int32)))

    def begin(
        self, tx: optax.GradientTransformation, params: Params, model_state: ModelState
    ) -> InnerState:
        """Parameters with a fresh state of ``tx``."""
        params = own(params)
        return InnerState(params, strong_types(tx.init(params)), strong_types(model_state))

    def step(
        self,
        state: PenaltyState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        response_batch: Batch = None,
        key: Key | None = None,
    ) -> tuple[PenaltyState, Info]:
        """One step; ``key`` is not used, nothing is drawn."""
        check_state(state, PenaltyState)
        reads = (
            f"one batch for each of the inner_steps={self.inner_steps} training steps, of which "
            "the difference of gradients reads the last unless `response_batch` is given"
        )
        check_stack(inner_batches, self.inner_steps, "inner_batches", reads)
        batch = response_batch
        if batch is None:
            batch = select_batch(inner_batches, self.inner_steps - 1)
        problem, hparams = self.problem.at(state.model_state), state.hparams
        for each in (select_batch(inner_batches, 0), batch):
            check_problem(problem, state.params, hparams, each, outer_batch)
            check_inner(problem, state.params, hparams, each)
        check_reaches(problem, state.params, hparams, batch, outer_batch)
        move = self.advance(self, state, inner_batches, batch, outer_batch)
        deployed = self.problem.at(move.trained.model_state)
        value, aux = deployed.outer_loss(move.trained.params, hparams, outer_batch)
        grads = tree.cast_like(move.grads, hparams)
        pulled = self.mover.pull(state.outer, grads)
        outer, norm = self.mover.move(state.outer, pulled, value=value)
        info = Info(
            value,
            move.inner_value,
            norm,
            hparams,
            judged(move.result, value, grads),
            move.stats,
            move.cost.arrays(),
            aux,
        )
        new = PenaltyState(move.trained, move.penalized, outer, state.step + 1)
        return keep_types(new, state, "state", KEEP), info

    def train(
        self, start: InnerState, hparams: Hparams, batches: Batch
    ) -> tuple[InnerState, Scalar]:
        """``inner_steps`` steps on the inner loss, and what the last of them saw."""
        after, info = descend(
            self.problem.at(start.model_state),
            self.inner_tx,
            start,
            hparams,
            batches,
            steps=self.inner_steps,
            unroll=self.unroll,
        )
        return after, info.loss[-1]

    def train_together(
        self,
        trained: InnerState,
        penalized: tuple[InnerState, ...],
        scales: tuple[Scalar, ...],
        hparams: Hparams,
        batches: Batch,
        outer_batch: Batch,
    ) -> tuple[InnerState, tuple[InnerState, ...], Scalar]:
        r"""As :meth:`train`, beside as many steps of each penalized copy on :math:`h + sf`.

        In one loop, so that what depends on a batch alone is computed once for all copies.
        """
        problem = self.problem

        def mixed(scale: Scalar, batch: Batch, w: Params, model_state: ModelState) -> Any:
            value, new = problem.inner_loss_and_state(w, hparams, batch, model_state)
            other, _ = problem.at(model_state).outer_loss(w, hparams, outer_batch)
            return value + scale.astype(other.dtype) * other, new

        def step(states: tuple[InnerState, ...], index: Array) -> tuple[Any, StepInfo]:
            batch = select_batch(batches, index)
            given = {"hparams": hparams, "batch": batch}

            def plain(w: Params, model_state: ModelState) -> Any:
                return problem.inner_loss_and_state(w, hparams, batch, model_state)

            first, info = take_step(plain, self.inner_tx, states[0], given=given)
            rest = (
                take_step(partial(mixed, s, batch), self.penalized_tx, y, given=given)[0]
                for s, y in zip(scales, states[1:], strict=True)
            )
            return (first, *rest), info

        unroll = self.unroll
        if unroll is None:
            read = scales[0], one_batch(batches), trained.params, trained.model_state
            unroll = must_unroll(mixed, *read)
        states, info = run_steps(step, (trained, *penalized), 0, self.inner_steps, unroll=unroll)
        return states[0], states[1:], info.loss[-1]

    def part(self, params: Params) -> Part:
        """The leaves of ``params`` that training moves."""
        return Part(params, trained_leaves(self.inner_tx, params))


def penalty_at(penalty: Schedule, growth: float, step: Array, params: Params) -> Scalar:
    """The penalty of a step: a number that grows as a power of the step, or a schedule."""
    dtype = tree.norm(params).dtype
    if not callable(penalty):
        grown = (1 + step.astype(dtype)) ** jnp.asarray(growth, dtype)
        return jnp.asarray(penalty, dtype) * grown
    value = penalty(step)
    if value is None or jnp.shape(value) != () or not jnp.isrealobj(value):
        raise TypeError(
            f"`penalty` must return one number for a step, got {value!r}: a schedule is a function "
            "of the step, such as `optax.linear_schedule(1.0, 100.0, 1000)`."
        )
    return jnp.asarray(value, dtype)


def make(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int,
    penalized_tx: optax.GradientTransformation | None,
    constrain: Space | None,
    has_aux: bool,
    has_state: bool,
    unroll: bool | None,
    copies: int,
    advance: Callable[[Penalty, PenaltyState, Batch, Batch, Batch], Move],
) -> Penalty:
    """The frame of a penalty method, its arguments checked."""
    check_losses(outer=outer, inner=inner)
    check_fixed_tx("inner_tx", inner_tx)
    check_tx("outer_tx", outer_tx)
    if penalized_tx is not None:
        check_fixed_tx("penalized_tx", penalized_tx)
    check_count("inner_steps", inner_steps)
    check_flag("has_aux", has_aux)
    check_flag("has_state", has_state)
    check_flag("unroll", unroll, optional=True)
    check_space(constrain, "{'decay': Positive()}")
    return Penalty(
        Problem(outer, inner, has_aux, has_state),
        inner_tx,
        inner_tx if penalized_tx is None else penalized_tx,
        Mover(outer_tx, constrain),
        inner_steps,
        unroll,
        copies,
        advance,
    )


def check_penalty(penalty: Any) -> None:
    """Refuse what is neither a positive number nor a schedule."""
    if is_function(penalty):
        check_takes("penalty", penalty, "penalty(step)")
    else:
        check_one_real("penalty", penalty, 0, strict=True)
