r"""Unrolled solvers: the response of an iteration that is the user's own, not an optimizer's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params, Stats
from bilevel.ground.cost import Cost
from bilevel.ground.loops import must_unroll, strong_types
from bilevel.ground.settings import check_settings, check_takes, count
from bilevel.ground.traced import BACKWARD_RULE, contains_primitive
from bilevel.hypergradient.base import Pullback
from bilevel.hypergradient.forward import check_few, push_forward
from bilevel.hypergradient.judge import status_of_walk
from bilevel.hypergradient.reach import check_map_reaches
from bilevel.hypergradient.unroll import check_unrolling, unrolled_cost
from bilevel.inner.descend import Remat, run_steps
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inexact, check_returned

StepMap = Callable[[Params, Hparams, Batch, Any], Params]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnrollMap:
    r"""The pullback of ``steps`` steps of your own, :math:`w_{t+1} = T_t(w_t, λ)`.

    .. math:: α_T = g,
        α_t = (∂_w T_t)ᵀ α_{t+1},
        indirect = (∂_λ w_0)ᵀ α_0
            + ∑_{t} (∂_λ T_t)ᵀ α_{t+1}

    For iterative algorithms that stop after a number of steps, whose settings are to be learned:
    thresholds and step sizes of a sparse coder, temperatures of a clustering, one for all steps or
    one for each (``hparams["threshold"][t]``). Where :class:`~bilevel.Unroll` makes steps of an
    optax optimizer on the inner loss, here the whole update is yours; where an
    :class:`~bilevel.Implicit` of a :class:`~bilevel.FixedPoint` takes the iteration as finished,
    this differentiates the steps that were made.

    Args:
      step: ``step(params, hparams, batch, t) -> params``, a tree like ``params``, which holds all
        that the iteration carries (momentum: the iterate before). ``t`` is a traced int32, 0 in
        the first step. ``batch`` is ``inner_batch``, whole, in every step: take slice ``t`` out of
        it where steps see different data.
      steps: T, the number of steps.
      initial: ``initial(params, hparams, batch) -> params``, the start, where it depends on
        hyperparameters or data. Every call is then a new run from there; without it a run begins
        at ``params``.
      truncate: K: differentiate the last K steps only; the first T - K run without any record.
      mode: ``"reverse"``, or ``"forward"``: one tangent per hyperparameter, memory independent of
        ``steps``, and the only one for a step with a loop of unknown length.
      remat: what the backward pass recomputes: ``"none"``, ``"step"``, ``"sqrt"`` or ``"log"``;
        see :func:`bilevel.inner.descend`.
      max_hparams: forward mode refuses more than this many hyperparameters (scalars p).

    The inner problem may be ``None``, since nothing is minimized:
    ``hypergrad(outer, None, UnrollMap(step, 10))``. One that is given is ignored, except by loops
    that train on it.

    Derivatives are those of the program: a selection (the largest entries, a count) is a constant
    between its jumps. Real numbers that a step returns are cast to the dtypes of ``params``.

    Cost, for T steps of which K are differentiated: T applications of the map and one transposed
    derivative of K; memory of what K applications save, with ``remat`` of their carries as for
    :class:`~bilevel.Unroll`. Forward mode p derivatives, and p copies of ``params``. One
    application counts as one inner gradient, one derivative as a product.

    Stats: ``stationarity`` is the length of the last step, :math:`‖w_T - w_{T-1}‖`. In half
    precision the status is ``rounding`` beyond 40 steps (2600 in float16).

    Raises ``ValueError``/``TypeError``, when traced, for a step that returns another tree, other
    shapes or no real numbers, for a hyperparameter that reaches nothing, and for a loop of unknown
    length in reverse mode.

    Reference: Gregor and LeCun, "Learning fast approximations of sparse coding", ICML 2010; Monga,
    Li, Eldar, "Algorithm unrolling", IEEE Signal Processing Magazine 2021.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> def step(w, lam, batch, t):  # gradient steps on |w - batch|^2 / 2, each with its own rate
      ...     return w - lam["rate"][t] * (w - batch)
      >>> def valid(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2)
      >>> g = bilevel.hypergrad(valid, None, bilevel.UnrollMap(step, steps=2))(
      ...     jnp.zeros(1), {"rate": jnp.full(2, 0.5)}, inner_batch=jnp.ones(1),
      ...     outer_batch=jnp.ones(1))
      >>> bool(jnp.allclose(g["rate"], -(0.5**3)))
      True
    """

    step: StepMap = dataclasses.field(metadata={"static": True})
    steps: int = count()
    initial: Callable[[Params, Hparams, Batch], Params] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    truncate: int | None = count(None, optional=True)
    mode: Literal["reverse", "forward"] = dataclasses.field(
        default="reverse", metadata={"static": True}
    )
    remat: Remat = dataclasses.field(default="none", metadata={"static": True})
    max_hparams: int = count(256)

    needs_inner = False

    def __post_init__(self) -> None:
        check_settings(self)
        check_takes(
            "step",
            self.step,
            "step(params, hparams, batch, t)",
            "It always gets the number `t` of the step; a step that does not look at it takes it "
            "all the same.",
        )
        if self.initial is not None:
            check_takes("initial", self.initial, "initial(params, hparams, batch)")
        check_unrolling(self, ("reverse", "forward"))

    def cost(self, hparams: Hparams, stats: Stats) -> Cost:
        """Applications as gradients, and the products of those that are differentiated."""
        return unrolled_cost(self, hparams)

    def init(self, problem: Problem, params: Params, hparams: Hparams) -> None:
        """Nothing is carried but the parameters."""
        return None

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
        t = jnp.int32(0)

        def returned(params: Params, hparams: Hparams, batch: Batch) -> Params:
            out = self.step(params, hparams, batch, t)
            check_returned(out, params, "step")
            check_inexact(out, "the result of `step`", "Return real floating-point arrays.")
            return out

        jax.eval_shape(returned, params, hparams, inner_batch)
        if self.mode == "forward":
            self._check_forward(params, hparams, inner_batch)

        def advance(lam: Hparams) -> Params:
            start = self._begin(params, lam, inner_batch)
            if self.truncate not in (None, self.steps):
                start = jax.lax.stop_gradient(start)
            # As a loop, in which no number of a step is known.
            return self._run(start, lam, inner_batch, self.steps - 1, 1, unroll=False)[0]

        check_map_reaches(problem, advance, params, hparams, outer_batch, by=self.mode)

    def _check_forward(self, params: Params, hparams: Hparams, batch: Batch) -> None:
        t = jnp.int32(0)
        if contains_primitive(self.step, params, hparams, batch, t, prefix=BACKWARD_RULE):
            raise TypeError(
                "`mode='forward'` pushes tangents through `step`, which contains a function with "
                "a backward rule only (`jax.custom_vjp`): use `mode='reverse'`."
            )
        check_few(hparams, self.max_hparams, "reverse")

    def run(self, params: Params, hparams: Hparams, batch: Batch) -> Params:
        """The parameters after ``steps`` steps; nothing is recorded."""
        params = jax.tree.map(jnp.asarray, params)
        return self._run(self._begin(params, hparams, batch), hparams, batch, 0, self.steps)[0]

    def _begin(self, params: Params, hparams: Hparams, batch: Batch) -> Params:
        if self.initial is None:
            return strong_types(params)
        begun = self.initial(params, hparams, batch)
        check_returned(begun, params, "initial")
        return tree.cast_like(jax.tree.map(jnp.asarray, begun), params)

    def _run(
        self,
        params: Params,
        hparams: Hparams,
        batch: Batch,
        first: int,
        steps: int,
        *,
        remat: Remat = "none",
        unroll: bool | None = None,
    ) -> tuple[Params, jax.Array]:
        """``steps`` steps from number ``first``, and the length of each."""
        if unroll is None:
            unroll = must_unroll(self.step, params, hparams, batch, jnp.int32(0))

        def step(w: Params, t: Any) -> tuple[Params, jax.Array]:
            new = self.step(w, hparams, batch, jnp.asarray(t, jnp.int32))
            new = tree.cast_like(jax.tree.map(jnp.asarray, new), w)
            return new, jax.lax.stop_gradient(tree.norm(tree.sub(new, w)))

        return run_steps(step, params, first, steps, remat=remat, unroll=unroll)

    def vjp(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        state: Any,
        *,
        key: Key | None = None,
    ) -> tuple[Params, Pullback]:
        """The parameters after ``steps`` steps, and the pullback through those recorded."""
        kept = self.steps if self.truncate is None else self.truncate
        skipped = self.steps - kept

        def begin(lam: Hparams) -> Params:
            return self._begin(params, lam, inner_batch)

        if skipped:
            at, _ = self._run(begin(hparams), hparams, inner_batch, 0, skipped)
            at = jax.lax.stop_gradient(at)

            def begin(lam: Hparams) -> Params:
                return at

        def finish(w: Params, lam: Hparams) -> tuple[Params, jax.Array]:
            return self._run(w, lam, inner_batch, skipped, kept, remat=self.remat)

        if self.mode == "forward":
            end, moved, _, pull = push_forward(begin, finish, hparams, None, lambda w: w)
        else:
            end, transpose, moved = jax.vjp(
                lambda lam: finish(begin(lam), lam), hparams, has_aux=True
            )

            def reverse(g: Any) -> Hparams:
                return transpose(g)[0]

            pull = reverse

        def pullback(g: Any) -> tuple[Hparams, None, jax.Array, Stats]:
            stats = {"stationarity": moved[-1]}
            return pull(g), None, status_of_walk(self.steps, params), stats

        return end, pullback
