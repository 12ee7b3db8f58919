r"""Unrolled differentiation: the response of a training run, by differentiating the run."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar, Stats
from bilevel.ground.batches import check_stack, one_batch
from bilevel.ground.cost import Cost
from bilevel.ground.settings import check_settings, check_takes, count
from bilevel.ground.traced import BACKWARD_RULE, contains_primitive
from bilevel.hypergradient.base import Pullback
from bilevel.hypergradient.forward import check_few, no_tangents, push_forward
from bilevel.hypergradient.judge import status_of_rounding
from bilevel.hypergradient.reach import check_reaches
from bilevel.inner.descend import InnerState, Remat, descend, start
from bilevel.inner.optimizer import InnerTx, build_tx, check_inner_tx, refresh_injected
from bilevel.inner.reversal import places_for, plan, recomputed
from bilevel.problem.two_losses import Point, Problem
from bilevel.problem.validate import check_inner, check_returned, check_same_tree, require_loss

Mode = Literal["mixed", "reverse", "forward"]


class UnrollState(NamedTuple):
    """Carried from call to call: the optimizer's state, the advanced model state (to be passed
    on as ``model_state=``), and the tangent of real-time forward mode."""

    opt_state: Any
    model_state: ModelState = None
    tangent: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Advanced(Point):
    """Parameters with what else the same training steps made for the outer loss to read.

    That is the advanced model state, and the parameters to evaluate at where they are others
    than the trained ones (``Unroll(evaluate=...)``).
    """

    params: Params
    model_state: ModelState = None
    evaluated: Params | None = None

    def outer_loss(self, problem: Problem, hparams: Hparams, batch: Batch) -> tuple[Scalar, Any]:
        """The outer loss reads the advanced statistics, and is differentiated in them."""
        problem = problem.at(self.model_state)
        at = self.params if self.evaluated is None else self.evaluated
        return problem.outer_loss(at, hparams, batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unroll:
    r"""The pullback of ``steps`` optimizer steps, :math:`w_{t+1} = U(w_t, λ; b_t)`.

    .. math:: α_T = g,
        α_t = (∂_w U_t)ᵀ α_{t+1},
        indirect = ∑_{t} (∂_λ U_t)ᵀ α_{t+1}

    The responded parameters are :math:`w_T`, and the optimizer's state comes back too, so the
    steps are training steps and never paid twice. Everything a step reads may be tuned: what
    the loss reads, and, with ``inner_tx`` a function of ``hparams``, learning rates, momenta,
    schedules (``count -> value``), decays, clipping thresholds.

    ``inner_batch`` is a stack: every leaf has a leading axis of ``steps``, except a single
    ``jax.random.key``, which is split by step. With ``has_state=True`` the steps advance
    the model state, the outer loss reads the advanced one, and the derivative runs through it;
    pass ``state.model_state`` as ``model_state`` of the next call.

    Args:
      inner_tx: an optax transformation, or ``hparams -> transformation``. Those that ask for
        the loss receive ``value``, ``grad`` and ``value_fn``, and the derivative runs through
        them; a line search (``optax.lbfgs``) needs ``mode="forward"``.
      steps: T, the number of training steps per call makes.
      truncate: K: differentiate the last K steps only; the first T - K run without any record.
        The bias for strong convexity mu and learning rate a falls like :math:`(1 - aμ)^K`.
      mode: ``"mixed"``: reverse mode with forward-over-reverse products (the default; see
        :mod:`bilevel.inner.mixed`). ``"reverse"``: plain reverse mode. ``"forward"``: one
        tangent per hyperparameter, memory independent of ``steps``.
      remat: what the backward pass recomputes: ``"none"``, ``"step"``, ``"sqrt"`` or ``"log"``;
        see :func:`bilevel.inner.descend`. Reverse modes only. A derivative of the hypergradient
        keeps one state per step, whatever is said here.
      max_hparams: forward mode refuses more than this many hyperparameters (scalars p).
      real_time: forward mode carries the tangent in ``state``, so that calls in sequence give
        the derivative of the whole run so far (stale by the moves of the hyperparameters).
      initial: ``initial(params, hparams) -> params``, a start that depends on hyperparameters
        (a learned initialization). Every call is then a new run from there.
      evaluate: ``evaluate(opt_state, params) -> params``, the parameters that the outer loss
        reads at the end, where these are an average kept by the optimizer
        (``optax.contrib.schedule_free_eval_params``). The trained ones are returned.
      unroll: write the steps out one by one; None decides by itself (convolutions on CPU).

    The optimizer's moments keep their dtype even if a hyperparameter of a wider one enters.
    Where a gradient is exactly zero (a dead unit), the roots of second moments in Adam and its
    kin have the derivative of the limit, zero; the loss keeps its own derivatives everywhere.

    Parameters of half precision lose part of every update to rounding. The status is
    ``rounding`` where a fifth is lost, and beyond 40 steps in bfloat16 (2600 in float16). Keep
    them in float32 and cast inside the loss (see ``docs/unrolled.md``).

    Cost, in inner gradients, for T steps of which K are differentiated: reverse T + 2 to 3 K
    and K copies of what a step saves (mixed: its carry; plain: activations too), with
    ``"sqrt"`` about :math:`\sqrt{2K}` carries and K more gradients, with ``"log"``
    :math:`log_2 K` carries and two to four times K; forward T + 1 to 2.5 p K and p copies of
    the carry.

    Stats: ``stationarity`` is the norm of the inner gradient that the last step used,
    ``inner_loss`` the loss it saw.

    Raises ``ValueError``/``TypeError``, when traced, for a batch axis other than ``steps``, a
    hyperparameter that reaches nothing, an integer setting, a line search in a reverse mode, or
    too many hyperparameters.

    Reference: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through
    reversible learning", ICML 2015; Franceschi et al., "Forward and reverse gradient-based
    hyperparameter optimization", ICML 2017; Shaban et al., "Truncated back-propagation for
    bilevel optimization", AISTATS 2019; Kemaev et al., "Scalable meta-learning via mixed-mode
    differentiation", ICML 2025.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2)
      >>> def valid(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2)
      >>> response = bilevel.Unroll(lambda lam: optax.sgd(lam["lr"]), steps=2)
      >>> g = bilevel.hypergrad(valid, train, response)(
      ...     jnp.zeros(1), {"lr": 0.5}, inner_batch=jnp.ones((2, 1)), outer_batch=jnp.ones(1))
      >>> bool(jnp.allclose(g["lr"], -2 * 0.5**3))
      True
    """

    inner_tx: InnerTx = dataclasses.field(metadata={"static": True})
    steps: int = count()
    truncate: int | None = count(None, optional=True)
    mode: Mode = dataclasses.field(default="mixed", metadata={"static": True})
    remat: Remat = dataclasses.field(default="none", metadata={"static": True})
    max_hparams: int = count(256)
    real_time: bool = dataclasses.field(default=False, metadata={"static": True})
    initial: Callable[[Params, Hparams], Params] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    evaluate: Callable[[Any, Params], Params] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    unroll: bool | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        check_inner_tx(self.inner_tx)
        check_settings(self)
        if self.initial is not None:
            check_takes("initial", self.initial, "initial(params, hparams)")
        if self.evaluate is not None:
            check_takes("evaluate", self.evaluate, "evaluate(opt_state, params)")
        check_unrolling(self, ("mixed", "reverse", "forward"))
        if self.real_time and (
            self.mode != "forward" or self.truncate is not None or self.initial is not None
        ):
            raise ValueError(
                "`real_time=True` carries the forward tangent: it needs `mode='forward'`, "
                "`truncate=None` and `initial=None`."
            )

    def num_inner_batches(self) -> int:
        """Length of the leading axis of ``inner_batch``: one batch per step."""
        return self.steps

    def cost(self, hparams: Hparams, stats: Stats) -> Cost:
        """The steps, and the products of those that are differentiated."""
        return unrolled_cost(self, hparams)

    def init(self, problem: Problem, params: Params, hparams: Hparams) -> UnrollState:
        """A fresh optimizer's state, the model state, and a zero tangent if in real time."""
        params, hparams, model_state = jax.tree.map(
            zeros_for_shapes, (params, hparams, problem.model_state)
        )
        problem = problem.at(model_state)
        carry = self._cold(problem, params, hparams)
        tangent = no_tangents(carry, tree.size(hparams)) if self.real_time else None
        return UnrollState(carry.opt_state, carry.model_state, tangent)

    def _cold(self, problem: Problem, params: Params, hparams: Hparams) -> InnerState:
        """The carry of a new run; depends on ``hparams`` through ``initial`` and the optimizer."""
        if self.initial is not None:
            begun = self.initial(params, hparams)
            check_returned(begun, params, "initial")
            params = tree.cast_like(jax.tree.map(jnp.asarray, begun), params)
        return start(build_tx(self.inner_tx, hparams), params, problem.model_state)

    def _carry(
        self, problem: Problem, params: Params, hparams: Hparams, state: UnrollState | None
    ) -> InnerState:
        if state is None or self.initial is not None:
            return self._cold(problem, params, hparams)
        fresh = start(build_tx(self.inner_tx, hparams), params, problem.model_state)
        return fresh._replace(opt_state=state.opt_state)

    def check(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: Any,
    ) -> None:
        """Raise what this response can tell is wrong, when traced."""
        require_loss(problem, "Unroll")
        check_stack(inner_batch, self.steps)
        check_inner(problem, params, hparams, one_batch(inner_batch))
        if state is not None:
            expected = jax.eval_shape(lambda: self.init(problem, params, hparams))
            check_same_tree(state, expected, "state")
        one = one_batch(inner_batch)
        if self.mode == "forward" and contains_primitive(
            problem.inner_loss, params, hparams, one, prefix=BACKWARD_RULE
        ):
            raise TypeError(
                "`mode='forward'` pushes tangents through `inner`, which contains a function with "
                "a backward rule only (`jax.custom_vjp`: a fused loss, an attention kernel): use "
                "`mode='mixed'`."
            )
        if self.mode == "forward":
            check_few(hparams, self.max_hparams, "mixed")
        whole = self.truncate in (None, self.steps)

        def advance(lam: Hparams, in_loss: Hparams) -> Any:
            carry = self._carry(problem, params, lam, state)
            if not whole:
                carry = jax.lax.stop_gradient(carry)
            tx = build_tx(self.inner_tx, lam)
            carry = carry._replace(opt_state=refresh_injected(carry.opt_state, tx, params))
            return self._read(
                descend(problem, tx, carry, in_loss, inner_batch, steps=1, unroll=False)[0]
            )

        by = "forward" if self.mode == "forward" else "reverse"
        check_reaches(
            problem, advance, params, hparams, one, outer_batch, inner_tx=self.inner_tx, by=by
        )

    def _read(self, end: InnerState) -> tuple[Params, ModelState]:
        """What the outer loss reads at the end of a run."""
        if self.evaluate is None:
            return end.params, end.model_state
        evaluated = self.evaluate(end.opt_state, end.params)
        check_returned(evaluated, end.params, "evaluate")
        return evaluated, end.model_state

    def _steps(
        self,
        problem: Problem,
        carry: InnerState,
        hparams: Hparams,
        batches: Batch,
        first: int,
        steps: int,
        mode: Mode,
        remat: Remat,
    ) -> Any:
        tx = build_tx(self.inner_tx, hparams)
        carry = carry._replace(opt_state=refresh_injected(carry.opt_state, tx, carry.params))
        return descend(
            problem,
            tx,
            carry,
            hparams,
            batches,
            first=first,
            steps=steps,
            mixed=mode == "mixed",
            remat=remat,
            unroll=self.unroll,
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
        """The parameters after ``steps`` steps, and the pullback through those recorded."""
        kept = self.steps if self.truncate is None else self.truncate
        skipped = self.steps - kept

        def begin(lam: Hparams) -> InnerState:
            return self._carry(problem, params, lam, state)

        told = []
        if skipped:
            carry, info = self._steps(
                problem, begin(hparams), hparams, inner_batch, 0, skipped, "reverse", "none"
            )
            told.append(info)
            carry = jax.lax.stop_gradient(carry)

            def begin(lam: Hparams) -> InnerState:
                return carry

        def finish(carry: InnerState, lam: Hparams) -> Any:
            return self._steps(
                problem, carry, lam, inner_batch, skipped, kept, self.mode, self.remat
            )

        if self.mode == "forward":
            tangent = state.tangent if self.real_time and state is not None else None
            read = self._read if self.evaluate is not None else None
            end, info, tangent, pull = push_forward(begin, finish, hparams, tangent, read)
        else:
            tangent = None

            def run(lam: Hparams) -> Any:
                end, info = finish(begin(lam), lam)
                return self._read(end), (end, info)

            _, transpose, (end, info) = jax.vjp(run, hparams, has_aux=True)

            def reverse(cotangent: Any) -> Hparams:
                return transpose(cotangent)[0]

            pull = reverse

        new_state = UnrollState(end.opt_state, end.model_state, tangent if self.real_time else None)
        result = status_of_rounding([*told, info], params)

        def pullback(g: Any) -> tuple[Hparams, UnrollState, jax.Array, Stats]:
            cotangent = (g, None)
            if isinstance(g, Advanced):
                cotangent = (g.params if g.evaluated is None else g.evaluated, g.model_state)
            stats = {"stationarity": info.grad_norm[-1], "inner_loss": info.loss[-1]}
            return pull(cotangent), new_state, result, stats

        if problem.has_state or self.evaluate is not None:
            evaluated = None if self.evaluate is None else self._read(end)[0]
            return Advanced(end.params, end.model_state, evaluated), pullback
        return end.params, pullback


def zeros_for_shapes(leaf: Any) -> Any:
    """Zeros in place of an abstract leaf: ``init`` may be asked for shapes only."""
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def check_unrolling(response: Any, modes: tuple[str, ...]) -> None:
    """Refuse settings of unrolled steps that do not go together."""
    if response.truncate is not None and response.truncate > response.steps:
        raise ValueError(
            f"`truncate` must be at most `steps`={response.steps}, got {response.truncate}: it is "
            "the number of last steps to differentiate."
        )
    for name, allowed in (("mode", modes), ("remat", ("none", "step", "sqrt", "log"))):
        if getattr(response, name) not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(response, name)!r}.")
    if response.mode == "forward" and response.remat != "none":
        raise ValueError(
            f"`remat={response.remat!r}` has no meaning with `mode='forward'`, which records "
            "nothing: leave it at 'none'."
        )


def unrolled_cost(response: Any, hparams: Hparams) -> Cost:
    """The steps, and the products of those that are differentiated."""
    kept = response.steps if response.truncate is None else response.truncate
    if response.mode == "forward":
        return Cost(response.steps, kept * tree.size(hparams))
    again = 0 if response.remat == "none" else kept
    if response.remat in ("sqrt", "log"):
        again = recomputed(plan(kept, places_for(kept, response.remat)))
    return Cost(response.steps + again, kept)
