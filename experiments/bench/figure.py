"""Bars of time for every row and column, and the table as a page, from saved records."""

from pathlib import Path

import numpy as np

from experiments.bench import table
from experiments.bench.measure import COLUMNS
from experiments.common import figures as style
from experiments.common import record

COLOURS = (style.GREY, style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)


def figures(out: Path) -> list[Path]:
    """`time.png` (gradient-equivalents, logarithmic) and `table.md` of the first seed."""
    records = record.read(out)
    records = [r for r in records if r.seed == records[0].seed]
    (out / "table.md").write_text(table.markdown(records), "utf-8")
    names = list(dict.fromkeys(r.metrics["row"] for r in records))
    path = out / "time.png"
    width = 0.8 / len(COLUMNS)
    with style.figure(path, width=9.0, height=1.0 + 0.5 * len(names)) as (_, axes):
        for i, column in enumerate(COLUMNS):
            costs = {r.metrics["row"]: r.cost for r in records if r.metrics["column"] == column}
            heights = np.arange(len(names)) + (i - 2) * width
            values = [costs.get(name, np.nan) for name in names]
            name = "hand-written JAX" if column == "jax" else column
            axes.barh(heights, values, width, label=name, color=COLOURS[i])
        axes.set(xscale="log", xlabel="time / one gradient of the inner loss")
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.legend(loc="center right")
    return [path, out / "table.md"]
