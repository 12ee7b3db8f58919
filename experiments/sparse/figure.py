"""The pictures of `sparse`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator

from experiments.common import figures as draw
from experiments.common import record
from experiments.sparse.run import METHODS, summary

TASKS = {
    "lasso": "lasso, 1 penalty\n(housing, 5 folds)",
    "elastic_net": "elastic net, 2 penalties\n(diabetes, 5 folds)",
    "logistic": "sparse logistic, 1 penalty\n(newsgroups, hold-out)",
    "classes": "softmax, a penalty per class\n(Fashion-MNIST, hold-out)",
    "weighted": "lasso, a penalty per feature\n(housing, 5 folds)",
}
WORDS = {
    "hypergradient": "hypergradients",
    "grid": "grid, 100 points",
    "random_search": "random search",
    "tpe": "TPE",
    "scikit_learn": "scikit-learn CV",
}
SHADES = {
    "hypergradient": draw.BLUE,
    "grid": draw.GREY,
    "random_search": draw.BLACK,
    "tpe": draw.BROWN,
    "scikit_learn": draw.ORANGE,
}
PANELS = {
    "criterion": "criterion\n(what is tuned)",
    "full_test_loss": "test loss",
    "cost": "cost in gradients",
    "seconds": "seconds",
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [
        _results(records, out / "figures" / "results.png"),
        _paths(records, out / "figures" / "cost.png"),
    ]


def _results(records: list[record.Record], path: Path) -> Path:
    """Every method over the grid: mean of the ratios over seeds, and its 95 % interval."""
    told = summary(records)
    rows = [
        (task, method)
        for task in TASKS
        for method in METHODS
        if method != "grid" and f"{task}_{method}_over_grid" in told
    ]
    gaps = np.cumsum([i > 0 and rows[i][0] != rows[i - 1][0] for i in range(len(rows))])
    places = np.arange(len(rows)) + 0.8 * gaps
    with draw.figure(path, columns=len(PANELS), width=14.0, height=1.6 + 0.34 * len(rows)) as (
        drawn,
        axes,
    ):
        for cell, (metric, title) in zip(axes, PANELS.items(), strict=True):
            for place, (task, method) in zip(places, rows, strict=True):
                ratio = told[f"{task}_{method}_over_grid"][metric]
                if not np.isfinite(ratio["mean"]):
                    continue
                low = max(ratio["low"], ratio["min"] / 2)
                shade = SHADES[method]
                cell.plot([low, ratio["high"]], [place, place], color=shade, linewidth=2.5)
                cell.plot(ratio["mean"], place, "o", color=shade, markersize=7)
            cell.axvline(1.0, color=draw.GREY, linewidth=1.2)
            cell.set_yticks(places)
            cell.set_yticklabels([WORDS[m] for _, m in rows] if cell is axes[0] else [])
            cell.set(title=title, ylim=(places[-1] + 0.7, -0.7))
            if metric in ("cost", "seconds"):
                cell.set_xscale("log")
            cell.set_xlabel("relative to the grid")
        for task in dict.fromkeys(task for task, _ in rows):
            inside = [p for p, (t, _) in zip(places, rows, strict=True) if t == task]
            axes[0].annotate(
                TASKS[task], (-0.62, float(np.mean(inside))), annotation_clip=False, va="center",
                xycoords=("axes fraction", "data"), ha="right",
            )  # fmt: skip
        drawn.suptitle("Left of the line: better, or cheaper, than the grid (95 % intervals)")
    return path


def _paths(records: list[record.Record], path: Path) -> Path:
    """The best criterion so far against cost, relative to the grid's best."""
    told = {r.method for r in records}
    tasks = [task for task in TASKS if f"{task}_grid" in told]
    with draw.figure(path, columns=len(tasks), width=3.4 * len(tasks) + 0.6, height=4.2) as (
        _,
        axes,
    ):
        for cell, task in zip(np.atleast_1d(axes), tasks, strict=True):
            for method in METHODS:
                _line(cell, records, task, method)
            cell.set(title=TASKS[task], xscale="log", yscale="log", xlabel="cost (gradients)")
            ceiling = 1.5
            cell.set_ylim(None, ceiling)
            cell.yaxis.set_minor_locator(NullLocator())
            cell.set_yticks([y for y in (0.8, 0.9, 1.0, 1.1, 1.2, 1.5) if y >= cell.get_ylim()[0]])
            cell.yaxis.set_major_formatter("{x:g}")
        first = np.atleast_1d(axes)[0]
        first.set_ylabel("best criterion so far / grid's best")
        first.legend(loc="upper right")
    return path


def _line(cell: Any, records: list[record.Record], task: str, method: str) -> None:
    grids = {r.seed: r.metrics for r in records if r.method == f"{task}_grid"}
    scaled = [
        r._replace(metrics={"criterion": r.metrics["criterion"] / grids[r.seed]["measured"]})
        for r in records
        if r.method == f"{task}_{method}_path"
        and r.seed in grids
        and r.metrics.get("counts", True)  # not those of looser solves
    ]
    if method == "scikit_learn":
        ends = [r for r in records if r.method == f"{task}_{method}" and r.seed in grids]
        ratios = [r.metrics["criterion"] / grids[r.seed]["criterion"] for r in ends]
        if ends and np.isfinite(np.median([r.cost for r in ends])):
            cost = np.median([r.cost for r in ends])
            cell.plot(cost, np.median(ratios), "D", color=SHADES[method], label=WORDS[method])
        return
    if not scaled:
        return
    cost, values = _stretched(scaled)
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    cell.step(cost, middle, where="post", color=SHADES[method], label=WORDS[method])
    cell.fill_between(cost, low, high, step="post", color=SHADES[method], alpha=0.18, linewidth=0)
    cell.plot(cost[-1], middle[-1], "o", color=SHADES[method], markersize=5)


NOTHING = 1e3


def _stretched(records: list[record.Record]) -> tuple[np.ndarray, np.ndarray]:
    """Best so far on one grid of costs up to the median seed's end: a seed that ended stays."""
    seeds = sorted({r.seed for r in records})
    series = [np.array([(r.cost, r.metrics["criterion"]) for r in records if r.seed == s]).T
              for s in seeds]  # fmt: skip
    start, stop = (
        float(np.median([c[0] for c, _ in series])),
        float(np.median([c[-1] for c, _ in series])),
    )
    grid = np.geomspace(start, max(stop, start), 200)
    # Before its first point a seed has nothing: worse than all.
    rows = [
        np.append(np.fmin.accumulate(v), NOTHING)[np.searchsorted(c, grid, side="right") - 1]
        for c, v in series
    ]
    return grid, np.stack(rows)
