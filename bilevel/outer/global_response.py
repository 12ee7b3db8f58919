r"""A hypernetwork for the whole range of hyperparameters: train it first, search it after."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar
from bilevel.ground.batches import check_stack, select_batch
from bilevel.ground.cost import Cost
from bilevel.ground.keys import require_key
from bilevel.ground.loops import keep_types, loop, unrolls
from bilevel.ground.settings import check_count, check_flag, check_takes, is_function
from bilevel.ground.status import Status, status_of
from bilevel.hypergradient.best_response import check_responds
from bilevel.inner.descend import InnerState, StepInfo, take_step
from bilevel.inner.network import Network
from bilevel.inner.optimizer import check_fixed_tx, check_tx
from bilevel.outer.base import KEEP, Algorithm, Info, check_state, own
from bilevel.outer.variable import Mover, Variable
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import (
    check_inner,
    check_losses,
    check_point,
    check_problem,
    check_returned,
)


class GlobalResponseState(NamedTuple):
    r"""What :func:`global_response` carries.

    Attributes:
      trained: base weights (learnt if the network is residual, otherwise only their shapes
        count) with the parameters :math:`φ` of the network, and the state of ``inner_tx``.
      outer: :math:`λ`, the current best guess, and the state of ``outer_tx``.
      step: int32, steps made.
    """

    trained: InnerState
    outer: Variable
    step: jax.Array

    @property
    def params(self) -> Params:
        """Base weights; ``deploy`` gives those that the losses read."""
        return self.trained.params[0]

    @property
    def network_params(self) -> Any:
        r"""Parameters :math:`φ` of the network."""
        return self.trained.params[1]

    @property
    def hparams(self) -> Hparams:
        """What the losses read."""
        return self.outer.hparams

    @property
    def model_state(self) -> ModelState:
        """``None``: there are no statistics."""
        return None


def global_response(
    outer: Loss,
    inner: Loss,
    network: Network,
    sample: Callable[[Key, Hparams], Hparams],
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int = 1,
    *,
    draws: int = 10,
    seed: int = 0,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Hypernetwork training over a distribution of hyperparameters.

    .. math::
        φ &← φ - u\Bigl(∇_φ 1/S ∑_{s=1}^S
            h(\hat w_φ(λ_s), λ_s)\Bigr),
            λ_s ∼ p(· ∣ λ) \\
        λ &← λ - v\bigl(∇_λ f(\hat w_φ(λ), λ)\bigr)

    A fixed broad p that ignores :math:`λ` is the *global* algorithm; one around
    :math:`λ` the *local* one; ``lambda key, lam: lam`` the simplified joint one, where the
    movement of :math:`λ` is the only variation.

    Args:
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss of the same form.
      network: usually a :class:`~bilevel.inner.hypernetwork.Hypernetwork`; not a centred one.
      sample: ``(key, hparams) -> hparams``, one draw of p.
      inner_tx: of :math:`φ` and the base weights.
      outer_tx: of :math:`λ`; ``optax.set_to_zero()`` only trains. A line search follows
        the validation loss of the network's weights.
      inner_steps: training steps per outer step.
      draws: S, draws a training step; the batch is shared.
      seed: of the network's first parameters, where ``init`` gets no ``key``.
      unroll: write the training steps out; None decides by itself (convolutions on CPU).

    Returns:
      ``Algorithm(init, step, deploy)``: ``init(params, hparams, *, key=None)``, and
      ``step(state, *, inner_batches, outer_batch, key)`` with ``inner_batches`` stacked along a
      leading axis of ``inner_steps`` (a single ``jax.random.key`` is split by step).
      ``deploy(state, hparams=None)``: the network's weights at ``hparams``, those of the state
      if ``None``.

    Cost: S inner gradients a training step (mapped, not looped), and S sets of weights.

    Reference: Lorraine and Duvenaud, "Stochastic Hyperparameter Optimization through
    Hypernetworks", 2018.
    """
    check_losses(outer=outer, inner=inner)
    check_fixed_tx("inner_tx", inner_tx)
    check_tx("outer_tx", outer_tx)
    check_count("inner_steps", inner_steps)
    check_count("draws", draws)
    check_count("seed", seed, 0)
    check_flag("unroll", unroll, optional=True)
    if not is_function(sample):
        raise TypeError(f"`sample` must be a function (key, hparams) -> hparams, got {sample!r}.")
    check_takes("sample", sample, "sample(key, hparams)")
    if not isinstance(network, Network) or isinstance(network, type):
        raise TypeError(f"`network` must be a network such as `Hypernetwork()`, got {network!r}.")
    if getattr(network, "per_example", False) or network.centred:
        raise ValueError(
            "`network` must give weights for any hyperparameters, not for a distance from the "
            "current ones: use `Hypernetwork(...)` or `StructuredResponse(centred=False)`."
        )
    run = _GlobalResponse(
        Problem(outer, inner), network, sample, inner_tx, Mover(outer_tx, None), inner_steps,
        draws, seed, unroll,
    )  # fmt: skip
    return Algorithm(run.init, run.step, run.deploy)


