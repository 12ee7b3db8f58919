"""The public entry to training: ``steps`` optax steps on an inner loss."""

from typing import Any

import jax
import optax

from bilevel.ground.aliases import Batch, Hparams, Loss
from bilevel.ground.batches import check_stack, one_batch
from bilevel.ground.loops import strong_types
from bilevel.ground.settings import check_count, check_flag
from bilevel.inner.descend import InnerState, Remat, StepInfo
from bilevel.inner.descend import descend as unchecked
from bilevel.inner.optimizer import check_tx
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import SPLIT_MODEL, check_inexact, check_inner, check_losses


def descend(
    inner: Problem | Loss,
    tx: optax.GradientTransformation,
    state: InnerState,
    hparams: Hparams,
    batches: Batch,
    *,
    steps: int,
    remat: Remat = "none",
    unroll: bool | None = None,
) -> tuple[InnerState, StepInfo]:
    r"""``steps`` optax steps on the inner loss.

    .. math:: w_{t+1} = w_t + u_t(∇_w h(w_t, λ; b_t)),  t = 0, …,
        steps - 1

    Args:
      inner: the loss, ``loss(params, hparams, batch) -> scalar``; or a :class:`~bilevel.Problem`
        whose ``inner`` it is, with ``has_state`` the model state is threaded.
      tx: an optax transformation. Those that ask for the loss receive it.
      state: ``InnerState(params, tx.init(params), model_state)``, or what an earlier call
        returned.
      hparams: passed to the loss as they are.
      batches: every leaf has a leading axis of ``steps``. A single ``jax.random.key`` is split:
        step t sees ``fold_in(key, t)``. A tree without leaves where the loss reads no batch.
      steps: at least 1.
      remat, unroll: as in :func:`bilevel.inner.descend.descend`.

    Returns:
      The state after the last step, every leaf in the dtype it came in, and what each step saw:
      ``loss`` and ``grad_norm`` before its update, (steps,), through which no derivative flows.

    Raises:
      TypeError, ValueError: at trace time, for a loss, an optimizer, a state or batches that do not
        fit; the message names the argument.

    Cost: one inner gradient per step.

    Example:
      >>> import jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2)
      >>> tx, w = optax.sgd(0.5), jnp.zeros(1)
      >>> state, info = bilevel.descend(
      ...     train, tx, bilevel.InnerState(w, tx.init(w)), None, jnp.ones((2, 1)), steps=2)
      >>> float(state.params[0]), info.loss.tolist()
      (0.75, [0.5, 0.125])
    """
    problem: Any = inner
    if not isinstance(inner, Problem):
        check_losses(inner=inner)
        problem = Problem(inner, inner)
    check_losses(inner=problem.inner)
    check_tx("tx", tx)
    if not isinstance(state, InnerState):
        raise TypeError(
            "`state` must be `InnerState(params, tx.init(params), model_state)`, got "
            f"{type(state).__name__}."
        )
    check_count("steps", steps)
    check_flag("unroll", unroll, optional=True)
    check_inexact(state.params, "state.params", SPLIT_MODEL)
    if jax.tree.leaves(batches):
        check_stack(batches, steps, "batches")
    state = InnerState(*map(strong_types, state))
    check_inner(problem.at(state.model_state), state.params, hparams, one_batch(batches))
    return unchecked(problem, tx, state, hparams, batches, steps=steps, remat=remat, unroll=unroll)
