"""The picture of `pretrain`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

ARMS = {
    "scratch": ("no pre-training", draw.GREY),
    "uniform": ("uniform weights", draw.BLACK),
    "learned": ("learned weights", draw.BLUE),
    "useful_only": ("only the useful tasks", draw.BROWN),
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    return [_both(record.read(out), out / "figures" / "results.png")]


def _both(records: list[record.Record], path: Path) -> Path:
    """Left: weights of the tasks along one run. Right: test error, a point per seed."""
    with draw.figure(path, columns=2, width=11.0, height=4.2) as (_, axes):
        way, points = axes
        first = min(r.seed for r in records)
        rows = [r for r in records if r.method == "path" and r.seed == first]
        steps = [r.step for r in rows]
        values = np.array([r.metrics["weights"] for r in rows])
        useful = _useful(records)
        for i, column in enumerate(values.T):
            kind = i < useful
            way.plot(
                steps, column, color=draw.BLUE if kind else draw.ORANGE, linewidth=1.2,
                label={0: "a class (useful)", useful: "a pattern (useless)"}.get(i),
            )  # fmt: skip
        way.set(xlabel="outer step", ylabel="weight of a task", yscale="log")
        way.set_title(f"Weights of the tasks (seed {first})")
        way.legend(loc="lower left")
        last = record.final(records)
        seeds = sorted({seed for name, seed in last if name == "learned"})
        grid = np.array([[last[a, s].metrics["test_error"] for a in ARMS] for s in seeds])
        for row in grid:
            points.plot(range(len(ARMS)), row, color="0.85", linewidth=0.8, zorder=1)
        for j, (_, shade) in enumerate(ARMS.values()):
            points.scatter(np.full(len(seeds), j), grid[:, j], s=18, color=shade, zorder=2)
            points.plot([j - 0.2, j + 0.2], [grid[:, j].mean()] * 2, color=shade, zorder=3)
        points.set_xticks(range(len(ARMS)), [w.replace(" ", "\n", 1) for w, _ in ARMS.values()])
        points.set_ylabel("test error after fine-tuning")
        points.set_title("The learned weights help, seed by seed")
    return path


def _useful(records: list[record.Record]) -> int:
    """How many tasks are useful: those to which `useful_only` gives a weight."""
    row = next(r for r in records if r.method == "useful_only")
    return int(np.sum(np.array(row.metrics["weights"]) > 1e-3))
