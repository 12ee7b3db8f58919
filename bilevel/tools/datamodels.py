r"""How well scores of examples predict what training without some of them gives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Key, Params
from bilevel.ground.keys import require_key
from bilevel.ground.settings import check_count, check_takes
from bilevel.tools.attribution import Influence, Losses


class DatamodelScore(NamedTuple):
    """How predictions and retrained runs agree.

    Attributes:
      score: the linear datamodelling score: the mean of ``per_query``, 1 for perfect ranks.
      per_query: (q,), Spearman correlations over the subsets.
      predicted: (subsets, q), the query losses that the scores predict.
      actual: (subsets, q), those of the retrained runs.
      kept: (subsets, n), which examples each subset keeps.
    """

    score: float
    per_query: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    kept: np.ndarray


def datamodel_score(
    found: Influence,
    train: Callable[[jax.Array], Params],
    query: Losses,
    queries: Batch,
    *,
    subsets: int = 50,
    removed: float = 0.1,
    at_once: int = 16,
    key: Key | None = None,
) -> DatamodelScore:
    r"""The linear datamodelling score (LDS): retrain on random subsets, compare ranks.

    .. math:: \hat L(S) = L - ∑_{i ∉ S} scores_i

    Each subset S leaves out the same share of examples at random; the runs on the subsets are
    trained together, by ``vmap``.

    Args:
      found: of :func:`~bilevel.influence`; with ``per_query`` the score is a mean over queries.
      train: ``train(weights) -> params``, of :func:`~bilevel.retraining` or your own.
      query: ``query(params, batch) -> (q,)``, as ``influence`` evaluated it.
      queries: as there.
      subsets: number of retrained runs, at least 3.
      removed: share of the examples that each leaves out.
      at_once: how many are trained together.
      key: draws the subsets.

    Returns:
      :class:`DatamodelScore`, of NumPy arrays.

    Cost: ``subsets`` runs of training.

    Reference: Park et al., "TRAK: attributing model behavior at scale", ICML 2023.
    """
    if not isinstance(found, Influence):
        raise TypeError(
            f"`found` must be what `bilevel.influence` returned, got {type(found).__name__}."
        )
    check_takes("train", train, "train(weights)")
    check_takes("query", query, "query(params, batch)")
    check_count("subsets", subsets, 3)
    check_count("at_once", at_once)
    key = require_key(key, "datamodel_score")
    n = found.scores.shape[-1]
    out = round(n * removed) if 0 < removed < 1 else 0
    if not 1 <= out < n:
        raise ValueError(
            f"`removed` must be a share of the {n} examples between 0 and 1 that is at least one "
            f"example, got {removed}."
        )
    dtype = found.scores.dtype

    @jax.jit
    def run(train: Callable[[jax.Array], Params], queries: Batch, keys: Key) -> Any:
        def retrained(key: Key) -> Any:
            gone = jax.random.permutation(key, n) < out
            weights = jnp.where(gone, 0, 1).astype(dtype)
            return weights, query(train(weights), queries)

        return jax.lax.map(retrained, keys, batch_size=min(at_once, subsets))

    # What `train` carries, such as the training data, is an argument and not a constant.
    train = jax.tree_util.Partial(train)
    weights, actual = map(np.asarray, run(train, queries, jax.random.split(key, subsets)))
    scores = np.atleast_2d(found.scores)
    if found.scores.ndim == 1:
        actual = actual.mean(1, keepdims=True)
    predicted = np.atleast_1d(found.value) - (1 - weights) @ scores.T
    each = np.array([spearman(a, b) for a, b in zip(predicted.T, actual.T, strict=True)])
    return DatamodelScore(float(each.mean()), each, predicted, actual, weights > 0)


def spearman(a: Any, b: Any) -> float:
    """The rank correlation of two sequences; ties have their mean rank. NaN for a constant."""
    a, b = _ranks(np.asarray(a)), _ranks(np.asarray(b))
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
