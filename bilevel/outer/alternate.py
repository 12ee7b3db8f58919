r"""The plain outer loop: some training steps, one hypergradient, one outer step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar, Stats
from bilevel.checks import check_inner, check_problem
from bilevel.hypergradient.base import Response
from bilevel.hypergradient.transform import hypergrad_init, hypergrad_solve
from bilevel.linear.base import loop
from bilevel.operators import slice_batch, wants_straight_line
from bilevel.outer.base import Algorithm, own, same_type
from bilevel.outer.constrain import Space
from bilevel.problem import Problem
from bilevel.settings import check_count

InnerTx = optax.GradientTransformation | Callable[[Hparams], optax.GradientTransformation]


class AlternateState(NamedTuple):
    """Everything a run is: save this one tree and nothing is forgotten.

    Attributes:
      params: inner parameters.
      model_state: mutable statistics of the model (``None`` without ``has_state``).
      inner_opt_state: state of ``inner_tx``.
      hparams: what the losses read.
      raw: what ``outer_tx`` moves, with bounds; ``None`` without them.
      outer_opt_state: state of ``outer_tx``.
      response_state: warm start and the like, of the response.
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
    """

    value: Scalar
    inner_value: Scalar
    hypergrad_norm: Scalar
    result: jax.Array
    stats: Stats
    aux: Any


def alternate(
    outer: Loss,
    inner: Loss,
    response: Response,
    inner_tx: InnerTx,
    outer_tx: optax.GradientTransformation,
    inner_steps: int,
    constrain: Space | None = None,
    has_aux: bool = False,
    has_state: bool = False,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Alternates K training steps with one step along the hypergradient.

    .. math::
        w_{k+1} &= w_k - u(\nabla_w h(w_k, \lambda)), \qquad k = 0 \dots K-1 \\
        \rho &\leftarrow \rho - v\Bigl(
            \bigl(\tfrac{\partial c}{\partial\rho}\bigr)^\top \frac{dF}{d\lambda}(w_K, \lambda)
            \Bigr), \qquad \lambda = c(\rho)

    with the updates :math:`u, v` of two optax optimizers and the bounds :math:`c`.

    Args:
      outer: validation loss :math:`f`, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss :math:`h`, of the same form.
      response: how the hypergradient is found, such as ``Implicit(CG())``. Parameters that it
        moves (``Unroll`` trains while it differentiates) are kept.
      inner_tx: an optax transformation, or a function ``hparams -> transformation`` for inner
        optimizers whose settings are themselves tuned (needs ``Unroll``; implicit responses
        refuse a hyperparameter that only the optimizer reads).
      outer_tx: an optax transformation for the hyperparameters. A hypergradient that is NaN
        makes them NaN; ``optax.apply_if_finite(outer_tx, n)`` skips up to n such steps.
      inner_steps: K, at least 0.
      constrain: bounds; None leaves the hyperparameters free.
      has_aux: ``outer`` returns ``(scalar, aux)``.
      has_state: both losses are ``loss(params, hparams, batch, model_state) -> (scalar,
        model_state)``. Training steps, those of an unrolled response too, pass ``model_state``
        on and keep what comes back; an implicit solve and the outer loss read it frozen.
      unroll: straight-line code instead of a loop over training steps; None decides by
        itself (for convolutions on CPU, tens of times slower inside a loop).

    Returns:
      ``(init, step)``.

      ``init(params, hparams, model_state=None) -> state`` copies its arguments, so that
      ``state`` may be donated.

      ``step(state, *, inner_batches, outer_batch, response_batch=None, key=None) -> (state,
      info)`` is pure, keeps the type of ``state`` (jit, scan, vmap, donation), and reads:

      * ``inner_batches``: stacked along a leading axis. The first K slices are trained on.
        The response reads ``response_batch`` if given (the axis is then K long); otherwise a
        response for one batch reads the last slice, the one last trained on (the axis is K
        long, or 1 if K is 0), and a response for a stack of L batches, as its
        ``num_inner_batches()`` tells, the L slices after the first K (K + L long).
      * ``outer_batch``: what ``outer`` reads.
      * ``key``: for responses that draw random numbers. Randomness of the losses is part of
        their batches.

    Raises:
      TypeError, ValueError: at construction or when traced, for settings, trees, axes and
        values outside their bounds that do not fit; the message names the argument.

    Cost: K inner gradients, one outer gradient, and what the response costs. Memory: the
    state, one gradient, and the response's.

    Reference: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020, Algorithm 1; Franceschi et al., "Bilevel programming for
    hyperparameter optimization and meta-learning", ICML 2018.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.alternate(
      ...     valid, train, bilevel.Implicit(bilevel.CG()), optax.sgd(0.2), optax.adam(0.1),
      ...     inner_steps=20, constrain=bilevel.Space(bilevel.Positive()))
      >>> state = alg.init(jnp.zeros(1), 1.0)
      >>> step = jax.jit(alg.step, donate_argnums=0)
      >>> for _ in range(50):
      ...     state, info = step(
      ...         state, inner_batches=jnp.full((20, 1), 2.0), outer_batch=jnp.array([1.0]))
      >>> bool(abs(info.value) < 0.01)  # the decay that halves the mean of the data is 1
      True
    """
    _check_settings(outer, inner, response, inner_tx, outer_tx, inner_steps, constrain)
    base = Problem(outer, inner, has_aux, has_state)

    def make_tx(hparams: Hparams) -> optax.GradientTransformation:
        tx: Any = inner_tx if _is_tx(inner_tx) else inner_tx(hparams)  # type: ignore[operator]
        if not _is_tx(tx):
            raise TypeError(f"`inner_tx` must return an optax gradient transformation, got {tx!r}.")
        return tx

    def init(params: Params, hparams: Hparams, model_state: ModelState = None) -> AlternateState:
        if has_state and model_state is None:
            raise ValueError(
                "`has_state=True` needs the first statistics: pass `init(params, hparams, "
                "model_state)`."
            )
        params, hparams = own(params), own(hparams)
        raw = None if constrain is None else constrain.unconstrain(hparams)
        state = AlternateState(
            params,
            model_state,
            make_tx(hparams).init(params),
            hparams,
            raw,
            outer_tx.init(hparams if raw is None else raw),
            hypergrad_init(
                outer,
                inner,
                response,
                params,
                hparams,
                has_aux=has_aux,
                has_state=has_state,
                model_state=model_state,
            ),
            jnp.zeros((), jnp.int32),
        )
        # Copied again: bounds and optimizers may hand out the very arrays they were given,
        # and a buffer can be donated once only.
        return own(state)

    def step(
        state: AlternateState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        response_batch: Batch = None,
        key: Key | None = None,
    ) -> tuple[AlternateState, AlternateInfo]:
        hparams = state.hparams
        problem = Problem(outer, inner, has_aux, has_state, state.model_state)
        first, response_batch = _split_batches(response, inner_batches, response_batch, inner_steps)
        check_problem(problem, state.params, hparams, first, outer_batch)
        check_inner(problem, state.params, hparams, first)
        straight = unroll
        if straight is None:
            straight = wants_straight_line(problem, state.params, hparams, first)

        tx = make_tx(hparams)
        gradient = jax.value_and_grad(base.inner_loss_and_state, has_aux=True)

        def train(k: Any, carry: Any) -> Any:
            params, model_state, opt_state, _ = carry
            batch = slice_batch(inner_batches, k)
            (value, model_state), grads = gradient(params, hparams, batch, model_state)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            new = (params, model_state, opt_state, value)
            return _like(new, carry)

        start = (state.params, state.model_state, state.inner_opt_state)
        if inner_steps:
            shape = jax.eval_shape(problem.inner_loss, state.params, hparams, first)
            carry = (*start, jnp.zeros((), shape.dtype))
            params, model_state, inner_opt_state, inner_value = loop(
                inner_steps, train, carry, straight
            )
        else:
            params, model_state, inner_opt_state = start
            inner_value = problem.inner_loss(params, hparams, first)

        solution = hypergrad_solve(
            outer,
            inner,
            response,
            params,
            hparams,
            inner_batch=response_batch,
            outer_batch=outer_batch,
            state=state.response_state,
            key=key,
            has_aux=has_aux,
            has_state=has_state,
            model_state=model_state,
        )
        # A response that trains (`Unroll`) has advanced the statistics along with the parameters.
        advanced = getattr(solution.state, "model_state", None)
        model_state = model_state if advanced is None else advanced
        moved: Any = hparams if constrain is None else state.raw
        grads = solution.grads
        if constrain is not None:
            grads = jax.vjp(constrain.constrain, state.raw)[1](grads)[0]
        updates, outer_opt_state = outer_tx.update(grads, state.outer_opt_state, moved)
        moved = optax.apply_updates(moved, updates)

        new = AlternateState(
            solution.params,
            model_state,
            inner_opt_state,
            moved if constrain is None else constrain.constrain(moved),
            None if constrain is None else moved,
            outer_opt_state,
            solution.state,
            state.step + 1,
        )
        info = AlternateInfo(
            solution.value,
            inner_value,
            tree.norm(grads),
            solution.result,
            solution.stats,
            solution.aux,
        )
        return AlternateState(*_like(new, state, AlternateState._fields)), info

    return Algorithm(init, step)


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


