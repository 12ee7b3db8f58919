r"""A hypernetwork for the whole range of hyperparameters: train it first, search it after."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar
from bilevel.checks import check_inner, check_key, check_point, check_problem, check_returned
from bilevel.hypergradient.best_response import check_responds
from bilevel.inner.network import Network
from bilevel.linear.base import loop, status_of
from bilevel.operators import wants_straight_line
from bilevel.outer.base import Algorithm, check_state, own, same_type
from bilevel.outer.training import (
    batch_at,
    check_fixed_tx,
    check_loss,
    check_stack,
    check_tx,
    update,
)
from bilevel.outer.tuning_state import GlobalResponseState
from bilevel.problem import Problem
from bilevel.settings import check_count, check_takes, is_function
from bilevel.status import Status, code


class GlobalResponseInfo(NamedTuple):
    r"""What a step saw.

    Attributes:
      value: outer loss of the network's weights at the hyperparameters before their update.
      inner_value: mean inner loss over the draws of the last training step.
      grad_norm: norm of its gradient.
      hypergrad_norm: norm of the gradient ``outer_tx`` received.
      result: int32 :class:`~bilevel.Status`.
      hparams: :math:`\lambda` of this step, before its update.
    """

    value: Scalar
    inner_value: Scalar
    grad_norm: Scalar
    hypergrad_norm: Scalar
    result: jax.Array
    hparams: Hparams


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
) -> Algorithm:
    r"""Hypernetwork training over a distribution of hyperparameters.

    .. math::
        \phi &\leftarrow \phi - u\Bigl(\nabla_\phi \tfrac1S \sum_{s=1}^S
            h(\hat w_\phi(\lambda_s), \lambda_s)\Bigr),
            \qquad \lambda_s \sim p(\cdot \mid \lambda) \\
        \lambda &\leftarrow \lambda - v\bigl(\nabla_\lambda f(\hat w_\phi(\lambda), \lambda)\bigr)

    A fixed broad p that ignores :math:`\lambda` is the *global* algorithm; one around
    :math:`\lambda` the *local* one; ``lambda key, lam: lam`` the simplified joint one, where the
    movement of :math:`\lambda` is the only variation.

    Args:
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss of the same form.
      network: usually a :class:`~bilevel.inner.hypernetwork.Hypernetwork`; not a centred one.
      sample: ``(key, hparams) -> hparams``, one draw of p.
      inner_tx: of :math:`\phi` and the base weights.
      outer_tx: of :math:`\lambda`; ``optax.set_to_zero()`` only trains. A line search follows
        the validation loss of the network's weights.
      inner_steps: training steps a step.
      draws: S, draws a training step; the batch is shared.
      seed: of the network's first parameters, where ``init`` gets no ``key``.

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
    for name, loss in (("outer", outer), ("inner", inner)):
        check_loss(name, loss)
    check_fixed_tx("inner_tx", inner_tx)
    check_tx("outer_tx", outer_tx)
    check_count("inner_steps", inner_steps)
    check_count("draws", draws)
    check_count("seed", seed, 0)
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
        Problem(outer, inner), network, sample, inner_tx, outer_tx, inner_steps, draws, seed
    )
    return Algorithm(run.init, run.step, run.deploy)


