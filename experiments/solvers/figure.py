"""The pictures of `solvers`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.solvers.config import METHODS

TITLES = {
    "quadratic": "quadratic",
    "ijcnn1": "logistic regression, ijcnn1",
    "covtype": "softmax regression, covtype",
}
NAMES: dict[str, str] = {
    "soba": "SOBA", "saba": "SABA", "fsla": "FSLA", "srba": "SRBA", "spaba": "SPABA",
    "mrbo": "MRBO", "stocbio": "stocBiO", "amigo": "AmIGO", "f2sa": "F2SA",
    "pbgd": "PBGD", "bome": "BOME", "saba_momentum": "SABA, momentum",
}  # fmt: skip
COLOURS: dict[str, str] = dict(
    zip(METHODS[:-1], (*draw.OTHERS, draw.BROWN, draw.GREY, draw.BLACK), strict=True)
)
COLOURS["saba_momentum"] = COLOURS["saba"]
DASHED = ("mrbo", "stocbio", "amigo", "f2sa", "bome")  # they sum a series or train in between
DOTTED = ("saba_momentum",)


def figures(out: Path) -> list[Path]:
    """The gradient of the value function against oracle calls, and against time."""
    records = record.read(out)
    return [_curves(records, out / "figures" / "gradients.png")]


def _curves(records: list[record.Record], path: Path) -> Path:
    known = {r.method for r in records}
    problems = [name for name in TITLES if any(m.startswith(name + "_") for m in known)]
    size: Any = dict(rows=2, columns=len(problems), width=1.5 + 4.2 * len(problems), height=8.3)
    with draw.figure(path, **size) as (fig, axes):
        axes = np.asarray(axes).reshape(2, -1)
        for column, name in zip(axes.T, problems, strict=True):
            for method in METHODS:
                chosen = [r for r in records if r.method == f"{name}_{method}"]
                for axis, x in zip(column, ("cost", "seconds"), strict=True):
                    _line(axis, chosen, method, x)
            column[0].set(title=TITLES[name], xlabel="oracle calls (inner gradients)")
            column[1].set(xlabel="seconds")
        for row in axes:
            row[0].set_ylabel("squared gradient of the value function")
        # Below the panels: lines go everywhere in them.
        handles, names = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, names, ncols=6, loc="outside lower center")
    return path


def _dashes(method: str) -> str:
    return "--" if method in DASHED else ":" if method in DOTTED else "-"


def _line(axis: Any, chosen: list[record.Record], method: str, x: str) -> None:
    """The median over seeds, and their range."""
    runs: dict[int, list[record.Record]] = {}
    for r in chosen:
        if r.step:  # the axes are logarithmic
            runs.setdefault(r.seed, []).append(r)
    if not runs:
        return
    gradients = np.array([[r.metrics["gradient"] for r in run] for run in runs.values()])
    where = [
        [r.cost if x == "cost" else r.metrics["seconds"] for r in run] for run in runs.values()
    ]
    where = np.median(np.array(where), axis=0)
    style = dict(color=COLOURS[method], linestyle=_dashes(method))
    axis.plot(where, np.median(gradients, axis=0), label=NAMES[method], **style)
    low, high = gradients.min(axis=0), gradients.max(axis=0)
    axis.fill_between(where, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
    axis.set(xscale="log", yscale="log")
