r"""Cross-validation as one bilevel problem: K inner solutions in one tree.

.. math::
    F(λ) = 1/K ∑_{k=1}^{K} f(w_k^*(λ), λ; test_k),
    w_k^*(λ) = \operatorname*{argmin}_w h(w, λ; train_k)

The inner loss of all is :math:`∑_k h(w_k)`: its Hessian has one block per fold, and each block
is that of a single fit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar
from bilevel.ground.settings import check_flag, check_takes, is_function
from bilevel.objectives.folds import SizeGroup, check_data, checked_folds, size_groups, taken
from bilevel.problem.conditions import Composite, Condition, FixedPoint, Root
from bilevel.problem.validate import check_inner_problem, check_losses, check_scalar


class FoldScores(NamedTuple):
    """The outer loss of each fold.

    Attributes:
      mean: over the folds, what is minimized.
      standard_error: of that mean, :math:`s / \\sqrt{K}` with the standard deviation s of the
        folds. Folds share training examples, so it is an estimate, and rather too small.
      folds: (K,), in the order of the folds.
    """

    mean: Scalar
    standard_error: Scalar
    folds: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class CrossValidation:
    r"""K-fold cross-validation: the mean of K validation losses, each after a fit of its own.

    Args:
      folds: pairs (train, test) of index arrays (or boolean masks), e.g. ``KFold(5).split(x)`` of
        scikit-learn, or :func:`~bilevel.objectives.k_folds`.
      outer_loss: validation loss of one fit, ``loss(params, hparams, batch) -> scalar``: a mean
        over examples.
      inner_loss: training loss of one fit, or a condition (:class:`~bilevel.Composite`, ...).
      partition: refuse folds that do not test every example exactly once. False for repeated
        folds, random splits, time series.

    A value with what every objective has:

    * ``outer``, ``inner``: losses of all folds, for ``hypergrad``, ``with_response`` and every
      outer loop. ``inner`` is the sum over the folds, so that a step size that suits one fit
      suits all; it is a condition where ``inner_loss`` is one.
    * ``init(params)``: K copies along a leading axis. What a solve returns is the warm start of
      the next: one per fold.
    * ``inner_batch(data)``, ``outer_batch(data)``: the examples of the folds. Data may be any tree
      of arrays with examples along their leading axis; a single key is folded with the fold.
    * ``each(solve)``: a solver of all folds from one of a single fit.
    * ``scores(params, hparams, outer_batch)``: a :class:`FoldScores`; ``outer_and_scores`` is
      ``outer`` with it as auxiliary output (``has_aux=True``).

    Folds of the same sizes are computed together (``vmap``); sizes that differ by one make two
    groups.

    Raises:
      TypeError, ValueError: for folds that are no pairs of indices, that test what they train on,
        or that do not partition the examples; for losses that cannot be called; in
        ``inner_batch``, for arrays of another number of examples.

    Cost: K fits, in time and memory; the training data K - 1 times. A derivative costs that of one
    fit on all these data.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def error(w, lam, batch):
      ...     x, y = batch
      ...     return jnp.mean((x @ w - y) ** 2)
      >>> def ridge(w, lam, batch):
      ...     return error(w, lam, batch) + jnp.exp(lam) * jnp.sum(w**2)
      >>> def fit(w, lam, batch):
      ...     return bilevel.minimize(ridge, w, lam, batch, tol=1e-5).params
      >>> x = jax.random.normal(jax.random.key(0), (20, 3))
      >>> data = x, x @ jnp.ones(3)
      >>> cv = bilevel.objectives.CrossValidation(
      ...     bilevel.objectives.k_folds(20, 5), error, ridge)
      >>> solve = bilevel.with_response(cv.each(fit), cv.inner, bilevel.Implicit(bilevel.CG()))
      >>> def value(lam):
      ...     w = solve(cv.init(jnp.zeros(3)), lam, cv.inner_batch(data))
      ...     return cv.outer(w, lam, cv.outer_batch(data))
      >>> bool(jax.jit(jax.grad(value))(0.0) > 0)  # no noise: the penalty should fall
      True

    Reference: Stone, "Cross-validatory choice and assessment of statistical predictions", JRSS B
    1974; with implicit differentiation: Bertrand et al., "Implicit differentiation for fast
    hyperparameter selection in non-smooth convex learning", JMLR 2022.
    """

    folds: Any
    outer_loss: Loss
    inner_loss: Loss | Condition
    partition: bool = True
    groups: tuple[SizeGroup, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_losses(outer_loss=self.outer_loss)
        check_inner_problem(self.inner_loss)
        check_flag("partition", self.partition)
        object.__setattr__(self, "folds", checked_folds(self.folds, self.partition))
        object.__setattr__(self, "groups", size_groups(self.folds))

    def init(self, params: Params) -> Params:
        """K copies of ``params``, along a new leading axis."""
        k = len(self.folds)
        return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], k, axis=0), params)

    def inner_batch(self, data: Batch) -> Batch:
        """What ``inner`` reads: the examples that each fold trains on, of all ``data``."""
        self._check_data(data)
        return tuple(taken(data, group.train, group.places) for group in self.groups)

    def outer_batch(self, data: Batch) -> Batch:
        """What ``outer`` reads: the examples that each fold tests, of all ``data``."""
        self._check_data(data)
        return tuple(taken(data, group.test, group.places) for group in self.groups)

    def each(self, solve: Callable[..., Any]) -> Callable[..., Any]:
        """``solve(params, hparams, inner_batch)`` of a single fit, made one of all folds.

        Whatever tree it returns comes back with a leading axis of K.
        """
        if not is_function(solve):
            raise TypeError(f"`solve` must be a function of a single fit, got {solve!r}.")
        check_takes("solve", solve, "solve(params, hparams, inner_batch)")

        def solve_all(params: Params, hparams: Hparams, inner_batch: Batch) -> Any:
            return self._map(solve, params, hparams, inner_batch)

        return solve_all

    @property
    def inner(self) -> Any:
        """The training loss of all folds, or their condition."""
        one = self.inner_loss
        if isinstance(one, Composite):
            return Composite(self._sum_of_inner, self._prox, one.step_size)
        if isinstance(one, FixedPoint):
            return FixedPoint(self._step)
        if isinstance(one, Root):
            return Root(self._equation)
        return self._sum_of_inner

    def outer(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        """The mean validation loss."""
        return jnp.mean(self._values(params, hparams, batch))

    def scores(self, params: Params, hparams: Hparams, batch: Batch) -> FoldScores:
        """The validation loss of each fold, their mean and its standard error."""
        values = self._values(params, hparams, batch)
        spread = jnp.std(values, ddof=1) / jnp.sqrt(jnp.asarray(values.size, values.dtype))
        return FoldScores(jnp.mean(values), spread, values)

    def outer_and_scores(
        self, params: Params, hparams: Hparams, batch: Batch
    ) -> tuple[Scalar, FoldScores]:
        """``outer`` with its :class:`FoldScores` as auxiliary output, for ``has_aux=True``."""
        scores = self.scores(params, hparams, batch)
        return scores.mean, jax.lax.stop_gradient(scores)

    def _values(self, params: Params, hparams: Hparams, batch: Batch) -> jax.Array:
        def one(w: Params, lam: Hparams, data: Batch) -> Scalar:
            value = self.outer_loss(w, lam, data)
            check_scalar(value, "outer_loss")
            return value

        return self._map(one, params, hparams, batch)

    def _sum_of_inner(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        one: Any = self.inner_loss
        loss = one.loss if isinstance(one, Composite) else one

        def value(w: Params, lam: Hparams, data: Batch) -> Scalar:
            value = loss(w, lam, data)
            check_scalar(value, "inner_loss")
            return value

        return jnp.sum(self._map(value, params, hparams, batch))

    def _prox(self, params: Params, hparams: Hparams, step_size: Any) -> Params:
        one: Any = self.inner_loss
        return jax.vmap(one.prox, in_axes=(0, None, None))(params, hparams, step_size)

    def _step(self, params: Params, hparams: Hparams, batch: Batch) -> Params:
        one: Any = self.inner_loss
        return self._map(one.step, params, hparams, batch)

    def _equation(self, params: Params, hparams: Hparams, batch: Batch) -> Params:
        one: Any = self.inner_loss
        return self._map(one.equation, params, hparams, batch)

    def _map(self, function: Callable[..., Any], params: Params, hparams: Hparams, batch: Batch):
        """``function`` of each fold; a tree with a leading axis of K, in the order of the folds."""
        self._check_stacked(params, batch)
        mapped = jax.vmap(function, in_axes=(0, None, 0))
        if len(self.groups) == 1:
            return mapped(params, hparams, batch[0])
        parts = []
        for group, data in zip(self.groups, batch, strict=True):
            mine = jax.tree.map(lambda x, places=group.places: x[places], params)
            parts.append(mapped(mine, hparams, data))
        back = np.argsort(np.concatenate([group.places for group in self.groups]))
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[back], *parts)

    def _check_stacked(self, params: Params, batch: Batch) -> None:
        k = len(self.folds)
        for leaf in jax.tree.leaves(params):
            if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != k:
                raise ValueError(
                    f"`params` of {k} folds have a leading axis of {k}, got a leaf of shape "
                    f"{jnp.shape(leaf)}: start from `init(params)` of this `CrossValidation`."
                )
        if not isinstance(batch, tuple) or len(batch) != len(self.groups):
            raise ValueError(
                "the batch is not one of these folds: make it with `inner_batch(data)` or "
                "`outer_batch(data)` of this `CrossValidation`, of all examples."
            )

    def _check_data(self, data: Batch) -> None:
        last = 1 + max(int(max(np.max(train), np.max(test))) for train, test in self.folds)
        check_data(data, last, exact=self.partition)
