r"""Training data attribution: how the loss of a query follows the weight of each example."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Key, Params, Stats
from bilevel.ground.batches import check_batch, check_entries
from bilevel.ground.keys import check_key
from bilevel.ground.settings import (
    check_count,
    check_flag,
    check_settings_used,
    check_takes,
    concrete,
)
from bilevel.ground.status import worst
from bilevel.ground.tree import paths
from bilevel.hypergradient.base import Response
from bilevel.hypergradient.judge import judged
from bilevel.hypergradient.unroll import Unroll
from bilevel.inner.descend import descend, start
from bilevel.inner.optimizer import build_tx
from bilevel.problem.two_losses import Point, Problem
from bilevel.problem.validate import SPLIT_MODEL, check_inexact, check_response

Losses: TypeAlias = Callable[[Params, Batch], jax.Array]
"""``losses(params, batch) -> (n,)``: one loss per example of the batch."""

PENALTY = "penalty(params)"


class Influence(NamedTuple):
    r"""How the query loss follows the weight of each training example.

    Attributes:
      scores: :math:`∂L / ∂θ_i` at weights one, (n,), or (q, n) with
        ``per_query``. Removing example i changes L by about ``-scores[i]``: examples with
        negative scores help.
      value: L, the mean loss of the queries, or each one's, (q,).
      params: where the queries were evaluated: the end of the run, or the parameters given.
      result: int32 :class:`~bilevel.Status`, the worst of all solves.
      stats: those of the response; with ``per_query`` one per query.
    """

    scores: jax.Array
    value: jax.Array
    params: Params
    result: jax.Array
    stats: Stats


def influence(
    losses: Losses,
    response: Response,
    params: Params,
    data: Batch,
    queries: Batch,
    *,
    query: Losses | None = None,
    penalty: Callable[[Params], Any] | None = None,
    batches: jax.Array | None = None,
    per_query: bool = False,
    at_once: int = 16,
    key: Key | None = None,
) -> Influence:
    r"""The derivative of a query loss in the weight of every training example.

    .. math::
        h(w, θ) = 1/n ∑_i θ_i ℓ_i(w) + penalty(w),
        scores_i = \frac{∂L(w(θ))}{∂θ_i}\Big|_{θ = 1}

    With ``Implicit(...)`` that is the influence function
    :math:`-1/n ∇Lᵀ H^{-1} ∇ℓ_i`: one solve and one product give all
    examples. With ``Unroll(...)`` it is the exact derivative of the whole training run, from
    ``params`` through every step that ``response`` makes.

    Args:
      losses: ``losses(params, batch) -> (n,)``, one loss per example.
      response: how the parameters follow the weights: ``Implicit(CG(), Hessian(damping))`` at
        trained parameters, or ``Unroll(tx, steps)`` from initial ones.
      params: trained parameters for an implicit response, initial ones for an unrolled one.
      data: the training examples; every leaf has a leading axis of n.
      queries: likewise, q of them.
      query: what is evaluated on ``queries``, ``query(params, batch) -> (q,)``; ``losses`` if
        left out.
      penalty: ``penalty(params) -> scalar``, the part of the training loss without a weight.
      batches: for an unrolled response, integers (steps, size): the examples that each step
        reads. Left out, every step reads all. Over several devices divide their second axis.
      per_query: scores for each query instead of their mean.
      at_once: with ``per_query``, how many queries are pulled back together; one where an explicit
        mesh divides parameters or examples.
      key: for solvers that draw random numbers.

    Returns:
      :class:`Influence`.

    Raises:
      TypeError, ValueError: when traced, for losses that are not one per example, and leading
        axes that do not agree.

    The call compiles itself, once for the same losses and response; data, queries and rows are
    arguments of that program. Inside a ``jax.jit`` of your own, make them its arguments too: what
    a jitted function closes over is a constant of its program.

    Cost: one call of ``response``, training included if it trains; with ``per_query`` one
    pullback per query.

    Reference: Koh, Liang, "Understanding black-box predictions via influence functions", ICML
    2017; Ilyas, Engstrom, "MAGIC: near-optimal data attribution for deep learning", 2025.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> def losses(w, batch):
      ...     return 0.5 * (batch - w) ** 2
      >>> data = jnp.array([0.0, 1.0, 5.0])  # trained: their mean, 2
      >>> found = bilevel.influence(losses, bilevel.Implicit(), jnp.array(2.0), data,
      ...                           queries=jnp.array([1.0]))
      >>> [round(float(s), 3) for s in found.scores]  # 5 pulls the mean away from 1
      [-0.667, -0.333, 1.0]
    """
    check_response(response)
    check_settings_used(response, "response")
    check_flag("per_query", per_query)
    check_count("at_once", at_once)
    check_key(key)
    query = losses if query is None else query
    params = jax.tree.map(jnp.asarray, params)
    weights, problem, batches = _weighted(losses, response, params, data, penalty, batches)
    check_examples("query", query, params, queries, "queries")
    check = getattr(response, "check", None)
    if check is not None:
        check(problem, params, weights, batches, (), None)

    try:
        run = _cached_scores(losses, response, query, penalty, per_query, at_once)
    except TypeError:  # a response or a loss that cannot be hashed
        run = _compiled_scores(losses, response, query, penalty, per_query, at_once)
    return run(params, weights, data, queries, batches, key)


def _compiled_scores(
    losses: Losses,
    response: Response,
    query: Losses,
    penalty: Callable[[Params], Any] | None,
    per_query: bool,
    at_once: int,
) -> Callable[..., Influence]:
    """:func:`influence` of arguments that were checked, compiled: no array is a constant of it."""

    @jax.jit
    def run(
        params: Params, weights: jax.Array, data: Batch, queries: Batch, batches: Any, key: Any
    ) -> Influence:
        problem = _problem(losses, data, penalty)
        w, pullback = response.vjp(problem, params, weights, batches, None, key=key)
        at = w.params if isinstance(w, Point) else w

        def one(value: jax.Array, g: Params) -> Any:
            grads, _, result, stats = pullback(g)
            result = judged(value, g, params, grads, result, stats)
            return grads, result, stats

        if not per_query:
            value, g = jax.value_and_grad(lambda p: jnp.mean(query(p, queries)))(at)
            scores, result, stats = one(value, g)
            return Influence(scores, value, at, result, stats)
        value, pull = jax.vjp(lambda p: query(p, queries), at)

        def row(one_query: tuple[jax.Array, jax.Array]) -> Any:
            cotangent, value_of_one = one_query
            return one(value_of_one, pull(tree.placed_like(cotangent, value))[0])

        rows = jnp.eye(len(value), dtype=value.dtype), tree.replicated(value)
        # JAX maps no `cond` over arrays that an explicit mesh divides.
        read = jax.tree.leaves((params, data, queries))
        divided = any(tree.explicit_spec(x) is not None for x in read)
        together = None if divided else min(at_once, len(value))
        scores, results, stats = jax.lax.map(row, rows, batch_size=together)
        return Influence(scores, value, at, worst(*results), stats)

    return run


_cached_scores = functools.lru_cache(maxsize=8)(_compiled_scores)


def retraining(
    losses: Losses,
    run: Unroll,
    params: Params,
    data: Batch,
    *,
    penalty: Callable[[Params], Any] | None = None,
    batches: jax.Array | None = None,
) -> Callable[[jax.Array], Params]:
    """``train(weights) -> params``: the run that :func:`influence` differentiates, retrained.

    Weights are (n,), one for each example of ``data``, which a weight of zero removes. Arguments
    as of :func:`influence`. The function can be jitted and vmapped; for
    :func:`~bilevel.datamodel_score` and :func:`~bilevel.metasmoothness`. It is a pytree of the
    arrays that it reads (a ``jax.tree_util.Partial``): pass it to a jitted function of your own as
    an argument, and the data are no constants of the compiled program.
    """
    if not isinstance(run, Unroll):
        raise TypeError(
            f"`run` must be `Unroll(inner_tx, steps)`, which says how to train, got {run!r}. For a "
            "solver of your own write the function `weights -> params` instead."
        )
    params = jax.tree.map(jnp.asarray, params)
    batches = _weighted(losses, run, params, data, penalty, batches)[2]

    def train(params: Params, data: Batch, batches: jax.Array, weights: jax.Array) -> Params:
        problem = _problem(losses, data, penalty)
        tx = build_tx(run.inner_tx, weights)
        state = start(tx, params)
        return descend(problem, tx, state, weights, batches, steps=run.steps)[0].params

    return jax.tree_util.Partial(train, params, data, batches)


def _weighted(
    losses: Losses,
    response: Response,
    params: Params,
    data: Batch,
    penalty: Callable[[Params], Any] | None,
    batches: jax.Array | None,
) -> tuple[jax.Array, Problem, Any]:
    """Weights one, the problem with a weight per example, and what its inner loss reads."""
    check_inexact(params, "params", SPLIT_MODEL)
    dtype = check_examples("losses", losses, params, data, "data")
    n = len(jax.tree.leaves(data)[0])
    if penalty is not None:
        check_takes("penalty", penalty, PENALTY)
    stack: Any = None
    if isinstance(response, Unroll):
        stack = _stack(batches, response.steps, n)
    elif batches is not None:
        raise ValueError(
            "`batches` says what each training step reads, and only `Unroll` makes steps: leave it "
            "out, an implicit response reads all of `data`."
        )
    return jnp.ones(n, dtype), _problem(losses, data, penalty), stack


def _problem(losses: Losses, data: Batch, penalty: Callable[[Params], Any] | None) -> Problem:
    """The problem whose hyperparameters are weights of the examples, and batches their rows."""

    def inner(params: Params, weights: jax.Array, index: Any) -> jax.Array:
        here, batch = weights, data
        if index is not None and index.ndim:  # else every step reads all
            # A row beyond the data makes the run NaN; as an index it would be clamped.
            here = tree.rows_of(weights, index, mode="fill", fill_value=jnp.nan)
            batch = jax.tree.map(lambda x: tree.rows_of(x, index), data)
        value = jnp.mean(here * losses(params, batch))
        return value if penalty is None else value + penalty(params)

    def outer(params: Params, weights: jax.Array, batch: Any) -> jax.Array:
        return tree.vdot(params, params)  # never evaluated but for its shape

    return Problem(outer, inner)


def _stack(batches: Any, steps: int, n: int) -> jax.Array:
    if batches is None:
        return jnp.arange(steps)  # which a step does not read
    batches = jnp.asarray(batches)
    if not jnp.issubdtype(batches.dtype, jnp.integer) or batches.ndim != 2:
        raise TypeError(
            "`batches` must hold integers (steps, size), the examples that each step reads, got "
            f"{batches.dtype}{batches.shape}."
        )
    if len(batches) != steps:
        raise ValueError(
            f"`batches` has {len(batches)} rows, expected one for each of the {steps} `steps`."
        )
    if concrete(batches) and batches.size:
        rows = np.asarray(batches)  # an operation of JAX would be traced under `jit`
        low, high = rows.min(), rows.max()
        if low < 0 or high >= n:
            raise ValueError(
                f"`batches` has the rows {low} to {high}, expected 0 to {n - 1}: they count the "
                "examples of `data`."
            )
    return batches


def check_examples(name: str, losses: Any, params: Params, data: Batch, which: str) -> Any:
    """Refuse data without one leading axis, and losses that are not one per example."""
    check_entries(data, which)
    check_batch(data, which)
    sizes = {path: jnp.shape(leaf)[:1] for path, leaf in paths(data, which)}
    if not sizes or len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(
            f"`{which}` must have one leading axis, of its examples, in every leaf; got {sizes}."
        )
    (n,) = next(iter(sizes.values()))
    check_takes(name, losses, f"{name}(params, batch)")
    out = jax.eval_shape(losses, params, data)
    if getattr(out, "shape", None) != (n,) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must return one real loss per example, ({n},) for `{which}`, got {out}: "
            "leave out the mean over examples."
        )
    return out.dtype
