"""The pictures of `hyperlista`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

METHODS = {
    "ista": ("ISTA\n2 scalars", draw.GREY),
    "fista": ("FISTA\n2 scalars", draw.BROWN),
    "lista": ("LISTA\n15 016 numbers", draw.ORANGE),
    "hyperlista_grid": ("HyperLISTA\nby grid", draw.BLACK),
    "hyperlista": ("HyperLISTA\n3 scalars", draw.BLUE),
    "hyperlista_layers": ("HyperLISTA\n48 scalars", draw.GREEN),
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    path = out / "figures" / "recovery.png"
    with draw.figure(path, columns=2, width=11.5, height=4.8) as (_, axes):
        _errors(axes[0], records)
        _ways(axes[1], records)
    return [path]


def _errors(axes: Any, records: list[record.Record]) -> None:
    """Errors of all solvers and dictionaries, on the tuned distribution and on a denser one."""
    last = record.final(records)
    for i, (method, (_, shade)) in enumerate(METHODS.items()):
        for metric, marker, shift in (("nmse_db", "o", -0.15), ("shifted_db", "^", 0.15)):
            values = [r.metrics[metric] for (name, _), r in last.items() if name == method]
            axes.scatter(np.full(len(values), i + shift), values, color=shade, marker=marker, s=22)
    axes.scatter([], [], color=draw.BLACK, marker="o", label="as tuned")
    axes.scatter([], [], color=draw.BLACK, marker="^", label="codes half as dense again")
    axes.set_xticks(range(len(METHODS)), [text for text, _ in METHODS.values()], fontsize=7)
    axes.set_ylabel("normalized squared error of new codes, dB")
    axes.set_title("Three scalars recover codes better than ISTA and FISTA")
    axes.legend()


def _ways(axes: Any, records: list[record.Record]) -> None:
    """The training error along the steps of Adam, mean over seeds."""
    for method, (text, shade) in METHODS.items():
        rows = [r for r in records if r.method == f"{method}_path"]
        steps = sorted({r.step for r in rows})
        if steps:
            means = [np.mean([r.metrics["nmse_db"] for r in rows if r.step == s]) for s in steps]
            axes.plot(steps, means, color=shade, label=text.replace("\n", ", "))
    axes.set_xscale("log")
    axes.set_xlabel("steps of Adam, each on 128 new codes")
    axes.set_ylabel("error of the training batch, dB")
    axes.set_title("... and are tuned in a tenth of LISTA's steps")
    axes.legend(fontsize=7)
