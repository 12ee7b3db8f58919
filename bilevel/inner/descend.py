r"""Training: ``steps`` optax steps on the inner loss, as one loop over a stack of batches."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, ModelState, Params, Scalar
from bilevel.ground.batches import select_batch
from bilevel.ground.loops import keep_types, must_unroll, strong_types
from bilevel.inner.mixed import close_loss, is_float, mixed_gradient
from bilevel.inner.optimizer import compute_updates, reads_value
from bilevel.inner.rerun import rerun
from bilevel.inner.reversal import places_for
from bilevel.problem.two_losses import Problem

Remat: TypeAlias = Literal["none", "step", "sqrt", "log"]

GRADIENT = "gradient of a training step"  # its name for policies of `jax.checkpoint`
KEEP = "Losses and optimizers must return every array in the shape and kind they received it in."


class InnerState(NamedTuple):
    """What a training step carries: parameters, optimizer state, model state."""

    params: Params
    opt_state: Any
    model_state: ModelState = None


class StepInfo(NamedTuple):
    """What each step saw, (steps,): the loss and the gradient's norm, before its update.

    ``rounded`` is there where parameters have a half precision: squared norms of the updates of
    those leaves, and of what their addition to the parameters lost.
    """

    loss: jax.Array
    grad_norm: jax.Array
    rounded: tuple[jax.Array, jax.Array] | None = None


def start(tx: optax.GradientTransformation, params: Params, model_state: Any = None) -> InnerState:
    """The state before the first step, with dtypes that steps keep."""
    return InnerState(params, strong_types(tx.init(params)), strong_types(model_state))


def take_step(
    loss: Callable[[Any, ModelState], tuple[Scalar, ModelState]],
    tx: optax.GradientTransformation,
    state: InnerState,
    gradient: Callable[[Any, ModelState], Any] | None = None,
    given: dict[str, Any] | None = None,
) -> tuple[InnerState, StepInfo]:
    r"""One optimizer step, :math:`w ← w + u(∇_w loss(w))`.

    Every training step of every loop and response is this one, of weights or of a network.

    Args:
      loss: ``loss(params, model_state) -> (value, model_state)``. Optimizers that ask for more
        than its gradient receive its value and the function.
      tx: an optax transformation.
      state: of what is trained; every leaf keeps its type.
      gradient: ``(params, model_state) -> ((value, model_state), grads)``, in place of automatic
        differentiation.
      given: what ``loss`` reads, ``hparams`` and ``batch``, for optimizers that ask for it.

    Cost: one gradient of ``loss``.
    """
    params, opt_state, model_state = state
    if gradient is None:
        gradient = jax.value_and_grad(loss, has_aux=True)
    (value, new_model_state), grads = gradient(params, model_state)
    grads = checkpoint_name(grads, GRADIENT)
    updates, new_opt_state = compute_updates(
        tx, grads, opt_state, params, value=value, value_fn=lambda w: loss(w, model_state)[0],
        given=given,
    )  # fmt: skip
    moved = InnerState(optax.apply_updates(params, updates), new_opt_state, new_model_state)
    new = keep_types(moved, state, "training state", KEEP)
    rounded = _rounded(params, updates, new.params)
    return new, jax.lax.stop_gradient(StepInfo(value, tree.norm(grads), rounded))


def descend(
    problem: Problem,
    tx: optax.GradientTransformation,
    state: InnerState,
    hparams: Hparams,
    batches: Batch,
    *,
    steps: int,
    first: int = 0,
    mixed: bool = False,
    remat: Remat = "none",
    unroll: bool | None = None,
) -> tuple[InnerState, StepInfo]:
    r"""``steps`` optax steps on the inner loss, of arguments that were checked.

    .. math:: w_{t+1} = w_t + u_t(∇_w h(w_t, λ; b_t)),
        t = first, …, first + steps - 1

    Args:
      problem: its ``inner`` is the loss; with ``has_state`` the model state is threaded.
      tx: an optax transformation, built from ``hparams`` where its settings are to be tuned.
      state: from :func:`start`, or what an earlier call returned.
      hparams: passed to the loss.
      batches: every leaf has a leading axis, batch t at index t. A single ``jax.random.key``
        is split: step t sees ``fold_in(key, t)``.
      steps, first: how many steps, and the index of the first batch.
      mixed: differentiate the inner gradient by the primitive of :mod:`bilevel.inner.mixed`
        (reverse mode only) instead of automatically.
      remat: what a backward pass recomputes. ``"none"``: with ``mixed`` nothing but the update,
        else nothing; ``"step"``: each step, from its carry; ``"sqrt"``: each step once more,
        from about :math:`\sqrt{2 · steps}` kept carries; ``"log"``: from
        :math:`log_2 steps` kept carries, each step two to four times for up to 10 000
        of them (see :mod:`bilevel.inner.reversal`).
      unroll: unroll the loop; ``None`` does so for convolutions on CPU, whose
        gradients XLA runs tens of times slower inside a loop.

    Returns:
      The state after the last step, every leaf in the dtype it came in, and :class:`StepInfo`,
      through which no derivative flows.

    Cost: one inner gradient per step.
    """
    if unroll is None:
        batch = jax.eval_shape(lambda b: select_batch(b, first), batches)
        here = problem.at(state.model_state)
        unroll = must_unroll(here.inner_loss, state.params, hparams, batch)
    gradient = None
    if mixed:
        gradient = _mixed(problem, tx, state, hparams, batches, first)

    def step(state: InnerState, index: Any) -> tuple[InnerState, StepInfo]:
        batch = select_batch(batches, index)

        def loss(params: Params, model_state: ModelState) -> tuple[Scalar, ModelState]:
            return problem.inner_loss_and_state(params, hparams, batch, model_state)

        here = None
        if gradient is not None:
            here = functools.partial(gradient, hparams=hparams, batches=batches, index=index)
        return take_step(loss, tx, state, here, {"hparams": hparams, "batch": batch})

    return run_steps(step, state, first, steps, mixed=mixed, remat=remat, unroll=unroll)


def _rounded(params: Params, updates: Any, moved: Params) -> tuple[jax.Array, jax.Array] | None:
    """Squared norms, over leaves of half precision: the update, and its part that was lost."""
    exact = optax.apply_updates(tree.accumulate(params), updates)
    leaves = zip(*map(jax.tree.leaves, (params, exact, moved)), strict=True)
    half = [x for x in leaves if is_float(x[0]) and jnp.finfo(x[0].dtype).bits < 32]
    asked = [sum_ - w.astype(sum_.dtype) for w, sum_, _ in half]
    lost = [sum_ - new.astype(sum_.dtype) for _, sum_, new in half]
    return (tree.vdot(asked, asked), tree.vdot(lost, lost)) if half else None


def _mixed(
    problem: Problem,
    tx: optax.GradientTransformation,
    state: InnerState,
    hparams: Hparams,
    batches: Batch,
    first: int,
) -> Callable[..., Any]:
    """The loss and its gradient as the primitive of :mod:`bilevel.inner.mixed`."""
    batch = jax.eval_shape(lambda b: select_batch(b, first), batches)
    loss, consts = close_loss(problem, state.params, hparams, batch, state.model_state)
    value = jax.eval_shape(loss, consts, state.params, hparams, batch, state.model_state)[0]
    with_value = reads_value(tx, state.params, value, hparams, batch)
    primitive = mixed_gradient(loss, select_batch, problem.has_state, with_value)

    def gradient(params: Params, model_state: ModelState, hparams: Any, batches: Any, index: Any):
        grads, value, new = primitive(consts, params, hparams, model_state, batches, index)
        return (value, new), grads

    return gradient


def run_steps(
    step: Callable[..., Any],
    state: Any,
    first: int,
    steps: int,
    *,
    mixed: bool = False,
    remat: Remat = "none",
    unroll: bool = False,
) -> tuple[Any, Any]:
    """``steps`` applications of ``step(state, index) -> (state, info)``, with the options of
    :func:`descend` for what a backward pass keeps."""
    if remat in ("sqrt", "log"):
        places = places_for(steps, remat)
        return rerun(step, state, first=first, steps=steps, places=places, unroll=unroll)
    # Inside a loop the recomputation cannot be merged with the first computation, so the
    # barriers that forbid merging are only needed where it is unrolled.
    if remat == "step" or (mixed and steps > 1):
        step = jax.checkpoint(step, prevent_cse=unroll)
    if remat == "none" and not mixed and not unroll:
        # Counted in the carry: indices that are scanned over are read from an array in each step.
        def counted(carry: Any, _: None) -> tuple[Any, StepInfo]:
            at, index = carry
            at, info = step(at, index)
            return (at, index + 1), info

        (state, _), info = jax.lax.scan(counted, (state, jnp.array(first, int)), length=steps)
        return state, info
    # Not `unroll=True`: a scan of length one would stay a loop.
    return jax.lax.scan(step, state, first + jnp.arange(steps), unroll=0 if unroll else 1)
