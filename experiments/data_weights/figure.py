"""The figure of `data_weights`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

COLOURS = {
    "uniform": draw.GREY,
    "learned": draw.BLUE,
    "filtered": draw.BLACK,
    "clean": draw.GREEN,
}
NAMES = {
    "uniform": "all windows alike",
    "learned": "learned weights",
    "filtered": "filtered by a model of the held-out text",
    "clean": "clean ones only (not known)",
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    path = out / "figures" / "data_weights.png"
    with draw.figure(path, width=5.4, height=4.0) as (_, axes):
        cell = np.atleast_1d(axes).ravel()[0]
        for arm, colour in COLOURS.items():
            curves = [r.metrics["curve"] for r in records if r.method == arm]
            part = np.linspace(0, 1, len(curves[0]) + 1)[1:]
            cell.plot(part, np.mean(curves, 0), color=colour, label=NAMES[arm])
        cell.set_xlabel("part of the run")
        cell.set_ylabel("test loss (nats per character)")
        cell.legend()
        cell.set_title("Half of the text is shuffled; learned weights leave it out")
    return [path]
