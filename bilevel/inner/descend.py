r"""Training: ``steps`` optax steps on the inner loss, as one loop over a stack of batches."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.aliases import Batch, Hparams, ModelState, Params
from bilevel.inner.mixed import close_loss, is_float, mixed_gradient
from bilevel.inner.optimizer import compute_updates, reads_value
from bilevel.operators import wants_straight_line
from bilevel.problem import Problem

Remat: TypeAlias = Literal["none", "step", "sqrt"]


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


def select_batch(batches: Batch, index: Any) -> Batch:
    """Batch ``index`` of a stack; a PRNG key without the leading axis is split by the index."""

    def leaf(x: Any) -> Any:
        if is_single_key(x):
            return jax.random.fold_in(x, index)
        return jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False)

    return jax.tree.map(leaf, batches)


def is_single_key(leaf: Any) -> bool:
    """One typed key (``jax.random.key``): a batch leaf that needs no leading axis."""
    return jnp.ndim(leaf) == 0 and jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def one_batch(batches: Batch) -> Batch:
    """Shapes and dtypes of a single batch of a stack, without touching the data."""
    return jax.eval_shape(lambda b: select_batch(b, 0), batches)


def check_batches(
    batches: Batch, steps: int, name: str = "inner_batch", reads: str = "one batch per step"
) -> None:
    """Refuse a leaf that is not a stack of exactly ``steps`` batches, which ``reads`` explains.

    The one rule for every stack: equality tells it from a single batch of as many examples.
    """
    for path, leaf in tree.paths(batches, name):
        if is_single_key(leaf):
            continue
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != steps:
            raise ValueError(
                f"{path} has shape {jnp.shape(leaf)}, expected a leading axis of {steps}: {reads}. "
                "Stack the batches (to use one batch in every step: "
                f"`jnp.broadcast_to(x, ({steps}, *x.shape))`), and cut a longer stack, "
                f"`x[:{steps}]`. Only a key made by `jax.random.key` may come alone; it is then "
                "split by step."
            )


def start(tx: optax.GradientTransformation, params: Params, model_state: Any = None) -> InnerState:
    """The state before the first step, with dtypes that steps keep."""
    opt_state = jax.tree.map(_strong, tx.init(params))
    return InnerState(params, opt_state, jax.tree.map(_strong, model_state))


def _strong(x: Any) -> Any:
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return x
    return jax.lax.convert_element_type(x, dtype)  # a weak type would change in the first step


def keep_types(new: Any, old: Any) -> Any:
    """``new`` with every leaf in the dtype of ``old``: a loop's carry may not change its types."""

    def leaf(a: Any, b: Any) -> Any:
        dtype = jnp.result_type(b)
        return a if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.asarray(a).astype(dtype)

    return jax.tree.map(leaf, new, old)


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
    straight_line: bool | None = None,
) -> tuple[InnerState, StepInfo]:
    r"""``steps`` optax steps on the inner loss.

    .. math:: w_{t+1} = w_t + u_t(\nabla_w h(w_t, \lambda; b_t)),
        \qquad t = \text{first}, \ldots, \text{first} + \text{steps} - 1

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
      remat: what a backward pass recomputes. ``"none"``: nothing; ``"step"``: each step, from
        its carry; ``"sqrt"``: segments of about :math:`\sqrt{\text{steps}}`, each from its
        first carry, so that memory grows like the square root.
      straight_line: unroll the loop; ``None`` does so for convolutions on CPU, whose
        gradients XLA runs tens of times slower inside a loop.

    Returns:
      The state after the last step, every leaf in the dtype it came in, and :class:`StepInfo`,
      through which no derivative flows.

    Cost: one inner gradient a step.
    """
    if straight_line is None:
        batch = jax.eval_shape(lambda b: select_batch(b, first), batches)
        here = dataclasses.replace(problem, model_state=state.model_state)
        straight_line = wants_straight_line(here, state.params, hparams, batch)
    gradient = _gradient(problem, tx, state, hparams, batches, first, mixed)

    def step(state: InnerState, index: Any) -> tuple[InnerState, StepInfo]:
        params, opt_state, model_state = state
        grads, loss, new_model_state = gradient(params, hparams, model_state, batches, index)

        def value_fn(params: Params) -> Any:
            batch = select_batch(batches, index)
            return problem.inner_loss_and_state(params, hparams, batch, model_state)[0]

        updates, new_opt_state = compute_updates(
            tx, grads, opt_state, params, value=loss, value_fn=value_fn
        )
        new_params = optax.apply_updates(params, updates)
        new = keep_types(InnerState(new_params, new_opt_state, new_model_state), state)
        rounded = _rounded(params, updates, new.params)
        return new, jax.lax.stop_gradient(StepInfo(loss, tree.norm(grads), rounded))

    return _loop(step, state, first, steps, remat, straight_line)


