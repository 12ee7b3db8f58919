r"""The one step of all single loops: directions at one point, and three updates along them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from jax import Array

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar, Vector
from bilevel.ground.batches import check_stack, select_batch
from bilevel.ground.cost import Cost
from bilevel.ground.keys import check_key
from bilevel.ground.loops import keep_types, strong_types
from bilevel.ground.settings import check_one_real
from bilevel.ground.status import Status, status_of, worst
from bilevel.inner.descend import InnerState, take_step
from bilevel.inner.optimizer import compute_updates
from bilevel.outer.base import KEEP, Info, check_model_state, check_state, own
from bilevel.outer.frozen import Part, trained_leaves
from bilevel.outer.single_loop.adjoint import Adjoint
from bilevel.outer.single_loop.base import Estimate, Estimator, Point, Reading, unwrap
from bilevel.outer.single_loop.series import Series
from bilevel.outer.variable import Mover, Variable
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner, check_is_read, check_point, check_problem

Schedule: TypeAlias = Callable[[Any], Any]

WORSE, DIVERGED = 2.0, 10.0
r"""Residuals of the adjoint beyond this many of the largest right sides so far.

With steps below :math:`1/\lambda_{max}` of one matrix the residual stays below two of them. The
right side of the step itself is no measure: it may vanish while the adjoint still follows.
"""


class SingleLoopState(NamedTuple):
    r"""Everything a run is: save this one tree and nothing is forgotten.

    Attributes:
      trained: inner parameters, state of ``inner_tx`` and statistics of the model.
      adjoint: :math:`q`, the running solution of :math:`H q = ∇_w f`, shaped like the
        trained leaves; ``None`` in loops that sum a series.
      linear: the state of ``linear_tx``.
      scale: the largest norm of a right side :math:`∇_w f` so far; ``None`` likewise.
      outer: the hyperparameters, their raw twin and the state of ``outer_tx``.
      memory: what the estimator remembers.
      measured: the parameters before the last step, where all of it was read.
      step: int32, steps made.
    """

    trained: InnerState
    adjoint: Vector | None
    linear: Any
    scale: Scalar | None
    outer: Variable
    memory: Any
    measured: Params
    step: Array

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


def deploy(state: SingleLoopState, hparams: Hparams | None = None) -> Params:
    """The parameters that the last step's outer loss was measured at: those before its update."""
    return state.measured


