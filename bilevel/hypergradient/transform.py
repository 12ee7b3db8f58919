r"""``hypergrad``: ``jax.grad`` for hyperparameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params
from bilevel.ground.settings import check_flag
from bilevel.hypergradient.base import Hypergradient, Response, inner_for
from bilevel.hypergradient.implicit import Implicit
from bilevel.hypergradient.solve import check_solve, solve
from bilevel.problem.conditions import Condition
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import (
    check_inner_problem,
    check_loss_arguments,
    check_losses,
    check_response,
)


def hypergrad_solve(
    outer: Loss,
    inner: Loss | Condition | None,
    response: Response,
    params: Params,
    *hparams: Hparams,
    inner_batch: Batch,
    outer_batch: Batch,
    state: Any = None,
    key: Key | None = None,
    argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    has_state: bool = False,
    model_state: ModelState = None,
) -> Hypergradient:
    r"""The total derivative of the outer loss, with everything needed to judge it.

    .. math::
        dF/dλ = ∂_λ f
            + (∂w/∂λ)ᵀ ∇_w f

    Args:
      outer: :math:`f`, ``loss(params, hparams, batch) -> scalar`` (the validation loss).
      inner: :math:`h`, ``loss(params, hparams, batch) -> scalar`` (the training loss); or a
        :class:`~bilevel.Composite`, :class:`~bilevel.FixedPoint` or :class:`~bilevel.Root`, for
        implicit responses; or ``None`` for ``UnrollMap``, which brings its own iteration.
      response: how the parameters follow the hyperparameters, e.g. ``Implicit(CG())``.
      params: the inner variable, n real numbers in any pytree.
      *hparams: the outer variable, p real numbers in any pytree. Several positions are
        allowed (``loss(params, a, b, batch)``); ``argnums`` says which to differentiate.
      inner_batch: what ``inner`` reads. Keep randomness in it (a key as a leaf), so that all
        products of a solve see one dropout mask.
      outer_batch: what ``outer`` reads.
      state: ``state`` of the previous result or of :func:`hypergrad_init`; ``None`` starts cold.
      key: for responses that draw random numbers themselves.
      argnums: positions in the losses' arguments, 1 or higher; a sequence gives a tuple.
      has_aux: ``outer`` returns ``(scalar, aux)``.
      has_state: both losses are ``loss(params, hparams, batch, model_state) -> (scalar,
        model_state)``; the solve reads ``model_state`` frozen and discards what comes back.
      model_state: those statistics.

    Returns:
      :class:`Hypergradient`. ``result`` and ``stats`` are computed only if read, under ``jit``.

    Raises:
      TypeError, ValueError: at trace time, for trees, dtypes, shapes or settings that do not
        fit; the message names the argument.

    Cost: one outer gradient and what ``response`` costs.
    """
    check_response(response)
    problem, hparams_in, unpack = _pack(
        outer, inner_for(response, inner), hparams, argnums, has_aux, has_state, model_state
    )
    params = jax.tree.map(_as_array, params)
    hparams_in = jax.tree.map(_as_array, hparams_in)
    arguments: Any = dict(inner_batch=inner_batch, outer_batch=outer_batch, state=state, key=key)
    check_solve(problem, response, params, hparams_in, **arguments)
    solution = solve(problem, response, params, hparams_in, **arguments)
    return solution._replace(
        grads=unpack(solution.grads),
        direct=unpack(solution.direct),
        indirect=unpack(solution.indirect),
    )


def hypergrad_init(
    outer: Loss,
    inner: Loss | Condition | None,
    response: Response,
    params: Params,
    *hparams: Hparams,
    argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    has_state: bool = False,
    model_state: ModelState = None,
) -> Any:
    """The first ``state`` of :func:`hypergrad_solve`, for loops whose carry needs one.

    Its structure, dtypes and sharding are those of every later ``state``. Leaves may be
    ``jax.ShapeDtypeStruct``. Cost: none but its memory.
    """
    check_response(response)
    problem, hparams_in, _ = _pack(
        outer, inner_for(response, inner), hparams, argnums, has_aux, has_state, model_state
    )
    return response.init(problem, params, hparams_in)


def value_and_hypergrad(
    outer: Loss,
    inner: Loss | Condition | None,
    response: Response | None = None,
    *,
    argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    has_state: bool = False,
) -> Callable[..., Any]:
    r"""The outer loss and its hypergradient, as ``jax.value_and_grad`` would return them.

    Returns ``fn(params, *hparams, inner_batch=, outer_batch=, state=None, key=None,
    model_state=None) -> (value, grads)``, with ``has_aux`` ``((value, aux), grads)``.
    Arguments, errors and cost as :func:`hypergrad_solve`, which also tells how far to trust
    the number.
    """
    _check_argnums(argnums)
    response = Implicit() if response is None else response
    check_response(response)

    def fn(params: Params, *hparams: Hparams, inner_batch: Batch, outer_batch: Batch, **kwargs):
        solution = hypergrad_solve(
            outer,
            inner,
            response,
            params,
            *hparams,
            inner_batch=inner_batch,
            outer_batch=outer_batch,
            argnums=argnums,
            has_aux=has_aux,
            has_state=has_state,
            **kwargs,
        )
        value = (solution.value, solution.aux) if has_aux else solution.value
        return value, solution.grads

    return fn


def hypergrad(
    outer: Loss,
    inner: Loss | Condition | None,
    response: Response | None = None,
    *,
    argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    has_state: bool = False,
) -> Callable[..., Any]:
    r"""The hypergradient :math:`dF/dλ`, as ``jax.grad`` would return it.

    Returns ``fn(params, *hparams, inner_batch=, outer_batch=, ...) -> grads``, with
    ``has_aux`` ``(grads, aux)``. Arguments, errors and cost as :func:`hypergrad_solve`.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def train(w, lam, batch):
      ...     x, y = batch
      ...     return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     x, y = batch
      ...     return 0.5 * jnp.mean((x @ w - y) ** 2)
      >>> x, y = jnp.eye(2), jnp.array([1.0, 2.0])
      >>> w = jnp.array([0.5, 1.0])  # the minimizer at lam = log(1/2)
      >>> g = bilevel.hypergrad(valid, train, bilevel.Implicit(bilevel.CG(max_steps=2)))
      >>> bool(jnp.allclose(g(w, jnp.log(0.5), inner_batch=(x, y), outer_batch=(x, y)), 0.3125))
      True
    """
    with_value = value_and_hypergrad(
        outer, inner, response, argnums=argnums, has_aux=has_aux, has_state=has_state
    )

    def fn(params: Params, *hparams: Hparams, inner_batch: Batch, outer_batch: Batch, **kwargs):
        value, grads = with_value(
            params, *hparams, inner_batch=inner_batch, outer_batch=outer_batch, **kwargs
        )
        return (grads, value[1]) if has_aux else grads

    return fn


def _as_array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, (int, float, complex)) else leaf


def _check_argnums(argnums: int | Sequence[int]) -> tuple[int, ...]:
    numbers: tuple[Any, ...] = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    if not numbers or any(isinstance(i, bool) or not isinstance(i, int) for i in numbers):
        raise TypeError(f"`argnums` must be an int or a sequence of ints, got {argnums!r}.")
    if any(i < 1 for i in numbers):
        raise ValueError(
            f"`argnums` must be 1 or higher, got {argnums!r}: position 0 is `params`, the inner "
            "variable, whose derivative the response supplies."
        )
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"`argnums` repeats a position: {argnums!r}. Use each once.")
    return numbers


def _pack(
    outer: Loss,
    inner: Loss | Condition,
    hparams: tuple[Hparams, ...],
    argnums: int | Sequence[int],
    has_aux: bool,
    has_state: bool,
    model_state: ModelState,
) -> tuple[Problem, Hparams, Callable[[Any], Any]]:
    """One ``hparams`` out of the differentiated positions, and what undoes it in a result.

    The single position is passed on as it is; several become a tuple, and positions that are
    not differentiated are bound into the losses.
    """
    numbers = _check_argnums(argnums)
    check_flag("has_aux", has_aux)
    check_flag("has_state", has_state)
    check_losses(outer=outer)
    check_inner_problem(inner, has_state)
    if not has_state and model_state is not None:
        raise ValueError("`model_state` is given but `has_state` is False: pass `has_state=True`.")
    if not hparams:
        raise TypeError("`hparams` is missing: pass it after `params`.")
    if max(numbers) > len(hparams):
        raise ValueError(
            f"`argnums`={argnums!r} names position {max(numbers)}, but the losses receive "
            f"params and {len(hparams)} hyperparameter argument(s): use at most {len(hparams)}."
        )
    if len(hparams) == 1:
        alone = isinstance(argnums, int)
        problem = Problem(outer, inner, has_aux, has_state, model_state)
        return problem, hparams[0], (lambda t: t if alone else (t,))

    if isinstance(inner, Condition):
        raise TypeError(
            f"`hparams`: {len(hparams)} arguments were passed, but a {type(inner).__name__} takes "
            "one: pass them as one tuple or dict."
        )
    for name, loss in (("outer", outer), ("inner", inner)):
        check_loss_arguments(loss, name, has_state, len(hparams))

    def unpacked(loss: Loss) -> Loss:
        def call(params: Params, chosen: tuple, batch: Batch, *rest: Any) -> Any:
            positions = list(hparams)
            for i, value in zip(numbers, chosen, strict=True):
                positions[i - 1] = value
            return loss(params, *positions, batch, *rest)

        return call

    chosen = tuple(hparams[i - 1] for i in numbers)
    alone = isinstance(argnums, int)
    problem = Problem(unpacked(outer), unpacked(inner), has_aux, has_state, model_state)
    return problem, chosen, (lambda t: t[0] if alone else t)