def _rounded(params: Params, updates: Any, moved: Params) -> tuple[jax.Array, jax.Array] | None:
    """Squared norms, over leaves of half precision: the update, and its part that was lost."""
    exact = optax.apply_updates(tree.accumulate(params), updates)
    leaves = zip(*map(jax.tree.leaves, (params, exact, moved)), strict=True)
    half = [x for x in leaves if is_float(x[0]) and jnp.finfo(x[0].dtype).bits < 32]
    asked = [sum_ - w.astype(sum_.dtype) for w, sum_, _ in half]
    lost = [sum_ - new.astype(sum_.dtype) for _, sum_, new in half]
    return (tree.vdot(asked, asked), tree.vdot(lost, lost)) if half else None


def _gradient(
    problem: Problem,
    tx: optax.GradientTransformation,
    state: InnerState,
    hparams: Hparams,
    batches: Batch,
    first: int,
    mixed: bool,
) -> Callable[..., Any]:
    if mixed:
        batch = jax.eval_shape(lambda b: select_batch(b, first), batches)
        loss, consts = close_loss(problem, state.params, hparams, batch, state.model_state)
        value = jax.eval_shape(loss, consts, state.params, hparams, batch, state.model_state)[0]
        with_value = reads_value(tx, state.params, value)
        primitive = mixed_gradient(loss, select_batch, problem.has_state, with_value)
        return lambda *args: primitive(consts, *args)

    def gradient(params, hparams, model_state, batches, index):
        (loss, new), grads = jax.value_and_grad(problem.inner_loss_and_state, has_aux=True)(
            params, hparams, select_batch(batches, index), model_state
        )
        return grads, loss, new

    return gradient


def segment_length(steps: int) -> int:
    """A divisor of ``steps`` near its square root (the lower of two), or else the root rounded."""
    root = math.sqrt(steps)
    divisors = [d for d in range(1, steps + 1) if steps % d == 0 and root / 1.7 <= d <= root * 1.7]
    if divisors:
        return min(divisors, key=lambda d: (round(abs(math.log(d / root)), 6), d))
    return max(round(root), 1)


def _loop(
    step: Callable[..., Any],
    state: InnerState,
    first: int,
    steps: int,
    remat: Remat,
    straight_line: bool,
) -> tuple[InnerState, StepInfo]:
    def run(step: Callable[..., Any], carry: Any, indices: jax.Array) -> tuple[Any, Any]:
        # Not `unroll=True`: a scan of length one would stay a loop.
        return jax.lax.scan(step, carry, indices, unroll=0 if straight_line else 1)

    # Inside a loop the recomputation cannot be merged with the first computation, so the
    # barriers that forbid merging are only needed in straight-line code.
    indices = first + jnp.arange(steps)
    if remat == "step":
        step = jax.checkpoint(step, prevent_cse=straight_line)
    if remat != "sqrt":
        return run(step, state, indices)

    length = segment_length(steps)
    whole = steps - steps % length

    def segment(carry: InnerState, indices: jax.Array) -> tuple[InnerState, StepInfo]:
        return run(step, carry, indices)

    body = jax.checkpoint(segment, prevent_cse=straight_line)
    state, info = run(body, state, indices[:whole].reshape(-1, length))
    info = jax.tree.map(lambda x: x.reshape(whole), info)
    if whole < steps:
        state, rest = jax.checkpoint(segment)(state, indices[whole:])
        info = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), info, rest)
    return state, info