@dataclasses.dataclass(frozen=True)
class SingleLoop:
    """The settings of :func:`~bilevel.single_loop`, checked, and the step they make."""

    problem: Problem
    reader: Adjoint | Series
    inner_tx: optax.GradientTransformation
    linear_tx: optax.GradientTransformation | None
    mover: Mover
    estimator: Estimator
    schedule: Schedule | None = None

    def at(self, step: Array) -> "SingleLoop":
        """The settings of one step: updates are multiplied with the factor of ``schedule``."""
        schedule: Any = self.schedule
        factor = schedule(step)
        check_one_real("schedule(step)", factor)

        def scaled(tx: Any) -> optax.GradientTransformation:
            return optax.chain(tx, optax.scale(factor))

        linear_tx = None if self.linear_tx is None else scaled(self.linear_tx)
        mover = dataclasses.replace(self.mover, tx=scaled(self.mover.tx))
        return dataclasses.replace(
            self, inner_tx=scaled(self.inner_tx), linear_tx=linear_tx, mover=mover, schedule=None
        )

    def init(
        self, params: Params, hparams: Hparams, model_state: ModelState = None
    ) -> SingleLoopState:
        """The first state; see :func:`~bilevel.single_loop`."""
        if self.schedule is not None:
            return self.at(jnp.zeros((), jnp.int32)).init(params, hparams, model_state)
        check_model_state(self.problem.has_state, model_state)
        check_point(params, hparams)
        params, hparams = own(params), own(hparams)
        small = self._part(params).of(params)
        adjoint, linear, scale = None, None, None
        if self.linear_tx is not None:
            adjoint = tree.zeros_accumulated(small)
            scale = tree.norm(adjoint)
            linear = strong_types(self.linear_tx.init(adjoint))
        trained = InnerState(params, self.inner_tx.init(params), model_state)
        memory = self.estimator.init(Point(small, adjoint, hparams))
        outer, step = self.mover.begin(hparams), jnp.zeros((), jnp.int32)
        # Copied again: a buffer can be donated once only.
        return own(SingleLoopState(trained, adjoint, linear, scale, outer, memory, params, step))

    def step(
        self,
        state: SingleLoopState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[SingleLoopState, Info]:
        """One step; see :func:`~bilevel.single_loop`."""
        check_state(state, SingleLoopState)
        if self.schedule is not None:
            return self.at(state.step).step(
                state, inner_batches=inner_batches, outer_batch=outer_batch, key=key
            )
        check_key(key)
        first = self._check(state, inner_batches, outer_batch)
        part = self._part(state.params)
        problem = self.problem.at(state.model_state)
        point = Point(part.of(state.params), state.adjoint, state.hparams)

        def read(at: Point, inner: Batch, outer: Batch) -> Reading:
            return self.reader.read(problem, part, at, inner, outer)

        estimate = self.estimator.estimate(
            read, point, inner_batches, outer_batch, state.memory, state.step, key
        )
        trained = self._train(state, part, estimate, first)
        adjoint, linear, scale = self._solve(state, estimate)
        # As the losses' own gradients, they have the dtypes of the hyperparameters.
        grads = tree.cast_like(estimate.directions.outer, state.hparams)
        grads = self.mover.pull(state.outer, grads)
        outer, norm = self.mover.move(state.outer, grads, value=estimate.reading.value)
        new = SingleLoopState(
            trained, adjoint, linear, scale, outer, estimate.memory, state.params, state.step + 1
        )
        return keep_types(new, state, "state", KEEP), self._info(new, estimate, norm, state.hparams)

    def _check(self, state: SingleLoopState, inner_batches: Batch, outer_batch: Batch) -> Batch:
        """The first inner batch, after all that is wrong with the arguments was raised."""
        wanted = self.estimator.batches
        inner, _ = unwrap(inner_batches, wanted, "inner_batches")
        outer, _ = unwrap(outer_batch, wanted, "outer_batch")
        check_stack(inner, self.reader.count, "inner_batches", self.reader.reads)
        check = getattr(self.estimator, "check", None)
        if check is not None:
            check(inner_batches, outer_batch, self.reader.count)
        first = select_batch(inner, 0)
        problem, point = self.problem.at(state.model_state), (state.params, state.hparams)
        check_problem(problem, *point, first, outer)
        check_inner(problem, *point, first)
        part = self._part(state.params)
        at = part.of(state.params), state.hparams
        check_is_read(part.problem(problem), *at, first, outer)
        return first

    def _part(self, params: Params) -> Part:
        """The leaves that respond: those that ``inner_tx`` trains."""
        return Part(params, trained_leaves(self.inner_tx, params))

    def _train(
        self, state: SingleLoopState, part: Part, estimate: Estimate, batch: Batch
    ) -> InnerState:
        """The training step of every loop, along the estimated direction."""
        reading = estimate.reading
        moves = Part(reading.grads, part.flags).whole(estimate.directions.inner)
        grads = tree.cast_like(moves, state.params)

        def loss(params: Params, model_state: ModelState) -> tuple[Scalar, ModelState]:
            return self.problem.inner_loss_and_state(params, state.hparams, batch, model_state)

        def gradient(params: Params, model_state: ModelState) -> Any:
            return (reading.inner_value, reading.model_state), grads

        return take_step(loss, self.inner_tx, state.trained, gradient)[0]

    def _solve(self, state: SingleLoopState, estimate: Estimate) -> tuple[Any, Any, Any]:
        """The adjoint, one step nearer to the solution of its system, and what goes with it."""
        if self.linear_tx is None:
            return None, None, None
        oracles = estimate.reading.oracles
        q: Any = state.adjoint
        scale: Any = state.scale
        right = oracles.outer
        value = 0.5 * tree.vdot(q, oracles.product) - tree.vdot(q, right)
        updates, linear = compute_updates(
            self.linear_tx,
            estimate.directions.linear,
            state.linear,
            q,
            value=value,
            value_fn=_no_search,
            name="linear_tx",
        )
        # A NaN is no largest right side.
        scale = jnp.fmax(scale, estimate.reading.stats["rhs_norm"])
        return optax.apply_updates(q, updates), linear, scale

    def _info(
        self, new: SingleLoopState, estimate: Estimate, norm: Scalar, hparams: Hparams
    ) -> Info:
        """What the step saw, and what it makes of it."""
        reading, oracles = estimate.reading, estimate.reading.oracles
        stats = {
            **reading.stats,
            "stationarity": tree.norm(oracles.inner),
            "direct_norm": tree.norm(oracles.direct),
            "indirect_norm": tree.norm(oracles.cross),
        }
        read: Any = (reading.inner_value, reading.value, *stats.values())
        directions = estimate.directions
        moves = (tree.norm(directions.inner), tree.norm(directions.linear), norm)
        result = reading.result
        if new.scale is not None:
            residual = stats["residual_norm"]
            far = status_of(
                Status.ok,
                (residual > DIVERGED * new.scale, Status.diverged),
                (residual > WORSE * new.scale, Status.worse_than_zero),
            )
            result = worst(result, far)
        result = status_of(
            result,
            (estimate.invalid, Status.invalid_setting),
            (~_finite(read), Status.nonfinite_input),
            (~_finite(moves), Status.nonfinite_output),
        )
        cost = Cost(*(n * k for n, k in zip(self.reader.cost(), estimate.times, strict=True)))
        return Info(
            reading.value,
            reading.inner_value,
            norm,
            hparams,
            result,
            stats,
            cost.arrays(),
            reading.aux,
        )


def _finite(numbers: tuple[Any, ...]) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(x) for x in numbers]))


def _no_search(adjoint: Vector) -> Scalar:
    raise ValueError(
        "`linear_tx` evaluates its objective at other points (a line search), where the products "
        "would have to be read again: use an optimizer without one, such as `optax.sgd(0.1)`."
    )
