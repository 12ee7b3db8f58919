"""The pictures of `decay`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator

from experiments.common import figures as draw
from experiments.common import record

WORDS = {
    "no_tuning": "not tuned",
    "grid": "grid",
    "random_search": "random search",
    "tpe": "TPE",
    "tuned_one": "one decay",
    "tuned_per_layer": "a decay per layer",
    "tuned_per_unit": "a decay per unit",
    "tuned_per_weight": "a decay per weight",
    "tuned_per_unit_stopped": "per unit, stopped early",
    "tuned_per_weight_stopped": "per weight, stopped early",
}
SHADES = {
    "tuned_one": draw.SKY,
    "tuned_per_layer": draw.BLUE,
    "tuned_per_unit": draw.GREEN,
    "tuned_per_weight": draw.ORANGE,
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [
        _results(records, out / "figures" / "results.png"),
        _paths(records, out / "figures" / "overfitting.png"),
    ]


def _shade(method: str) -> str:
    return SHADES.get(method.removesuffix("_stopped"), draw.GREY)


def _results(records: list[record.Record], path: Path) -> Path:
    """A line for each method: a dot for each seed, a bar at their mean."""
    last = record.final(records)
    methods = [m for m in WORDS if any(name == m for name, _ in last)]
    panels = {
        "validation_loss": "validation loss (nats)",
        "test_loss": "test loss (nats)",
        "test_error": "test error",
        "both_test_error": "test error, training on\ntrain and validation",
    }
    with draw.figure(path, columns=len(panels), width=14.0, height=4.6) as (_, axes):
        for cell, (metric, title) in zip(axes, panels.items(), strict=True):
            for row, method in enumerate(methods):
                values = [r.metrics[metric] for (name, _), r in last.items() if name == method]
                hollow = method.endswith("_stopped")
                cell.plot(
                    values,
                    [row] * len(values),
                    "o",
                    color=_shade(method),
                    markerfacecolor="white" if hollow else _shade(method),
                    markersize=7,
                )
                cell.plot([np.mean(values)] * 2, [row - 0.35, row + 0.35], color=_shade(method))
            cell.set(title=title, yticks=range(len(methods)))
            cell.set_yticklabels([WORDS[m] for m in methods] if cell is axes[0] else [])
            cell.invert_yaxis()
    return path


def _paths(records: list[record.Record], path: Path) -> Path:
    """Validation and test loss of the network that trains while its decays are tuned."""
    methods = [m for m in SHADES if any(r.method == f"{m}_path" for r in records)]
    parts = {"fitted": ("validation loss", "-"), "test": ("test loss", "-")}
    with draw.figure(path, columns=2, width=11.0, height=4.2) as (_, axes):
        for cell, (part, (title, line)) in zip(axes, parts.items(), strict=True):
            for method in methods:
                _line(cell, records, method, f"{part}_loss", line)
            cell.set(title=f"{title} (nats)", xlabel="cost (inner-gradient evaluations)")
            cell.set_yscale("log")
            cell.yaxis.set_major_formatter("{x:g}")
            cell.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
            cell.yaxis.set_minor_formatter("{x:g}")
        axes[0].legend()
    return path


def _line(cell: Any, records: list[record.Record], method: str, metric: str, line: str) -> None:
    chosen = [r for r in records if r.method == f"{method}_path"]
    costs = sorted({r.cost for r in chosen})
    values = np.array([[r.metrics[metric] for r in chosen if r.cost == c] for c in costs])
    cell.plot(costs, np.median(values, 1), line, color=SHADES[method], label=WORDS[method])
    cell.fill_between(
        costs, values.min(1), values.max(1), color=SHADES[method], alpha=0.15, linewidth=0
    )
