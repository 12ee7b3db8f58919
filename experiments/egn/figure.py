"""The pictures of `egn`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

METHODS = {
    "sgd": ("SGD", draw.GREY),
    "momentum": ("SGD with momentum", draw.BLACK),
    "adam": ("Adam", draw.ORANGE),
    "lbfgs": ("L-BFGS, all rows", draw.BROWN),
    "sgn": ("Gauss–Newton by CG", draw.GREEN),
    "egn": ("Gauss–Newton, exact", draw.BLUE),
}
TASKS = {"digits": "Digits: cross-entropy", "housing": "California housing: squared error"}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    tasks = [name for name in TASKS if any(r.method == f"{name}_egn" for r in records)]
    path = out / "figures" / "training.png"
    with draw.figure(path, columns=2 * len(tasks), width=9.5 * len(tasks), height=4.4) as (_, axes):
        for i, task in enumerate(tasks):
            _curves(axes[2 * i], records, task, time=False)
            _curves(axes[2 * i + 1], records, task, time=True)
    return [path]


def _curves(axes: Any, records: list[record.Record], task: str, time: bool) -> None:
    """The training loss of all seeds, over epochs or seconds."""
    for method, (text, shade) in METHODS.items():
        rows = [r for r in records if r.method == f"{task}_{method}_path"]
        for i, seed in enumerate(sorted({r.seed for r in rows})):
            mine = [r for r in rows if r.seed == seed]
            along = [r.cost if time else r.metrics["epoch"] for r in mine]
            losses = [np.maximum(r.metrics["loss"], 1e-8) for r in mine]
            axes.plot(along, losses, color=shade, alpha=0.5, label=text if i == 0 else None)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds" if time else "epochs")
    axes.set_ylabel("training loss")
    axes.set_title(TASKS[task])
    axes.legend(fontsize=7)
