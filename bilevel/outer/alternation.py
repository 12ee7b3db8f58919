r"""One step of alternation: training steps, one hypergradient, one outer update."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar
from bilevel.ground.batches import Window, check_stack, select_batch, select_batches
from bilevel.ground.cost import Cost
from bilevel.ground.loops import keep_types
from bilevel.hypergradient.base import Hypergradient, Response, cost_of
from bilevel.hypergradient.implicit import Implicit
from bilevel.hypergradient.solve import check_solve, solve
from bilevel.hypergradient.unroll_map import UnrollMap
from bilevel.inner.descend import InnerState, descend
from bilevel.inner.optimizer import InnerTx, build_tx, is_tx, refresh_injected
from bilevel.outer.base import KEEP, Info, check_model_state, check_state, own
from bilevel.outer.frozen import Part, trained_leaves
from bilevel.outer.variable import Mover, Variable
from bilevel.problem.operators import GaussNewton, Hessian
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner, check_point, check_problem, check_same_tree

OPERATORS = (Hessian, GaussNewton)
"""Those that take one batch after another out of a stack by its index."""


class AlternateState(NamedTuple):
    """Everything a run is: save this one tree and nothing is forgotten.

    Attributes:
      trained: inner parameters, the one state of ``inner_tx`` of the run (which a response that
        trains, as ``Unroll``, advances too), and statistics of the model (``None`` without).
      outer: the hyperparameters, their raw twin and the state of ``outer_tx``.
      response: warm start and the like, of the response; shaped like the trained leaves where
        ``inner_tx`` freezes others.
      step: int32, outer updates made.
    """

    trained: InnerState
    outer: Variable
    response: Any
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


@dataclasses.dataclass(frozen=True)
class Alternation:
    """The settings of :func:`~bilevel.alternate`, checked, and the step they make."""

    problem: Problem
    response: Response
    inner_tx: InnerTx
    mover: Mover
    inner_steps: int
    unroll: bool | None

    @property
    def trains(self) -> bool:
        """Whether the response makes steps of its own (which see frozen leaves)."""
        return hasattr(self.response, "inner_tx") or isinstance(self.response, UnrollMap)

    def init(
        self, params: Params, hparams: Hparams, model_state: ModelState = None
    ) -> AlternateState:
        """The first state; see :func:`~bilevel.alternate`."""
        check_model_state(self.problem.has_state, model_state)
        check_point(params, hparams)
        params, hparams = own(params), own(hparams)
        outer = self.mover.begin(hparams)
        opt_state = build_tx(self.inner_tx, hparams).init(params)
        trained = InnerState(params, opt_state, model_state)
        part = self._part(params, hparams)
        response_state = part.response(self.response).init(
            part.problem(self.problem.at(model_state)), part.of(params), hparams
        )
        response_state, _ = self._lend(response_state, trained)
        # Copied again: bounds and optimizers may hand out the very arrays they were given,
        # and a buffer can be donated once only.
        return own(AlternateState(trained, outer, response_state, jnp.zeros((), jnp.int32)))

    def step(
        self,
        state: AlternateState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        response_batch: Batch = None,
        key: Key | None = None,
    ) -> tuple[AlternateState, Info]:
        """One step; see :func:`~bilevel.alternate`."""
        check_state(state, AlternateState)
        first, response_batch = self._split_batches(inner_batches, response_batch)
        problem = self.problem.at(state.model_state)
        check_problem(problem, state.params, state.hparams, first, outer_batch)
        check_inner(problem, state.params, state.hparams, first)
        trained, inner_value = self._train(state, inner_batches, first)
        solution, trained = self._solve(state, trained, response_batch, outer_batch, key)
        grads = self.mover.pull(state.outer, solution.grads)
        outer, norm = self.mover.move(state.outer, grads, value=solution.value)
        cost = Cost(self.inner_steps, 0, 1).plus(
            cost_of(self.response, state.hparams, solution.stats)
        )
        new = AlternateState(trained, outer, solution.state, state.step + 1)
        info = Info(
            solution.value,
            inner_value,
            norm,
            state.hparams,
            solution.result,
            solution.stats,
            cost.arrays(),
            solution.aux,
        )
        return keep_types(new, state, "state", KEEP), info

    def _train(
        self, state: AlternateState, inner_batches: Batch, first: Batch
    ) -> tuple[InnerState, Scalar]:
        """``inner_steps`` training steps, and the loss that the last of them saw."""
        trained, hparams = state.trained, state.hparams
        tx = build_tx(self.inner_tx, hparams)
        if not is_tx(self.inner_tx):  # the state of a fixed optimizer is the caller's to change
            opt_state = refresh_injected(trained.opt_state, tx, trained.params)
            trained = trained._replace(opt_state=opt_state)
        problem = self.problem.at(trained.model_state)
        if not self.inner_steps:
            return trained, problem.inner_loss(trained.params, hparams, first)
        trained, info = descend(
            problem,
            tx,
            trained,
            hparams,
            inner_batches,
            steps=self.inner_steps,
            unroll=self.unroll,
        )
        return trained, info.loss[-1]

    def _solve(
        self,
        state: AlternateState,
        trained: InnerState,
        response_batch: Batch,
        outer_batch: Batch,
        key: Key | None,
    ) -> tuple[Hypergradient, InnerState]:
        """The hypergradient, its state without what the run lent it, and what was trained."""
        part = self._part(trained.params, state.hparams)
        problem = part.problem(self.problem.at(trained.model_state))
        response = part.response(self.response)
        arguments: Any = dict(
            inner_batch=response_batch,
            outer_batch=outer_batch,
            state=self._borrow(state.response, trained),
            key=key,
        )
        point = (part.of(trained.params), state.hparams)
        check_solve(problem, response, *point, **arguments)
        solution = solve(problem, response, *point, **arguments)
        response_state, opt_state = self._lend(solution.state, trained)
        # A response that trains (`Unroll`) has advanced the statistics along with the parameters.
        advanced = getattr(solution.state, "model_state", None)
        trained = InnerState(
            part.whole(solution.params),
            opt_state,
            trained.model_state if advanced is None else advanced,
        )
        return solution._replace(state=response_state), trained

    def _part(self, params: Params, hparams: Hparams) -> Part:
        """The leaves that respond: those that ``inner_tx`` trains."""
        if self.trains:
            return Part(params, None)
        return Part(params, trained_leaves(build_tx(self.inner_tx, hparams), params))

    def _borrow(self, response_state: Any, trained: InnerState) -> Any:
        """The response's state with the run's optimizer state in it, if the response trains."""
        if self.trains and getattr(response_state, "opt_state", ()) is None:
            return response_state._replace(opt_state=trained.opt_state)
        return response_state

    def _lend(self, response_state: Any, trained: InnerState) -> tuple[Any, Any]:
        """The response's state without an optimizer state, and that of the run after it.

        Raises:
          ValueError: the response trains with an optimizer of another kind.
        """
        if not self.trains or not hasattr(response_state, "opt_state"):
            return response_state, trained.opt_state
        try:
            check_same_tree(response_state.opt_state, trained.opt_state, "opt_state")
        except ValueError as error:
            if not getattr(self.response, "lookahead", True):
                # It takes no step, so that its state is its own.
                return response_state, trained.opt_state
            raise ValueError(
                "`inner_tx` of `alternate` and that of the response train the same parameters, so "
                "that they share one optimizer state, but their states differ: pass the same "
                f"optimizer to both. ({error})"
            ) from None
        return response_state._replace(opt_state=None), response_state.opt_state

    def _split_batches(self, inner_batches: Batch, response_batch: Batch) -> tuple[Batch, Batch]:
        """One training batch (for checks), and what the response reads."""
        steps = self.inner_steps
        count = getattr(self.response, "num_inner_batches", lambda: None)()
        given = response_batch is not None
        wanted = steps + (0 if given else (count or (1 if steps == 0 else 0)))
        reads = (
            "`response_batch` is given"
            if given
            else f"the response reads {count} batches of its own"
            if count
            else "the response reads the last of them"
        )
        check_stack(
            inner_batches,
            wanted,
            "inner_batches",
            f"one batch for each of the inner_steps={steps} training steps, and {reads}",
        )
        if not given:
            if count is None:
                response_batch = select_batch(inner_batches, wanted - 1)
            else:
                response_batch = self._part_of(inner_batches, steps, count)
        if wanted:
            return select_batch(inner_batches, 0), response_batch
        return (
            response_batch if count is None else select_batch(response_batch, 0)
        ), response_batch

    def _part_of(self, batches: Batch, first: int, count: int) -> Batch:
        """``count`` batches for the response, uncopied where only this library reads them."""
        response = self.response
        if isinstance(response, Implicit) and type(response.operator) in OPERATORS:
            return Window(batches, first)
        return select_batches(batches, first, count)