def _is_tx(tx: Any) -> bool:
    return hasattr(tx, "init") and hasattr(tx, "update")


def _check_settings(
    outer: Any,
    inner: Any,
    response: Any,
    inner_tx: Any,
    outer_tx: Any,
    inner_steps: Any,
    constrain: Any,
) -> None:
    for name, loss in (("outer", outer), ("inner", inner)):
        if not callable(loss):
            raise TypeError(
                f"`{name}` must be a function loss(params, hparams, batch), got {loss!r}."
            )
    if not isinstance(response, Response) or isinstance(response, type):
        raise TypeError(
            f"`response` must be a response such as `Implicit(CG())`, got {response!r}."
        )
    if not (_is_tx(inner_tx) or callable(inner_tx)):
        raise TypeError(
            "`inner_tx` must be an optax gradient transformation or a function from hparams to "
            f"one, got {inner_tx!r}."
        )
    if not _is_tx(outer_tx):
        raise TypeError(f"`outer_tx` must be an optax gradient transformation, got {outer_tx!r}.")
    check_count("inner_steps", inner_steps, low=0)
    if constrain is not None and not isinstance(constrain, Space):
        raise TypeError(
            "`constrain` must be a `Space`, such as `Space({'decay': Positive()})`, or None, got "
            f"{constrain!r}."
        )


