"""How far the numbers of a whole run can be trusted, in one line."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from bilevel.run.record import Record

FEW = 10  # steps below which a run has no course that could be judged
GROWTH = 100
JUMP = 10  # an update of a hyperparameter beyond so many times its size, and beyond so much


@dataclasses.dataclass(frozen=True)
class Trust:
    """How far the hypergradients of a run can be trusted: counts and quantiles over its steps.

    ``str(trust)`` is one line, and one more per notice. Quantiles are over the steps that have a
    finite number of the kind; None if there are none.

    Attributes:
      steps: number of steps judged: those in ``FitResult.history``.
      statuses: how many steps had each :class:`~bilevel.Status`, by name, most frequent first.
      nonfinite: steps that were not finite, and whose update was dropped.
      residual_median: median of ``residual_norm / rhs_norm``, the relative residual of the
        linear solve ...
      residual_90: ... and what nine tenths of the steps stayed at or below.
      stationarity_median: the same for ``relative_stationarity``: how far the parameters were
        from a minimum of the inner loss, relative to their length.
      stationarity_90: its 90 % quantile.
      notices: sentences on what looks wrong in the course of the losses and hypergradients.
    """

    steps: int
    statuses: dict[str, int]
    nonfinite: int
    residual_median: float | None
    residual_90: float | None
    stationarity_median: float | None
    stationarity_90: float | None
    notices: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.statuses.items()) or "no status"
        parts = [f"{self.steps} steps: {counts}"]
        if self.nonfinite:
            parts.append(f"{self.nonfinite} not finite, dropped")
        for name, median, high in (
            ("relative residual", self.residual_median, self.residual_90),
            ("relative stationarity", self.stationarity_median, self.stationarity_90),
        ):
            if median is not None:
                parts.append(f"{name} {median:.2g} (median), {high:.2g} (90 %)")
        return "; ".join(parts) + "".join(f"\n- {notice}" for notice in self.notices)


def trust_of(history: Sequence[Record], further: Sequence[str] = ()) -> Trust:
    """The judgement over the records of a run; ``further``: notices made elsewhere."""
    statuses = collections.Counter(r["status"] for r in history if "status" in r)
    residuals = [
        r["residual_norm"] / r["rhs_norm"]
        for r in history
        if "residual_norm" in r and r.get("rhs_norm", 0) != 0
    ]
    distances = [r["relative_stationarity"] for r in history if "relative_stationarity" in r]
    return Trust(
        len(history),
        dict(statuses.most_common()),
        sum("nonfinite" in r for r in history),
        *_quantiles(residuals),
        *_quantiles(distances),
        notices=(*jumps(history), *_notices(history), *further),
    )


def _notices(history: Sequence[Record]) -> list[str]:
    """What the first and the last tenth of a run tell when they are compared."""
    said = []
    grows = {
        "inner_loss": "the inner learning rate is too large, or inputs are not scaled",
        "outer_loss": "the outer learning rate is too large, the hyperparameters need bounds "
        "(`constrain=`), or the inner learning rate is too large",
        "hypergrad_norm": "hypergradients grow without bound: the inner training is not stable, "
        "or the response looks back too far (`Unroll` with fewer `steps`)",
    }
    for name, cause in grows.items():
        first, last = _ends([r[name] for r in history if name in r])
        if first is not None and last is not None and last > GROWTH * first > 0:
            said.append(f"`{name}` grew from {first:.2g} to {last:.2g}: {cause}.")
    norms = [r["hypergrad_norm"] for r in history if "hypergrad_norm" in r]
    if len(norms) >= FEW and not any(norms[-max(3, len(norms) // 10) :]):
        said.append(
            "`hypergrad_norm` ended at exactly zero: the losses no longer see the hyperparameters. "
            "They left their useful range (lower the outer learning rate, start elsewhere, or "
            "bound them with `constrain=`), or no parameter follows them."
        )
    pairs = [(r["outer_loss"], r["inner_loss"]) for r in history if "inner_loss" in r]
    if len(pairs) >= FEW and all(0 <= 2 * outer < inner for outer, inner in pairs):
        said.append(
            "the outer loss was below half of the inner loss at every step: expected where the "
            "inner loss has a penalty, dropout or label smoothing; otherwise `inner_data` and "
            "`outer_data` may be swapped, or share examples."
        )
    return said


def jumps(history: Sequence[Record], factor: float = JUMP) -> list[str]:
    """The first update that threw a hyperparameter far beyond its size, in words."""
    for old, new in itertools.pairwise(history):
        for path, value in old.get("hparams", {}).items():
            # A norm grows with the number of entries; an older log may have other names.
            if path.endswith("/norm") or path not in new.get("hparams", {}):
                continue
            before = np.ravel(np.asarray(value, float))
            after = np.ravel(np.asarray(new["hparams"][path], float))
            moved = np.abs(after - before) / np.maximum(1.0, np.abs(before))
            if moved.size and np.nanmax(moved, initial=0.0) > factor:
                k = int(np.nanargmax(moved))
                return [
                    f"one update (step {old['step']}) moved `{path}` from {before[k]:.3g} to "
                    f"{after[k]:.3g}: lower the outer learning rate, or bound the hyperparameters "
                    "(`constrain=`)."
                ]
    return []


def _ends(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Medians of the first and the last tenth, of at least three numbers each."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < FEW:
        return None, None
    k = max(3, len(finite) // 10)
    return float(np.median(finite[:k])), float(np.median(finite[-k:]))


def _quantiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None, None
    # An observed value, not one between two: nine tenths are at or below the second.
    median, high = np.quantile(finite, [0.5, 0.9], method="inverted_cdf")
    return float(median), float(high)
