"""The figures of `attribution`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

TITLES = {"mnist": "MNIST", "digits": "digits", "concrete": "concrete (regression)"}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [
        _predicted(records, out / "figures" / "predicted.png"),
        _ordering(records, out / "figures" / "ordering.png"),
    ]


def _predicted(records: list[record.Record], path: Path) -> Path:
    """One query of each data set, as predicted and as retrained: a point per subset."""
    sets = [name for name in TITLES if any(r.method == name for r in records)]
    with draw.figure(path, columns=len(sets), width=3.6 * len(sets) + 0.6, height=3.9) as (
        drawn,
        axes,
    ):
        for place, name in enumerate(sets):
            rows = [r.metrics for r in records if r.method == name]
            cell, one = np.atleast_1d(axes).ravel()[place], rows[0]
            cell.scatter(one["predicted"], one["actual"], s=14, color=draw.colour("cg"))
            low, high = min(one["actual"]), max(one["actual"])
            cell.plot([low, high], [low, high], color="0.5", linewidth=0.8)
            mean = np.mean([row["lds"] for row in rows])
            cell.set_title(f"{TITLES[name]}: rank correlation {mean:.3f}")
            what = "output for a query" if name == "concrete" else "query loss"
            cell.set_xlabel(f"{what}, predicted from scores")
            cell.set_ylabel(f"{what} after retraining")
        drawn.suptitle("Scores of a whole run predict what removing examples does")
    return path


def _ordering(records: list[record.Record], path: Path) -> Path:
    """Each way to train: its smoothness and what scores are worth there, means over seeds."""
    names = sorted({r.method for r in records if r.method.startswith("setting_")})

    def mean(name: str, metric: str) -> float:
        return float(np.mean([r.metrics[metric] for r in records if r.method == name]))

    with draw.figure(path, width=5.2, height=4.0) as (_, axes):
        cell = np.atleast_1d(axes).ravel()[0]
        cell.scatter(
            [mean(n, "metasmoothness") for n in names], [mean(n, "lds") for n in names],
            color=draw.colour("cg"),
        )  # fmt: skip
        cell.set_xlabel("metasmoothness")
        cell.set_ylabel("rank correlation of scores with retraining")
        cell.set_title("Scores are worth more where training is smoother")
    return path
