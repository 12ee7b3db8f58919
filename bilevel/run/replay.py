r"""``metagradient``: the gradient of a whole training run, driven from the host."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Loss, ModelState, Params
from bilevel.ground.loops import strong_types
from bilevel.ground.settings import check_flag, check_takes, is_function
from bilevel.ground.status import Status, status_of
from bilevel.hypergradient.judge import status_of_rounding
from bilevel.hypergradient.unroll import Advanced, Unroll
from bilevel.inner.descend import InnerState, StepInfo
from bilevel.inner.mixed import is_float
from bilevel.inner.optimizer import InnerTx, check_inner_tx
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import SPLIT_MODEL, check_inexact, check_inner, check_losses
from bilevel.run import arguments
from bilevel.run.interrupt import deferred_interrupts
from bilevel.run.lock import locked
from bilevel.run.passes import Passes, Saved
from bilevel.run.processes import several
from bilevel.run.segments import Batches, Steps, compiled_steps, floats_of

ROOM = 2**30
"""Bytes that what is kept may take together where the number of states is not given."""


class Metagradient(NamedTuple):
    """The gradient of a whole run, and what is needed to go on from either of its ends.

    Attributes:
      value, aux: of the outer loss at the end; ``None`` without one.
      grads: ``direct + indirect``, shaped like ``hparams``.
      direct: the outer loss's own derivative in the hyperparameters.
      indirect: what comes through the run.
      end: the :class:`~bilevel.InnerState` after the last step.
      start: the derivative in the state before the first step, as an ``InnerState``: the
        ``cotangent`` of an earlier run that ended there. Its ``opt_state`` is ``None`` where
        the run began with a fresh one; integers have the empty dtype ``float0``.
      losses: (steps,), the training loss before each step, as a NumPy array.
      result: int32 :class:`~bilevel.Status`; ``rounding`` where half precision lost too much.
    """

    value: Any
    aux: Any
    grads: Any
    direct: Any
    indirect: Any
    end: InnerState
    start: InnerState
    losses: np.ndarray
    result: jax.Array


def metagradient(
    outer: Loss | None,
    inner: Loss,
    inner_tx: InnerTx,
    params: Params,
    hparams: Hparams,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    outer_batch: Batch = None,
    first: int = 0,
    opt_state: Any = None,
    cotangent: InnerState | Callable[[InnerState], InnerState] | None = None,
    max_states: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    run_id: Any = None,
    progress: bool = True,
    has_aux: bool = False,
    has_state: bool = False,
    model_state: ModelState = None,
) -> Metagradient:
    r"""The gradient of the outer loss after a whole training run, of any length.

    .. math:: w_{t+1} = U(w_t, λ; b_t),
        dF/dλ = ∂_λ f + ∑_t (∂_λ U_t)ᵀ α_{t+1}

    What ``hypergrad`` with ``Unroll`` computes inside one compiled program, this drives from the
    host: one compiled step and one compiled pullback, batches made when they are needed, and
    states kept in memory where the schedule of :mod:`bilevel.inner.reversal` wants them, or on
    disk. A run that is killed goes on where it was, in either pass, to the same bits.

    Args:
      outer: as in :func:`~bilevel.hypergrad`; or ``None``, with ``cotangent``.
      inner: the training loss, ``loss(params, hparams, batch) -> scalar``.
      inner_tx: an optax transformation, or ``hparams -> transformation``.
      params: where the run begins.
      hparams: as in ``hypergrad``.
      batches: ``step -> batch`` of the integer step, from ``first``. It is called more than once
        for a step and must return the same batch each time; some are compared by check sums.
      steps: the number of training steps.
      outer_batch: what ``outer`` reads.
      first: the index of the first step, where this run continues another.
      opt_state: the optimizer's state to begin with; a fresh one if left out.
      cotangent: what depends on the end of the run besides ``outer``: the derivative in it, as
        the ``start`` of a later :class:`Metagradient`, or a function of the end that returns it.
        So runs compose.
      max_states: states in memory at any time, the one in work and the last included, at least
        3. Fewer mean more steps made again: none with ``steps + 3``, each about once with
        :math:`\sqrt{2 · steps}`, three times for 10 000 steps with 30. Left out, as
        many as fit in 1 GiB, at least 32; and where the activations of all steps fit too, they
        are kept instead, which is the fastest: nothing is computed again.
      checkpoint_dir: a folder that makes the run durable. The forward pass leaves a state there
        every ``checkpoint_every`` steps, the backward pass its progress; the memory then serves
        the steps between two of them. A second run in the same folder is refused.
      checkpoint_every: see there.
      run_id: any JSON value that tells this run from others.
      progress: a live progress bar, where there is a terminal.
      has_aux, has_state, model_state: as in ``hypergrad``.

    Returns:
      :class:`Metagradient`.

    Raises:
      TypeError, ValueError: for arguments that do not fit, for ``batches`` that differ when read
        again, and for a checkpoint of another run.
      OSError: for a folder that cannot be written or is in use.

    Cost: the training run, one product (about two gradients) per step, and the steps made again:
    2.4 times the operations of training where activations are kept, 3.4 where all states are,
    of a network of two hidden layers.

    Reference: Engstrom et al., "Optimizing ML training with metagradient descent", 2025 (REPLAY).

    Example:
      >>> import jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2)
      >>> def valid(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2)
      >>> found = bilevel.metagradient(
      ...     valid, train, lambda lam: optax.sgd(lam["lr"]), jnp.zeros(1), {"lr": 0.5},
      ...     lambda step: jnp.ones(1), steps=2, outer_batch=jnp.ones(1))
      >>> bool(jnp.allclose(found.grads["lr"], -2 * 0.5**3))
      True
    """
    problem = _checked(outer, inner, inner_tx, params, hparams, cotangent, has_aux, has_state)
    if not is_function(batches):
        raise TypeError(
            f"`batches` must be a function step -> batch, got {type(batches).__name__}: it is "
            "called again in the backward pass. Pass `lambda step: ...` that draws the batch from "
            "the step."
        )
    check_takes("batches", batches, "batches(step)")
    arguments.check_count("steps", steps, 1, "training steps")
    arguments.check_count("first", first, 0, "steps before this run")
    arguments.check_count("checkpoint_every", checkpoint_every, 1, "steps between checkpoints")
    if max_states is not None:
        arguments.check_count("max_states", max_states, 3, "states in memory")
    check_flag("progress", progress)
    folder = arguments.check_path("checkpoint_dir", checkpoint_dir, folder=True)
    if folder is not None and several():
        raise ValueError(
            f"`checkpoint_dir` of `metagradient` serves one process, not {jax.process_count()}: "
            "leave it out, or save the state between two shorter runs (`first=`, "
            "`cotangent=`) yourself."
        )
    params, hparams = (strong_types(jax.tree.map(jnp.asarray, x)) for x in (params, hparams))

    model_state = strong_types(model_state)
    run = compiled_steps(problem, inner_tx)
    begun = run.begin(params, hparams, model_state, opt_state)
    one = batches(first)
    # Where a later run takes over, it may read what this one does not.
    response = None if outer is None or cotangent is not None else Unroll(inner_tx, 1)
    _check_reads(run, problem.at(model_state), response, params, hparams, one, outer_batch)
    places = _places(run, begun, hparams, one, max_states, steps, folder and checkpoint_every)
    with contextlib.ExitStack() as stack:
        check_interrupt = stack.enter_context(deferred_interrupts())
        saved = None
        if folder is not None:
            stack.enter_context(locked("checkpoint_dir", folder, folder / ".lock"))
            saved = Saved(folder, checkpoint_every, arguments.as_json(run_id), steps,
                          (begun, hparams))  # fmt: skip
        source = Batches(batches, first, steps)
        passes = Passes(run, source, hparams, first, steps,
                        places, saved, progress, check_interrupt)  # fmt: skip
        stack.enter_context(contextlib.closing(passes))
        end, told = passes.forward(begun)
        value, aux, given, direct = _at_the_end(run, problem, end, hparams, outer_batch, cotangent)
        given, indirect = passes.backward(given, begun)
    of_params, more = run.pull_begin(params, hparams, model_state, opt_state, given)
    through = _derivative_of_start(begun, given, of_params)
    if opt_state is None:
        through = through._replace(opt_state=None)
    indirect = tree.add(indirect, more)
    grads = tree.add(direct, indirect)
    losses = told[:, 0]
    finite = jnp.isfinite(losses).all() & _all_finite(end.params)
    half = any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(params))
    rounded = (jnp.asarray(told[:, 1]), jnp.asarray(told[:, 2])) if half else None
    info = StepInfo(jnp.asarray(losses), jnp.asarray(losses), rounded)
    result = status_of(status_of_rounding([info], params), (~finite, Status.nonfinite_input),
                       (~_all_finite(grads), Status.nonfinite_output))  # fmt: skip
    return Metagradient(value, aux, grads, direct, indirect, end, through, losses, result)


_all_finite = jax.jit(tree.all_finite)


def _check_reads(
    run: Steps,
    problem: Problem,
    response: Unroll | None,
    params: Params,
    hparams: Hparams,
    batch: Batch,
    outer_batch: Batch,
) -> None:
    """Refuse losses and batches that do not fit, once for arguments of a form."""
    form: Any = None
    leaves, treedef = jax.tree.flatten((params, hparams, batch, outer_batch, problem.model_state))
    with contextlib.suppress(TypeError, ValueError):  # no arrays: the checks say so
        form = treedef, response is None, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    if form is not None and form in run.checked:
        return
    check_inner(problem, params, hparams, batch)
    if response is not None:
        stack = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
        response.check(problem, params, hparams, stack, outer_batch, None)
    run.checked.add(form)


def _places(
    run: Steps,
    begun: InnerState,
    hparams: Hparams,
    batch: Batch,
    max_states: int | None,
    steps: int,
    segment: int | None,
) -> int | None:
    """States to keep beside the first, or None: keep what the derivative of each step needs."""
    if max_states is not None:
        return max_states - 3
    try:
        linked = jax.tree.leaves((run.link.trace(begun, hparams, batch).out_info[::2], batch))
    except (TypeError, ValueError, RuntimeError):
        pass  # a backward rule without a derivative; `pull` pushes tangents instead
    else:
        size = sum(x.size * x.dtype.itemsize for x in linked)
        if size * min(steps, segment or steps) <= ROOM:
            return None
    one = sum(x.nbytes for x in jax.tree.leaves(begun))
    return int(max(32, min(steps + 3, ROOM // max(one, 1)))) - 3


def _checked(
    outer: Any,
    inner: Any,
    inner_tx: Any,
    params: Params,
    hparams: Hparams,
    cotangent: Any,
    has_aux: bool,
    has_state: bool,
) -> Problem:
    check_flag("has_aux", has_aux)
    check_flag("has_state", has_state)
    check_losses(inner=inner, **({} if outer is None else {"outer": outer}))
    check_inner_tx(inner_tx)
    check_inexact(params, "params", SPLIT_MODEL)
    check_inexact(hparams, "hparams", "An integer has no derivative: keep it out of `hparams`.")
    if outer is None and cotangent is None:
        raise ValueError(
            "`outer` is None and there is no `cotangent`: nothing says what to differentiate. Pass "
            "the outer loss, or the `start` of the run that follows this one."
        )
    nothing: Any = None
    return Problem(nothing if outer is None else outer, inner, has_aux, has_state)


def _at_the_end(
    run: Steps, problem: Problem, end: InnerState, hparams: Hparams, batch: Batch, cotangent: Any
) -> tuple[Any, Any, list[Any], Hparams]:
    """The outer loss, its ``aux``, the cotangents of the floats of ``end``, the direct term."""
    value = aux = None
    given: list[Any] = [None] * len(floats_of(end))
    if problem.outer is None:
        direct = jax.tree.map(jnp.zeros_like, hparams)
    else:
        w: Any = Advanced(end.params, end.model_state) if problem.has_state else end.params
        (value, aux), (g, direct) = run.end(w, hparams, batch, end.model_state)
        here = InnerState(g, None, None)
        if isinstance(g, Advanced):
            here = InnerState(g.params, None, g.model_state)
        given = _added(given, here, end)
    if cotangent is not None:
        more = cotangent(end) if callable(cotangent) else cotangent
        given = _added(given, _as_cotangent(more, end), end)
    like = zip(given, floats_of(end), strict=True)
    return value, aux, [jnp.zeros_like(x) if g is None else g for g, x in like], direct


def _as_cotangent(given: Any, end: InnerState) -> InnerState:
    if not isinstance(given, InnerState):
        raise TypeError(
            "`cotangent` must be an `InnerState(params, opt_state, model_state)` of derivatives "
            "(the `start` of a later metagradient), or a function of the end that returns one, got "
            f"{type(given).__name__}."
        )
    for name in InnerState._fields:
        part, like = getattr(given, name), getattr(end, name)
        if part is not None and jax.tree.structure(part) != jax.tree.structure(like):
            raise ValueError(
                f"`cotangent.{name}` has the tree {jax.tree.structure(part)}, the end of this run "
                f"{jax.tree.structure(like)}: both runs must share model and optimizer."
            )
    return given


def _added(given: list[Any], more: InnerState, end: InnerState) -> list[Any]:
    """``given``, cotangents of the floats of ``end``, plus those in ``more``; None is nothing."""
    rest = iter(given)
    out: list[Any] = []
    for part, like in zip(more, end, strict=True):
        leaves = jax.tree.leaves(like)
        parts = [None] * len(leaves) if part is None else jax.tree.leaves(part)
        for extra, leaf in zip(parts, leaves, strict=True):
            if is_float(leaf):
                old = next(rest)
                if extra is not None:
                    extra = jnp.asarray(extra).astype(leaf.dtype)
                    old = extra if old is None else old + extra
                out.append(old)
    return out


def _derivative_of_start(begun: InnerState, given: list[Any], of_params: Params) -> InnerState:
    """The derivative in the state that the run began with."""
    rest = iter(given)
    start = jax.tree.map(
        lambda x: next(rest) if is_float(x) else np.zeros(x.shape, jax.dtypes.float0), begun
    )
    return start._replace(params=of_params)
