"""How strongly many hyperparameters hang together, chosen by examples that no loss reads."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bilevel.ground.settings import check_takes, is_function
from bilevel.objectives.folds import checked_split
from bilevel.objectives.hyper_prior import HyperPrior, check_strength

STRENGTHS = (math.inf, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""From exact sharing on down to what hardly holds."""


class StrengthChoice(NamedTuple):
    """What :func:`choose_strength` found.

    Attributes:
      prior: with the chosen strength: tune once more with it, on all examples.
      strength: the chosen one.
      strengths: the candidates, (S,).
      scores: (S, K), of each candidate on each split.
      means, standard_errors: (S,), over the splits; the error is NaN for one split.
    """

    prior: HyperPrior
    strength: float
    strengths: np.ndarray
    scores: np.ndarray
    means: np.ndarray
    standard_errors: np.ndarray


def choose_strength(
    prior: HyperPrior,
    tune: Callable[[HyperPrior, np.ndarray], Any],
    score: Callable[[Any, np.ndarray], Any],
    splits: Iterable[Any],
    *,
    strengths: Sequence[float] = STRENGTHS,
    rule: Literal["least", "one_standard_error"] = "least",
) -> StrengthChoice:
    r"""The strength of a :class:`HyperPrior` whose tuned hyperparameters do best on new examples.

    For each candidate and split, ``tune(prior, train)`` tunes and fits within the examples
    ``train`` (which it splits in its turn), and ``score(tuned, test)`` judges what it returns.
    With one split this is a third, test-like part; with several nested cross-validation.

    Args:
      prior: what is to get a strength.
      tune: ``tune(prior, train) -> anything``, with indices of examples.
      score: ``score(tuned, test) -> float``, less is better.
      splits: pairs (train, test) of index arrays, at least one.
      strengths: candidates, at least 0. ``float("inf")``, exact sharing, is the fallback.
      rule: ``"least"`` takes the least mean score, the stronger one of equals;
        ``"one_standard_error"`` the strongest whose scores are within one standard error of the
        best, split by split (it needs two splits).

    Raises:
      TypeError, ValueError: for splits, strengths and functions that do not fit, and for scores
        that are all not finite.

    Cost: one tuning per candidate and split, on the host one after the other. ``strength`` may be
    traced: where ``tune`` is pure, a ``vmap`` over ``prior.at(strength)`` does all at once.

    Example:
      >>> import jax.numpy as jnp, numpy as np, bilevel
      >>> prior = bilevel.objectives.HyperPrior(jnp.zeros(3), strength=1.0)
      >>> choice = bilevel.objectives.choose_strength(
      ...     prior, tune=lambda prior, train: prior.strength,
      ...     score=lambda strength, test: (strength - 1) ** 2,
      ...     splits=[([0, 1], [2])], strengths=(0.0, 1.0, float("inf")))
      >>> choice.strength
      1.0
    """
    for name, function, call in (
        ("tune", tune, "tune(prior, train)"),
        ("score", score, "score(tuned, test)"),
    ):
        if not is_function(function):
            raise TypeError(f"`{name}` must be a function {call}, got {function!r}.")
        check_takes(name, function, call)
    if rule not in ("least", "one_standard_error"):
        raise ValueError(f"`rule` must be 'least' or 'one_standard_error', got {rule!r}.")
    pairs = [checked_split(split, f"splits[{k}]") for k, split in enumerate(splits)]
    if not pairs or (rule == "one_standard_error" and len(pairs) < 2):
        raise ValueError(
            f"`splits` has {len(pairs)} pairs (train, test), expected at least "
            f"{1 if rule == 'least' else 2} for rule={rule!r}."
        )
    if not len(strengths):
        raise ValueError("`strengths` is empty: name at least one candidate.")
    for k, strength in enumerate(strengths):
        check_strength(f"strengths[{k}]", strength)
    order = sorted((float(s) for s in strengths), reverse=True)
    scores = np.array(
        [[float(score(tune(prior.at(s), train), test)) for train, test in pairs] for s in order]
    )
    best = _chosen(scores, rule)
    with np.errstate(invalid="ignore"):
        errors = (
            scores.std(axis=1, ddof=1) / np.sqrt(len(pairs))
            if len(pairs) > 1
            else np.full(len(order), np.nan)
        )
    return StrengthChoice(
        prior.at(order[best]), order[best], np.array(order), scores, scores.mean(axis=1), errors
    )


def _chosen(scores: np.ndarray, rule: str) -> int:
    """The row to take; rows are ordered from the strongest prior on, and NaN never wins."""
    means = np.where(np.isfinite(scores).all(axis=1), scores.mean(axis=1), np.inf)
    best = int(np.argmin(means))
    if not np.isfinite(means[best]):
        raise ValueError(
            "no strength has finite scores on every split: look at what `tune` and `score` return."
        )
    if rule == "least":
        return best
    with np.errstate(invalid="ignore"):
        gaps = scores - scores[best]
        errors = gaps.std(axis=1, ddof=1) / np.sqrt(scores.shape[1])
        near = np.isfinite(means) & (gaps.mean(axis=1) <= errors)
    return int(np.argmax(near))
