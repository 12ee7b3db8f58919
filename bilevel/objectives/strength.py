"""How strongly many hyperparameters hang together, chosen by examples that no loss reads."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bilevel.ground.settings import check_one_real, check_takes, is_function
from bilevel.objectives.folds import checked_split
from bilevel.objectives.hyper_prior import HyperPrior, check_strength

RULES = ("least", "one_standard_error", "clearly_better")

STRENGTHS = (math.inf, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""From exact sharing on down to what hardly holds."""


class StrengthChoice(NamedTuple):
    """What :func:`choose_strength` found.

    Attributes:
      prior: with the chosen strength: tune once more with it, on all examples.
      strength: the chosen one.
      strengths: the candidates, (S,), from the strongest on.
      scores: (S, K), of each candidate on each split.
      means, standard_errors: (S,), over the splits; the error is NaN for one split.
      gains: (S,), by how much the mean score is below that of the strongest candidate.
      gain_errors: (S,), their standard errors: of paired differences between examples where
        ``score`` returns one loss each, else between splits (NaN for one split).
    """

    prior: HyperPrior
    strength: float
    strengths: np.ndarray
    scores: np.ndarray
    means: np.ndarray
    standard_errors: np.ndarray
    gains: np.ndarray
    gain_errors: np.ndarray


def choose_strength(
    prior: HyperPrior,
    tune: Callable[[HyperPrior, np.ndarray], Any],
    score: Callable[[Any, np.ndarray], Any],
    splits: Iterable[Any],
    *,
    strengths: Sequence[float] = STRENGTHS,
    rule: Literal["least", "one_standard_error", "clearly_better"] = "least",
    errors: float = 1.0,
) -> StrengthChoice:
    r"""The strength of a :class:`HyperPrior` whose tuned hyperparameters do best on new examples.

    For each candidate and split, ``tune(prior, train)`` tunes and fits within the examples
    ``train`` (which it splits in its turn), and ``score(tuned, test)`` judges what it returns.
    With one split this is a third, test-like part; with several nested cross-validation.

    Args:
      prior: what is to get a strength.
      tune: ``tune(prior, train) -> anything``, with indices of examples.
      score: ``score(tuned, test)``, less is better: one number, or one loss per example of
        ``test``, which tells far better how sure a difference is.
      splits: pairs (train, test) of index arrays, at least one.
      strengths: candidates, at least 0. ``float("inf")``, exact sharing, is the fallback.
      rule: ``"least"`` takes the least mean score, the stronger one of equals;
        ``"one_standard_error"`` the strongest whose scores are within ``errors`` standard errors
        of the best; ``"clearly_better"`` the best if it is more than ``errors`` standard errors
        better than the strongest candidate, else that one. Standard errors are of paired
        differences; the last two rules need two splits or a loss per example.
      errors: how many standard errors.

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
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(map(repr, RULES))}, got {rule!r}.")
    check_one_real("errors", errors, 0)
    pairs = [checked_split(split, f"splits[{k}]") for k, split in enumerate(splits)]
    if not pairs:
        raise ValueError("`splits` has 0 pairs (train, test), expected at least 1.")
    if not len(strengths):
        raise ValueError("`strengths` is empty: name at least one candidate.")
    for k, strength in enumerate(strengths):
        check_strength(f"strengths[{k}]", strength)
    order = sorted((float(s) for s in strengths), reverse=True)
    alone = rule != "least" and len(pairs) == 1
    losses = [
        [_judged(score(tune(prior.at(s), train), test), test, alone) for train, test in pairs]
        for s in order
    ]
    scores = np.array([[np.mean(split) for split in row] for row in losses])
    best = _chosen(losses, scores, rule, errors)
    gains, gain_errors = _gaps(losses, 0)
    return StrengthChoice(
        prior.at(order[best]),
        order[best],
        np.array(order),
        scores,
        scores.mean(axis=1),
        _standard_error(scores),
        -gains,
        gain_errors,
    )


def _judged(losses: Any, test: np.ndarray, alone: bool) -> np.ndarray:
    """One number, or one per example, which a single split with standard errors needs."""
    array = np.asarray(losses, np.float64)
    if alone and not array.ndim:
        raise ValueError(
            "`splits` has 1 pair (train, test) and `score` returns one number, of which there is "
            "no standard error: return one loss per tested example, or pass two splits."
        )
    if array.shape not in ((), (len(test),)):
        raise ValueError(
            f"`score` returned an array of shape {array.shape}, expected one number, or one loss "
            f"per tested example: ({len(test)},)."
        )
    return array


def _chosen(losses: list[list[np.ndarray]], scores: np.ndarray, rule: str, errors: float) -> int:
    """The row to take; rows are ordered from the strongest prior on, and NaN never wins."""
    means = np.where(np.isfinite(scores).all(axis=1), scores.mean(axis=1), np.inf)
    best = int(np.argmin(means))
    if not np.isfinite(means[best]):
        raise ValueError(
            "no strength has finite scores on every split: look at what `tune` and `score` return."
        )
    if rule == "least":
        return best
    if rule == "clearly_better":
        strongest = int(np.argmax(np.isfinite(means)))
        gaps, error = _gaps(losses, strongest)
        return best if -gaps[best] > errors * error[best] else strongest
    gaps, error = _gaps(losses, best)
    return int(np.argmax(np.isfinite(means) & (gaps <= errors * error)))


def _gaps(losses: list[list[np.ndarray]], base: int) -> tuple[np.ndarray, np.ndarray]:
    """How much more each row loses than ``base``, and the standard errors of that."""
    with np.errstate(invalid="ignore"):
        paired = [[a - b for a, b in zip(row, losses[base], strict=True)] for row in losses]
        means = np.array([[np.mean(split) for split in row] for row in paired])
        if not all(split.ndim for row in losses for split in row):
            return means.mean(axis=1), _standard_error(means)
        # Splits of other sizes aside, the mean over the splits is that over the examples.
        return means.mean(axis=1), _standard_error(np.array([np.concatenate(r) for r in paired]))


def _standard_error(rows: np.ndarray) -> np.ndarray:
    """Of the mean of each row; NaN where it is of one number."""
    count = rows.shape[1]
    if count < 2:
        return np.full(len(rows), np.nan)
    with np.errstate(invalid="ignore"):
        return rows.std(axis=1, ddof=1) / np.sqrt(count)
