"""Time ratios of every row and column, and the table as a page, from saved records."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.bench import table
from experiments.bench.measure import COLUMNS
from experiments.common import figures as style
from experiments.common import record

# The hand-written one is the line at 1.
COLOURS = dict(zip(COLUMNS[1:], (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE), strict=True))


def figures(out: Path) -> list[Path]:
    """`time.png` (ratios to hand-written JAX, logarithmic) and `table.md` of the first seed."""
    records = record.read(out)
    records = [r for r in records if r.seed == records[0].seed]
    (out / "table.md").write_text(table.markdown(records), "utf-8")
    path = out / "time.png"
    ratios(records, path)
    return [path, out / "table.md"]


def ratios(records: Sequence[record.Record], path: Path) -> None:
    """A dot for each library, with the range of the ratios of single rounds.

    Without W7, whose ratios are to training alone.
    """
    measured = [
        r
        for r in records
        if r.metrics["column"] in COLOURS
        and np.isfinite(r.metrics.get("time_ratio", np.nan))
        and not r.metrics["row"].startswith("w7")
    ]
    names = list(dict.fromkeys(r.metrics["row"] for r in measured))
    with style.figure(path, width=9.0, height=1.2 + 0.24 * len(names)) as (_, axes):
        axes.axvline(1.0, color=style.BLACK, linewidth=1)
        axes.axvspan(1 / 1.05, 1.05, color=style.GREY, alpha=0.18, linewidth=0)
        for place, (column, shade) in enumerate(COLOURS.items()):
            chosen = [r for r in measured if r.metrics["column"] == column]
            heights = [names.index(r.metrics["row"]) + 0.14 * (place - 1.5) for r in chosen]
            values = [r.metrics["time_ratio"] for r in chosen]
            ends = [
                (r.metrics.get("time_ratio_low", x), r.metrics.get("time_ratio_high", x))
                for r, x in zip(chosen, values, strict=True)
            ]
            if ends:
                axes.hlines(heights, *np.transpose(ends), color=shade, linewidth=1.5, alpha=0.6)
            axes.plot(values, heights, "o", markersize=5, color=shade, label=column)
        ticks = [0.5, 0.7, 1, 1.5, 2, 3, 4]
        axes.set(
            xscale="log",
            xlabel="time / that of hand-written JAX (grey: within 5 %)",
            title="Left of 1 is faster than by hand",
        )
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.legend(loc="lower right")
