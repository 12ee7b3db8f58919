r"""Evolution strategies: the response of a training run by perturbing its hyperparameters."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar, Stats
from bilevel.ground.batches import check_stack, one_batch
from bilevel.ground.cost import Cost
from bilevel.ground.keys import require_key
from bilevel.ground.settings import check_settings, count, real
from bilevel.ground.status import Status, code
from bilevel.hypergradient.base import Pullback
from bilevel.hypergradient.reach import check_reaches
from bilevel.hypergradient.unroll import zeros_for_shapes
from bilevel.inner.descend import InnerState, StepInfo, descend, start
from bilevel.inner.optimizer import InnerTx, build_tx, check_inner_tx, refresh_injected
from bilevel.problem.two_losses import Point, Problem
from bilevel.problem.validate import check_inner, check_same_tree, require_loss


class EvolutionState(NamedTuple):
    """Carried from call to call; N pairs, signs (+, -) on a leading axis of 2.

    Attributes:
      opt_state, model_state: of the run at the unperturbed hyperparameters.
      members: the training states of the pairs, leaves (2, N, ...); ``None`` unless persistent.
      sums: accumulated perturbations, like ``hparams`` with a leading axis N.
      clock: (N,), int32, calls since each pair's last reset.
      origin: parameters and model state where resets lead; ``None`` without a horizon.
    """

    opt_state: Any
    model_state: ModelState = None
    members: Any = None
    sums: Hparams = None
    clock: Any = None
    origin: Any = None


class Losses(NamedTuple):
    """What the pullback of a population reads: the outer losses of all pairs, (2, N)."""

    members: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Population(Point):
    """The unperturbed run's end, where the outer gradient is taken, and those of all pairs."""

    params: Params
    model_state: ModelState
    members: tuple[Params, ModelState]

    def outer_loss(self, problem: Problem, hparams: Hparams, batch: Batch) -> tuple[Scalar, Any]:
        """The loss of the unperturbed run."""
        return problem.at(self.model_state).outer_loss(self.params, hparams, batch)

    def outer_grads(
        self, problem: Problem, hparams: Hparams, batch: Batch
    ) -> tuple[tuple[Scalar, Any], tuple[Losses, Hparams]]:
        """Value and direct gradient of the unperturbed run; the losses of its members."""

        def member(end: tuple[Params, ModelState]) -> Scalar:
            return problem.at(end[1]).outer_loss(end[0], hparams, batch)[0]

        (value, aux), direct = jax.value_and_grad(
            lambda lam: self.outer_loss(problem, lam, batch), has_aux=True
        )(hparams)
        return (value, aux), (Losses(jax.vmap(jax.vmap(member))(self.members)), direct)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evolution:
    r"""The pullback of ``steps`` optimizer steps, from losses of perturbed runs alone.

    With N antithetic pairs :math:`λ ± ϵ_i`, :math:`ϵ_i ∼ N(0,
    σ^2 I)`, and outer losses :math:`L_i^±` at the ends of their runs,

    .. math:: indirect = 1/N ∑_i ξ_i \frac{L_i^+ - L_i^-}{2σ^2},
        ξ_i = \begin{cases} ϵ_i & \text{ES} \\
        ∑_{\text{calls since reset}} ϵ_i & PES \end{cases}

    Nothing is differentiated through training: steps, masks and roundings need no derivative.
    All runs see the same batches and keys.

    Args:
      inner_tx: an optax transformation, or ``hparams -> transformation``.
      steps: training steps per call, the length of one window.
      particles: N pairs, hence 2 N runs.
      sigma: :math:`σ`, in units of the (preferably unconstrained) hyperparameters; the
        estimate is of the objective smoothed on that scale. Traced.
      persistent: PES: each pair keeps its own two runs from call to call, so that the estimate
        is of the derivative through the whole run so far, without truncation bias. ``False``:
        every pair starts each call from the unperturbed run (truncated ES; biased unless the
        run is one call).
      horizon: PES: inner steps after which a pair starts again where ``params`` stood at the
        first call (a multiple of ``steps``); ``None`` never resets.
      staggered: with a horizon, spread the pairs evenly over its windows, so that every call
        sees every phase of training.
      unroll: write the steps out one by one; None decides by itself (convolutions on CPU).

    ``value`` and ``params`` of the result belong to the unperturbed run, which is trained too,
    and ``direct`` is taken there. The objective is the outer loss at the end of each window.
    The variance of PES grows with the number of windows since the reset.

    Cost: 2 N + 1 runs of ``steps`` gradients, 2 N + 1 outer losses, no backward pass; memory
    2 N training states. ``key`` is required. Model state is advanced in every run.

    Stats: ``stationarity`` and ``inner_loss`` as :class:`~bilevel.Unroll`;
    ``standard_error``, the norm of the estimate's standard error over the pairs (NaN for one).

    Raises ``ValueError``/``TypeError``, at trace time, for a missing key, a batch axis other
    than ``steps``, a hyperparameter nothing reads, a horizon that is no multiple of ``steps``.

    Reference: Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled
    computation graphs with persistent evolution strategies", ICML 2021.
    """

    inner_tx: InnerTx = dataclasses.field(metadata={"static": True})
    steps: int = count()
    particles: int = count()
    sigma: float | jax.Array = real(low=0, strict=True)
    persistent: bool = dataclasses.field(default=True, metadata={"static": True})
    horizon: int | None = count(None, optional=True)
    staggered: bool = dataclasses.field(default=True, metadata={"static": True})
    unroll: bool | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        check_inner_tx(self.inner_tx)
        check_settings(self)
        if self.horizon is not None:
            if not self.persistent:
                raise ValueError("`horizon` resets persistent pairs: it needs `persistent=True`.")
            if self.horizon % self.steps:
                raise ValueError(
                    f"`horizon`={self.horizon} must be a multiple of `steps`={self.steps}: pairs "
                    "start again between two calls."
                )

    def num_inner_batches(self) -> int:
        """Length of the leading axis of ``inner_batch``: one batch per step."""
        return self.steps

    def cost(self, hparams: Hparams, stats: Stats) -> Cost:
        """All runs; the losses at their ends are free."""
        return Cost((2 * self.particles + 1) * self.steps)

    def init(self, problem: Problem, params: Params, hparams: Hparams) -> EvolutionState:
        """The unperturbed run's optimizer state, and all pairs at ``params``."""
        params, hparams, model_state = jax.tree.map(
            zeros_for_shapes, (params, hparams, problem.model_state)
        )
        carry = start(build_tx(self.inner_tx, hparams), params, model_state)
        if not self.persistent:
            return EvolutionState(carry.opt_state, carry.model_state)
        n = self.particles
        clock = jnp.zeros((n,), jnp.int32)
        if self.horizon is not None and self.staggered:
            clock = (jnp.arange(n, dtype=jnp.int32) * (self.horizon // self.steps)) // n
        return EvolutionState(
            carry.opt_state,
            carry.model_state,
            _pairs(carry, n),
            tree.stacked_zeros(n, hparams),
            clock,
            None if self.horizon is None else (carry.params, carry.model_state),
        )

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
        require_loss(problem, "Evolution")
        check_stack(inner_batch, self.steps)
        check_inner(problem, params, hparams, one_batch(inner_batch))
        if state is not None:
            expected = jax.eval_shape(lambda: self.init(problem, params, hparams))
            check_same_tree(state, expected, "state")

        def advance(lam: Hparams, in_loss: Hparams) -> Any:
            tx = build_tx(self.inner_tx, lam)
            carry = start(tx, params, problem.model_state)
            end, _ = descend(problem, tx, carry, in_loss, inner_batch, steps=1, unroll=False)
            return end.params, end.model_state

        one = one_batch(inner_batch)
        check_reaches(
            problem, advance, params, hparams, one, outer_batch, inner_tx=self.inner_tx, by="values"
        )

    def _run(
        self, problem: Problem, carry: InnerState, hparams: Hparams, batches: Batch
    ) -> tuple[InnerState, StepInfo]:
        tx = build_tx(self.inner_tx, hparams)
        carry = carry._replace(opt_state=refresh_injected(carry.opt_state, tx, carry.params))
        return descend(problem, tx, carry, hparams, batches, steps=self.steps, unroll=self.unroll)

    def _reset(self, problem: Problem, hparams: Hparams, state: EvolutionState) -> EvolutionState:
        """Pairs whose clock has reached the horizon start again, with nothing accumulated."""
        if self.horizon is None:
            return state
        over = state.clock >= self.horizon // self.steps
        params, model_state = state.origin
        fresh = start(build_tx(self.inner_tx, hparams), params, model_state)

        def choose(axis: int, new: Any, old: Any) -> Any:
            shape = [1] * jnp.ndim(old)
            shape[axis] = self.particles
            return jnp.where(over.reshape(shape), new, old)

        return state._replace(
            members=jax.tree.map(
                lambda new, old: choose(1, new, old),
                _pairs(fresh, self.particles),
                state.members,
            ),
            sums=jax.tree.map(lambda x: choose(0, jnp.zeros_like(x), x), state.sums),
            clock=jnp.where(over, 0, state.clock),
        )

    def vjp(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        state: EvolutionState | None,
        *,
        key: Key | None = None,
    ) -> tuple[Population, Pullback]:
        """The ends of all runs, and the estimate from their losses."""
        key = require_key(key, "Evolution")
        if state is None:
            state = self.init(problem, params, hparams)
        carry = InnerState(params, state.opt_state, problem.model_state)
        end, info = self._run(problem, carry, hparams, inner_batch)

        shape = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.particles, *jnp.shape(x)), x.dtype), hparams
        )
        noise = tree.random_like(key, shape, jax.random.normal)
        noise = tree.cast_like(tree.scale(self.sigma, noise), hparams)
        if self.persistent:
            state = self._reset(problem, hparams, state)
            members, sums = state.members, tree.add(state.sums, noise)
        else:
            members, sums = _pairs(carry, self.particles), noise

        def one(member: InnerState, sign: jax.Array, noise: Hparams) -> InnerState:
            perturbed = tree.axpy(sign, noise, hparams)
            return self._run(problem, member, perturbed, inner_batch)[0]

        signs = jnp.asarray([1.0, -1.0])
        over_pairs = jax.vmap(one, in_axes=(0, None, 0))
        members = jax.vmap(over_pairs, in_axes=(0, 0, None))(members, signs, noise)

        if self.persistent:
            new_state = state._replace(
                opt_state=end.opt_state,
                model_state=end.model_state,
                members=members,
                sums=sums,
                clock=state.clock + 1,
            )
        else:
            new_state = EvolutionState(end.opt_state, end.model_state)

        def pullback(g: Losses) -> tuple[Hparams, EvolutionState, jax.Array, Stats]:
            losses = g.members
            slope = (losses[0] - losses[1]) / (2 * jnp.asarray(self.sigma, losses.dtype) ** 2)

            def each(xi: jax.Array) -> jax.Array:
                return xi * slope.reshape((-1,) + (1,) * (xi.ndim - 1)).astype(xi.dtype)

            terms = jax.tree.map(each, sums)
            indirect = jax.tree.map(lambda x: jnp.mean(x, axis=0), terms)
            n = self.particles
            spread = jax.tree.map(
                lambda x, mean: jnp.sum((x - mean[None]) ** 2, axis=0), terms, indirect
            )
            total = sum(jnp.sum(x) for x in jax.tree.leaves(spread))
            stats = {
                "stationarity": info.grad_norm[-1],
                "inner_loss": info.loss[-1],
                "standard_error": jnp.sqrt(total / (n * (n - 1.0))) if n > 1 else total * jnp.nan,
            }
            return indirect, new_state, code(Status.ok), stats

        ends = (members.params, members.model_state)
        return Population(end.params, end.model_state, ends), pullback


def _pairs(carry: InnerState, n: int) -> InnerState:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (2, n, *jnp.shape(x))), carry)
