"""The pictures of `unem`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

METHODS = {
    "prototypes": ("nearest\nprototype", draw.GREY),
    "kmeans": ("γ = 0", draw.BROWN),
    "one": ("γ = 1", draw.ORANGE),
    "grid": ("best γ of\na grid", draw.BLACK),
    "grid_temperature": ("best γ, τ\nof a grid", draw.NAVY),
    "shared": ("one γ\nlearned", draw.PURPLE),
    "layers": ("10 γ\nlearned", draw.BLUE),
    "layers_temperatures": ("10 γ, 10 τ\nlearned", draw.GREEN),
}
SETS = {"mixture": "Gaussian mixture", "omniglot": "Omniglot"}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    sets = [name for name in SETS if any(r.method == f"{name}_grid" for r in records)]
    path = out / "figures" / "coefficients.png"
    columns = len(sets) + 1
    with draw.figure(path, columns=columns, width=5 * columns, height=4.6) as (_, axes):
        for place, name in zip(np.atleast_1d(axes), sets, strict=False):
            _accuracies(place, records, name)
        _learned(np.atleast_1d(axes)[-1], records, sets)
    return [path]


def _accuracies(axes: Any, records: list[record.Record], name: str) -> None:
    last = record.final(records)
    for i, (method, (_, shade)) in enumerate(METHODS.items()):
        key = f"{name}_{method}"
        values = [r.metrics["accuracy"] for (got, _), r in last.items() if got == key]
        axes.scatter(np.full(len(values), i), values, color=shade, s=24)
    axes.set_xticks(range(len(METHODS)), [text for text, _ in METHODS.values()], fontsize=7)
    axes.set_ylabel("accuracy on test episodes, %")
    axes.set_title(f"{SETS[name]}: queries of 5 of 20 classes")


def _learned(axes: Any, records: list[record.Record], sets: list[str]) -> None:
    """The coefficients of each layer, seed by seed, and those of the grid."""
    last = record.final(records)
    for name, shade in zip(sets, (draw.BLUE, draw.ORANGE), strict=False):
        chosen = [r.metrics["gamma"] for (got, _), r in last.items() if got == f"{name}_layers"]
        for i, gamma in enumerate(chosen):
            layers = np.arange(1, len(gamma) + 1)
            axes.plot(layers, gamma, color=shade, alpha=0.6, label=SETS[name] if i == 0 else None)
        grid = [r.metrics["gamma"] for (got, _), r in last.items() if got == f"{name}_grid"]
        if grid:
            axes.axhline(
                np.median(grid), color=shade, linestyle="--", label=f"{SETS[name]}, one from a grid"
            )
    axes.set_xlabel("layer")
    axes.set_ylabel("γ")
    axes.set_title("What is learned differs from layer to layer")
    axes.legend(fontsize=7)
