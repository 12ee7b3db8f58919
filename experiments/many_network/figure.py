"""The picture of `many_network`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import expected, record
from experiments.common import figures as draw
from experiments.many_network.problem import GRANULARITY
from experiments.many_network.run import TENSOR

TITLES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
WORDS = {"none": "no prior", "chosen": "prior chosen"}
SHADES = {"none": draw.GREY, "chosen": draw.BLUE}
METRICS = {"test_loss": "test loss", "test_error": "test error"}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    names = [n for n in TITLES if any(r.method == f"{n}_one" for r in records)]
    rows = [(name, g) for name in names for g in (TENSOR, *GRANULARITY)][::-1]
    path = out / "figures" / "effects.png"
    height = 1.9 + 0.42 * len(rows)
    with draw.figure(path, columns=2, width=10.0, height=height) as (drawn, cells):
        for axes, (metric, title) in zip(cells, METRICS.items(), strict=True):
            _effects(axes, records, rows, metric)
            axes.set_xlabel(f"{title} against one searched decay")
        cells[1].set_yticklabels([])
        handles = cells[0].get_legend_handles_labels()
        drawn.legend(*handles, loc="outside lower center", ncols=2)
        drawn.suptitle("Many decays of a network need a prior: mean over draws, 95 % interval")
    return [path]


def _effects(axes: Any, records: list[record.Record], rows: Any, metric: str) -> None:
    """How a measure changes, in per cent, in each set and for each kind of decays."""
    for arm, shift in (("none", 0.16), ("chosen", -0.16)):
        at = [k for k, (_, g) in enumerate(rows) if g != TENSOR or arm == "none"]
        told = []
        for name, g in (rows[k] for k in at):
            method = f"{name}_{g}" if g == TENSOR else f"{name}_{g}_{arm}"
            told.append(expected.paired(records, metric, method, f"{name}_one", ratio=True))
        middles = np.array([100 * (t["mean"] - 1) for t in told])
        ends = [[100 * (t["mean"] - t["low"]), 100 * (t["high"] - t["mean"])] for t in told]
        axes.errorbar(
            middles, np.array(at) + shift, xerr=np.array(ends).T, fmt="o", markersize=5,
            color=SHADES[arm], elinewidth=2, label=WORDS[arm],
        )  # fmt: skip
    axes.axvline(0, color=draw.BLACK, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{TITLES[name]}, per {g}" for name, g in rows])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g} %" if x else "0")
