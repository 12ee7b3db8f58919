"""What the second part of `stn_ptb` adds to the statistics: the best fixed rate."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common import expected, record


def grid_methods(records: Sequence[record.Record]) -> list[str]:
    """The names of the fixed rates."""
    return sorted({r.method for r in records if r.method.startswith("starts_grid_")})


def summary(records: Sequence[record.Record]) -> dict[str, Any]:
    """The fixed rate of the lowest mean validation loss, as the method `starts_grid`."""
    ends = record.final(records)

    def mean(name: str) -> float:
        found = [r.metrics["validation_loss"] for (method, _), r in ends.items() if method == name]
        return float(np.mean(found))

    chosen = min(grid_methods(records), key=mean)
    return {"starts_grid": expected.summarise(r for r in records if r.method == chosen)[chosen]}