@dataclasses.dataclass(frozen=True)
class _GlobalResponse:
    """The settings of :func:`global_response`, checked, and the step they make."""

    problem: Problem
    network: Network
    sample: Callable[[Key, Hparams], Hparams]
    inner_tx: optax.GradientTransformation
    outer_tx: optax.GradientTransformation
    inner_steps: int
    draws: int
    seed: int

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
        params, hparams = own(params), own(hparams)
        check_key(key)
        key = jax.random.key(self.seed) if key is None else key
        response = self.network.init(key, params, hparams)
        state = GlobalResponseState(
            params,
            None,
            response,
            self.inner_tx.init((params, response)),
            hparams,
            self.outer_tx.init(hparams),
            jnp.zeros((), jnp.int32),
        )
        return own(state)

    def step(
        self,
        state: GlobalResponseState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[GlobalResponseState, GlobalResponseInfo]:
        """One step; see :func:`global_response`."""
        if key is None:
            raise ValueError(
                "`key` is missing: a step draws hyperparameters. Pass `key=jax.random.key(...)`."
            )
        check_key(key)
        check_state(state, GlobalResponseState)
        reads = f"one batch for each of the inner_steps={self.inner_steps} steps"
        check_stack(inner_batches, self.inner_steps, "inner_batches", reads)
        first = batch_at(inner_batches, 0)
        check_problem(self.problem, state.params, state.hparams, first, outer_batch)
        check_inner(self.problem, state.params, state.hparams, first)
        check_responds(self.problem, state.params, state.hparams, first, outer_batch)
        (params, response), opt_state, inner_value, grad_norm = self._train(
            state, inner_batches, first, key
        )

        def validation(lam: Hparams) -> Scalar:
            weights = self.network.apply(response, params, lam)
            return self.problem.outer_loss(weights, lam, outer_batch)[0]

        value, grads = jax.value_and_grad(validation)(state.hparams)
        hparams, outer_opt_state = update(
            self.outer_tx, grads, state.outer_opt_state, state.hparams,
            value=value, value_fn=validation,
        )  # fmt: skip
        norm = tree.norm(grads)
        result = status_of(
            code(Status.ok),
            (~jnp.isfinite(inner_value), Status.nonfinite_input),
            (~jnp.isfinite(value + norm), Status.nonfinite_output),
        )
        new = GlobalResponseState(
            params, None, response, opt_state, hparams, outer_opt_state, state.step + 1
        )
        new = same_type(new, state, "state", "Choose optimizers whose state keeps its dtypes.")
        return new, GlobalResponseInfo(value, inner_value, grad_norm, norm, result, state.hparams)

    def deploy(self, state: GlobalResponseState, hparams: Hparams | None = None) -> Params:
        """The network's weights at ``hparams``; see :class:`~bilevel.Algorithm`."""
        at = state.hparams if hparams is None else hparams
        return self.network.apply(state.response, state.params, at)

    def _draw(self, key: Key, hparams: Hparams) -> Hparams:
        """One draw of p, in the dtypes of ``hparams``."""
        drawn = self.sample(key, hparams)
        check_returned(drawn, hparams, "sample")
        return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), drawn, hparams)

    def _train(
        self, state: GlobalResponseState, inner_batches: Batch, first: Batch, key: Key
    ) -> tuple[Any, Any, Scalar, Scalar]:
        """``inner_steps`` training steps: weights, optimizer state, last loss and its slope."""

        def mean_loss(weights: Any, drawn: Hparams, batch: Batch) -> Scalar:
            def one(lam: Hparams) -> Scalar:
                at = self.network.apply(weights[1], weights[0], lam)
                return self.problem.inner_loss(at, lam, batch)

            if self.draws == 1:  # products with a batch of one set of weights are slow on CPU
                return one(jax.tree.map(lambda x: x[0], drawn))
            return jnp.mean(jax.vmap(one)(drawn))

        def train(k: Any, carry: Any) -> Any:
            weights, opt_state, loss, norm = carry
            keys = jax.random.split(jax.random.fold_in(key, k), self.draws)
            drawn = jax.vmap(lambda k: self._draw(k, state.hparams))(keys)
            batch = batch_at(inner_batches, k)
            value, grads = jax.value_and_grad(mean_loss)(weights, drawn, batch)
            new = update(
                self.inner_tx, grads, opt_state, weights,
                value=value, value_fn=lambda w: mean_loss(w, drawn, batch),
            )  # fmt: skip
            new = same_type(new, (weights, opt_state), "training state", "Keep its dtypes.")
            return *new, value.astype(loss.dtype), tree.norm(grads).astype(norm.dtype)

        straight = wants_straight_line(self.problem, state.params, state.hparams, first)
        zero = jnp.zeros((), tree.norm(state.params).dtype)
        start = ((state.params, state.response), state.opt_state, zero, zero)
        return loop(self.inner_steps, train, start, straight)
