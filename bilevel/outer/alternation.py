r"""One step of alternation: training steps, one hypergradient, one outer update."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar, Stats
from bilevel.checks import check_inner, check_point, check_problem, check_same_tree
from bilevel.hypergradient.base import Hypergradient, Response
from bilevel.hypergradient.transform import hypergrad_init, hypergrad_solve
from bilevel.inner.optimizer import InnerTx, build_tx, refresh_injected
from bilevel.linear.base import loop
from bilevel.operators import wants_straight_line
from bilevel.outer.base import check_model_state, check_state, own, same_type
from bilevel.outer.constrain import Space
from bilevel.outer.frozen import Trained, trained_leaves
from bilevel.outer.training import (
    batch_at,
    check_stack,
    is_tx,
    no_line_search,
    part_of_stack,
    update,
)
from bilevel.problem import Problem


class AlternateState(NamedTuple):
    """Everything a run is: save this one tree and nothing is forgotten.

    Attributes:
      params: inner parameters.
      model_state: mutable statistics of the model (``None`` without ``has_state``).
      inner_opt_state: state of ``inner_tx``: the one optimizer state of the run, which a
        response that trains (``Unroll``) advances too.
      hparams: what the losses read.
      raw: what ``outer_tx`` moves, with bounds; ``None`` without them.
      outer_opt_state: state of ``outer_tx``.
      response_state: warm start and the like, of the response; shaped like the trained leaves
        where ``inner_tx`` freezes others.
      step: int32, outer updates made.
    """

    params: Params
    model_state: ModelState
    inner_opt_state: Any
    hparams: Hparams
    raw: Hparams | None
    outer_opt_state: Any
    response_state: Any
    step: jax.Array


class AlternateInfo(NamedTuple):
    """What a step saw.

    Attributes:
      value: outer loss at the new ``params`` and the ``hparams`` *before* their update.
      inner_value: inner loss in the last training step, before that step moved; without
        training steps, on the batch the response reads.
      hypergrad_norm: norm of the gradient that ``outer_tx`` received (of the raw variable
        where there are bounds).
      result: int32 :class:`~bilevel.Status` of the hypergradient.
      stats: those of :class:`~bilevel.Hypergradient`, in units of ``hparams``.
      aux: auxiliary output of the outer loss.
      hparams: what the training steps and the outer loss of this step read.
    """

    value: Scalar
    inner_value: Scalar
    hypergrad_norm: Scalar
    result: jax.Array
    stats: Stats
    aux: Any
    hparams: Hparams


@dataclasses.dataclass(frozen=True)
class Alternation:
    """The settings of :func:`~bilevel.alternate`, checked, and the step they make."""

    outer: Loss
    inner: Loss
    response: Response
    inner_tx: InnerTx
    outer_tx: optax.GradientTransformation
    inner_steps: int
    constrain: Space | None
    has_aux: bool
    has_state: bool
    unroll: bool | None

    @property
    def trains(self) -> bool:
        """Whether the response makes optimizer steps of its own (which see frozen leaves)."""
        return hasattr(self.response, "inner_tx")

    def init(
        self, params: Params, hparams: Hparams, model_state: ModelState = None
    ) -> AlternateState:
        """The first state; see :func:`~bilevel.alternate`."""
        check_model_state(self.has_state, model_state)
        check_point(params, hparams)
        params, hparams = own(params), own(hparams)
        raw = None if self.constrain is None else self.constrain.unconstrain(hparams)
        opt_state = build_tx(self.inner_tx, hparams).init(params)
        trained = self._trained(params, hparams)
        response_state = hypergrad_init(
            trained.loss(self.outer),
            trained.loss(self.inner),
            trained.response(self.response),
            trained.part(params),
            hparams,
            has_aux=self.has_aux,
            has_state=self.has_state,
            model_state=model_state,
        )
        state = AlternateState(
            params,
            model_state,
            opt_state,
            hparams,
            raw,
            self.outer_tx.init(hparams if raw is None else raw),
            self._lend(response_state, opt_state)[0],
            jnp.zeros((), jnp.int32),
        )
        # Copied again: bounds and optimizers may hand out the very arrays they were given,
        # and a buffer can be donated once only.
        return own(state)

    def step(
        self,
        state: AlternateState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        response_batch: Batch = None,
        key: Key | None = None,
    ) -> tuple[AlternateState, AlternateInfo]:
        """One step; see :func:`~bilevel.alternate`."""
        check_state(state, AlternateState)
        first, response_batch = self._split_batches(inner_batches, response_batch)
        problem = Problem(self.outer, self.inner, self.has_aux, self.has_state, state.model_state)
        check_problem(problem, state.params, state.hparams, first, outer_batch)
        check_inner(problem, state.params, state.hparams, first)
        params, model_state, opt_state, inner_value = self._train(
            problem, state, inner_batches, first
        )
        solution, opt_state = self._solve(
            state, params, model_state, opt_state, response_batch, outer_batch, key
        )
        # A response that trains (`Unroll`) has advanced the statistics along with the parameters.
        advanced = getattr(solution.state, "model_state", None)
        moved, outer_opt_state, norm = self._move(state, solution)
        new = AlternateState(
            solution.params,
            model_state if advanced is None else advanced,
            opt_state,
            moved if self.constrain is None else self.constrain.constrain(moved),
            None if self.constrain is None else moved,
            outer_opt_state,
            solution.state,
            state.step + 1,
        )
        info = AlternateInfo(
            solution.value,
            inner_value,
            norm,
            solution.result,
            solution.stats,
            solution.aux,
            state.hparams,
        )
        return AlternateState(*_like(new, state, AlternateState._fields)), info

    def _train(
        self, problem: Problem, state: AlternateState, inner_batches: Batch, first: Batch
    ) -> tuple[Params, ModelState, Any, Scalar]:
        """``inner_steps`` training steps, and the loss that the last of them saw."""
        params, model_state, opt_state = state.params, state.model_state, state.inner_opt_state
        hparams = state.hparams
        tx = build_tx(self.inner_tx, hparams)
        if not is_tx(self.inner_tx):  # the state of a fixed optimizer is the caller's to change
            opt_state = refresh_injected(opt_state, tx, params)
        if not self.inner_steps:
            return params, model_state, opt_state, problem.inner_loss(params, hparams, first)
        straight = self.unroll
        if straight is None:
            straight = wants_straight_line(problem, params, hparams, first)
        gradient = jax.value_and_grad(problem.inner_loss_and_state, has_aux=True)

        def train(k: Any, carry: Any) -> Any:
            params, model_state, opt_state, _ = carry
            batch = batch_at(inner_batches, k)
            (value, new_model_state), grads = gradient(params, hparams, batch, model_state)
            params, opt_state = update(
                tx,
                grads,
                opt_state,
                params,
                value=value,
                value_fn=lambda w: problem.inner_loss_and_state(w, hparams, batch, model_state)[0],
            )
            return _like((params, new_model_state, opt_state, value), carry)

        shape = jax.eval_shape(problem.inner_loss, params, hparams, first)
        carry = (params, model_state, opt_state, jnp.zeros((), shape.dtype))
        return loop(self.inner_steps, train, carry, straight)

    def _solve(
        self,
        state: AlternateState,
        params: Params,
        model_state: ModelState,
        opt_state: Any,
        response_batch: Batch,
        outer_batch: Batch,
        key: Key | None,
    ) -> tuple[Hypergradient, Any]:
        """The hypergradient, with all parameters, and the optimizer state after it."""
        trained = self._trained(params, state.hparams)
        solution = hypergrad_solve(
            trained.loss(self.outer),
            trained.loss(self.inner),
            trained.response(self.response),
            trained.part(params),
            state.hparams,
            inner_batch=response_batch,
            outer_batch=outer_batch,
            state=self._borrow(state.response_state, opt_state),
            key=key,
            has_aux=self.has_aux,
            has_state=self.has_state,
            model_state=model_state,
        )
        response_state, opt_state = self._lend(solution.state, opt_state)
        solution = solution._replace(params=trained.whole(solution.params), state=response_state)
        return solution, opt_state

    def _move(self, state: AlternateState, solution: Hypergradient) -> tuple[Hparams, Any, Scalar]:
        """What ``outer_tx`` moves, its state, and the norm of the gradient it received."""
        moved, grads = state.hparams, solution.grads
        if self.constrain is not None:
            moved = state.raw
            grads = jax.vjp(self.constrain.constrain, state.raw)[1](grads)[0]
        moved, opt_state = update(
            self.outer_tx,
            grads,
            state.outer_opt_state,
            moved,
            value=solution.value,
            value_fn=no_line_search("outer_tx"),
        )
        return moved, opt_state, tree.norm(grads)

    def _trained(self, params: Params, hparams: Hparams) -> Trained:
        """The leaves that respond: those that ``inner_tx`` trains."""
        if self.trains:
            return Trained(params, None)
        return Trained(params, trained_leaves(build_tx(self.inner_tx, hparams), params))

    def _borrow(self, response_state: Any, opt_state: Any) -> Any:
        """The response's state with the run's optimizer state in it, if the response trains."""
        if self.trains and getattr(response_state, "opt_state", ()) is None:
            return response_state._replace(opt_state=opt_state)
        return response_state

    def _lend(self, response_state: Any, opt_state: Any) -> tuple[Any, Any]:
        """The response's state without an optimizer state, and that of the run after it.

        Raises:
          ValueError: the response trains with an optimizer of another kind.
        """
        if not self.trains or not hasattr(response_state, "opt_state"):
            return response_state, opt_state
        try:
            check_same_tree(response_state.opt_state, opt_state, "opt_state")
        except ValueError as error:
            if not getattr(self.response, "lookahead", True):
                return response_state, opt_state  # it takes no step, so that its state is its own
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
                response_batch = batch_at(inner_batches, wanted - 1)
            else:
                response_batch = part_of_stack(inner_batches, steps, count)
        if wanted:
            return batch_at(inner_batches, 0), response_batch
        return (response_batch if count is None else batch_at(response_batch, 0)), response_batch


_REMEDIES = {
    "inner_opt_state": "Build `inner_tx` so that its state keeps its dtypes: hyperparameters in "
    "a wider dtype than `params` promote it.",
    "outer_opt_state": "Choose an `outer_tx` whose state keeps its dtypes.",
    "model_state": "The losses must return `model_state` as they received it.",
    "response_state": "`response.init` must return what its pullback gives back.",
    "inner_value": "The inner loss must return one dtype.",
}


def _like(
    new: tuple[Any, ...],
    old: tuple[Any, ...],
    names: tuple[str, ...] = ("params", "model_state", "inner_opt_state", "inner_value"),
) -> tuple[Any, ...]:
    """Every part of ``new`` in the type of the same part of ``old``, or a named error."""
    return tuple(
        same_type(a, b, name, _REMEDIES.get(name, "It must keep its type."))
        for a, b, name in zip(new, old, names, strict=True)
    )
