"""How far the numbers of a whole run can be trusted, in one line."""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bilevel.run.record import Record


@dataclasses.dataclass(frozen=True)
class Trust:
    """How far the hypergradients of a run can be trusted: counts and quantiles over its steps.

    ``str(trust)`` is one line. Quantiles are over the steps that have a finite number of the
    kind; None if there are none.

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
    """

    steps: int
    statuses: dict[str, int]
    nonfinite: int
    residual_median: float | None
    residual_90: float | None
    stationarity_median: float | None
    stationarity_90: float | None

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
        return "; ".join(parts)


def trust_of(history: Sequence[Record]) -> Trust:
    """The judgement over the records of a run."""
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
    )


def _quantiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None, None
    # An observed value, not one between two: nine tenths are at or below the second.
    median, high = np.quantile(finite, [0.5, 0.9], method="inverted_cdf")
    return float(median), float(high)