@dataclasses.dataclass(frozen=True)
class _GlobalResponse:
    """The settings of :func:`global_response`, checked, and the step they make."""

    problem: Problem
    network: Network
    sample: Callable[[Key, Hparams], Hparams]
    inner_tx: optax.GradientTransformation
    mover: Mover
    inner_steps: int
    draws: int
    seed: int
    unroll: bool | None

    def init(
        self,
        params: Params,
        hparams: Hparams,
        model_state: ModelState = None,
        *,
        key: Key | None = None,
    ) -> GlobalResponseState:
        """The first state; see :func:`global_response`."""
        if model_state is not None:
            raise ValueError("`model_state` has no place in `global_response`: leave it out.")
        check_point(params, hparams)
        key = require_key(jax.random.key(self.seed) if key is None else key, "`init`")
        params, hparams = own(params), own(hparams)
        both = (params, self.network.init(key, params, hparams))
        trained = InnerState(both, self.inner_tx.init(both))
        return own(
            GlobalResponseState(trained, self.mover.begin(hparams), jnp.zeros((), jnp.int32))
        )

    def step(
        self,
        state: GlobalResponseState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[GlobalResponseState, Info]:
        """One step; see :func:`global_response`."""
        key = require_key(key, "A step")
        check_state(state, GlobalResponseState)
        reads = f"one batch for each of the inner_steps={self.inner_steps} steps"
        check_stack(inner_batches, self.inner_steps, "inner_batches", reads)
        first = select_batch(inner_batches, 0)
        check_problem(self.problem, state.params, state.hparams, first, outer_batch)
        check_inner(self.problem, state.params, state.hparams, first)
        check_responds(self.problem, state.params, state.hparams, first, outer_batch)
        trained, seen = self._train(state, inner_batches, first, key)

        def validation(lam: Hparams) -> Scalar:
            weights = self.network.apply(trained.params[1], trained.params[0], lam)
            return self.problem.outer_loss(weights, lam, outer_batch)[0]

        value, grads = jax.value_and_grad(validation)(state.hparams)
        outer, norm = self.mover.move(state.outer, grads, value=value, value_fn=validation)
        result = status_of(
            Status.ok,
            (~jnp.isfinite(seen.loss), Status.nonfinite_input),
            (~jnp.isfinite(value + norm), Status.nonfinite_output),
        )
        new = GlobalResponseState(trained, outer, state.step + 1)
        info = Info(
            value,
            seen.loss,
            norm,
            state.hparams,
            result,
            {"grad_norm": seen.grad_norm},
            Cost(self.inner_steps * self.draws, 0, 1).arrays(),
        )
        return keep_types(new, state, "state", KEEP), info

    def deploy(self, state: GlobalResponseState, hparams: Hparams | None = None) -> Params:
        """The network's weights at ``hparams``; see :class:`~bilevel.Algorithm`."""
        at = state.hparams if hparams is None else hparams
        return self.network.apply(state.network_params, state.params, at)

    def _draw(self, key: Key, hparams: Hparams) -> Hparams:
        """One draw of p, in the dtypes of ``hparams``."""
        drawn = self.sample(key, hparams)
        check_returned(drawn, hparams, "sample")
        return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), drawn, hparams)

    def _train(
        self, state: GlobalResponseState, inner_batches: Batch, first: Batch, key: Key
    ) -> tuple[InnerState, StepInfo]:
        """``inner_steps`` training steps, and what the last of them saw."""

        def mean_loss(both: Any, drawn: Hparams, batch: Batch) -> Scalar:
            def one(lam: Hparams) -> Scalar:
                at = self.network.apply(both[1], both[0], lam)
                return self.problem.inner_loss(at, lam, batch)

            if self.draws == 1:  # products with a batch of one set of weights are slow on CPU
                return one(jax.tree.map(lambda x: x[0], drawn))
            return jnp.mean(jax.vmap(one)(drawn))

        def train(k: Any, carry: tuple[InnerState, Any]) -> tuple[InnerState, Any]:
            keys = jax.random.split(jax.random.fold_in(key, k), self.draws)
            drawn = jax.vmap(lambda k: self._draw(k, state.hparams))(keys)
            batch = select_batch(inner_batches, k)
            trained, info = take_step(
                lambda both, _: (mean_loss(both, drawn, batch), None), self.inner_tx, carry[0]
            )
            return trained, (info.loss.astype(zero.dtype), info.grad_norm.astype(zero.dtype))

        at = state.params, state.hparams, first
        unroll = unrolls(self.unroll, self.problem.inner_loss, *at)
        zero = jnp.zeros((), tree.norm(state.params).dtype)
        trained, seen = loop(self.inner_steps, train, (state.trained, (zero, zero)), unroll)
        return trained, StepInfo(*seen)
