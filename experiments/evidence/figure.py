"""The pictures of `evidence`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

NAMES = {
    "mnist": "MNIST",
    "mnist_rotated": "MNIST, rotated",
    "fashion_mnist": "Fashion-MNIST",
    "fashion_mnist_shifted": "Fashion-MNIST, shifted",
    "digits": "digits",
    "digits_rotated": "digits, rotated",
}
ARMS = {
    "none": ("precision 1", draw.GREY),
    "evidence": ("evidence, no validation data", draw.BLUE),
    "holdout": ("hold-out", draw.GOLD),
    "cross_validation": ("cross-validation", draw.ORANGE),
    "oracle": ("reference: further examples held out", draw.BLACK),
}
BOUNDS = {
    "full": "full",
    "groups": "cut between classes",
    "block": "cut into fifths",
    "independent": "cut between outputs",
    "independent_groups": "outputs and classes",
    "independent_block": "outputs and fifths",
    "diagonal": "every example and output",
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [
        _decays(records, out / "figures" / "decays.png"),
        _ranges(records, out / "figures" / "ranges.png"),
    ]


def _decays(records: list[record.Record], path: Path) -> Path:
    """Left: test loss of each way to choose decays. Right: the bounds of trained networks."""
    names = [n for n in NAMES if any(r.method == f"{n}_evidence" for r in records)]
    with draw.figure(path, columns=2, width=11.5, height=4.6) as (drawn, axes):
        points, bars = axes
        for place, name in enumerate(names):
            for j, (arm, (words, shade)) in enumerate(ARMS.items()):
                values = [r.metrics["test_loss"] for r in records if r.method == f"{name}_{arm}"]
                x = place + 0.16 * (j - 2)
                points.scatter(
                    np.full(len(values), x), values, s=24, color=shade,
                    label=words if place == 0 else None,
                )  # fmt: skip
        points.set_xticks(range(len(names)), [NAMES[n] for n in names])
        points.set_ylabel("test loss, nats")
        points.set_title("Decays per tensor: test loss by how they were chosen")
        drawn.legend(*points.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        for j, name in enumerate(names):
            rows = [r.metrics for r in records if r.method == f"{name}_bounds"]
            means = [np.mean([row[b] for row in rows]) for b in BOUNDS]
            bars.barh(
                np.arange(len(BOUNDS)) + 0.36 * (j - 0.5), means, 0.34,
                color=(draw.BLUE, draw.SKY)[j % 2], label=NAMES[name],
            )  # fmt: skip
        bars.set_yticks(range(len(BOUNDS)), BOUNDS.values())
        bars.invert_yaxis()
        bars.set_xlabel("negative log evidence per example, nats")
        bars.set_title("Each cut of the kernel raises the bound")
        bars.legend(loc="upper right")
    return path


def _ranges(records: list[record.Record], path: Path) -> Path:
    """Learned ranges along the outer steps, every seed; and what they bring in test."""
    names = [n for n in NAMES if any(r.method == f"{n}_ranges" for r in records)]
    shades = dict(zip(names, (draw.BLUE, draw.ORANGE, draw.GREEN, draw.PURPLE), strict=False))
    with draw.figure(path, columns=3, width=13.5, height=4.2) as (drawn, axes):
        for cell, metric, text in (
            (axes[0], "rotation", "greatest angle, degrees"),
            (axes[1], "shift", "greatest shift, pixels"),
        ):
            for name in names:
                _paths(cell, records, name, metric, shades[name])
            cell.set(xlabel="outer step", ylabel=text)
        axes[0].set_title("Rotations are found where there are any")
        axes[1].set_title("Shifts likewise")
        for j, name in enumerate(names):
            for k, arm in enumerate(("no_ranges", "ranges")):
                got = [r.metrics["test_error"] for r in records if r.method == f"{name}_{arm}"]
                axes[2].scatter(
                    np.full(len(got), j + 0.3 * (k - 0.5)), got, s=24,
                    color=(draw.GREY, shades[name])[k],
                )  # fmt: skip
        axes[2].set_xticks(range(len(names)), [NAMES[n].replace(", ", ",\n") for n in names])
        axes[2].tick_params(axis="x", labelsize=8)
        axes[2].set_ylabel("test error")
        axes[2].set_title("Without (grey) and with learned ranges")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return path


def _paths(cell: Any, records: list[record.Record], name: str, metric: str, shade: str) -> None:
    rows = [r for r in records if r.method == f"{name}_ranges_path"]
    for i, seed in enumerate(sorted({r.seed for r in rows})):
        mine = [r for r in rows if r.seed == seed]
        cell.plot(
            [r.step for r in mine], [r.metrics[metric] for r in mine], color=shade,
            label=NAMES[name] if i == 0 else None,
        )  # fmt: skip