def _split_batches(
    response: Response, inner_batches: Batch, response_batch: Batch, inner_steps: int
) -> tuple[Batch, Batch]:
    """One training batch (for checks), and what the response reads; see :func:`alternate`."""
    count = getattr(response, "num_inner_batches", lambda: None)()
    given = response_batch is not None
    wanted = inner_steps + (0 if given else (count or (1 if inner_steps == 0 else 0)))
    leaves = tree.paths(inner_batches, "inner_batches")
    if not leaves and wanted:
        raise ValueError("`inner_batches` has no arrays: pass batches stacked on a leading axis.")
    for path, leaf in leaves:
        shape = jnp.shape(leaf)
        if not shape or shape[0] != wanted:
            reads = (
                "`response_batch` is given"
                if given
                else f"the response reads {count} batches of its own"
                if count
                else "the response reads the last of them"
            )
            raise ValueError(
                f"{path} has shape {shape}, expected a leading axis of {wanted}: one batch for "
                f"each of the inner_steps={inner_steps} training steps, and {reads}."
            )
    if not given:
        if count is None:
            response_batch = slice_batch(inner_batches, -1)
        else:
            response_batch = jax.tree.map(lambda x: x[inner_steps:], inner_batches)
    if wanted:
        return slice_batch(inner_batches, 0), response_batch
    first = response_batch if count is None else slice_batch(response_batch, 0)
    return first, response_batch
