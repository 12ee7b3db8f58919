"""One look for all figures: a quiet style, and one colour for a method wherever it appears.

Figures are drawn from saved records by the Agg backend, so they need no display. The palette is
that of Okabe and Ito (Color Universal Design, 2008), safe for the common kinds of colour blindness.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import matplotlib
import numpy as np

from experiments.common.outputs import RunnerError
from experiments.common.record import Record

matplotlib.use("Agg")

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, GOLD, BLACK, GREY = "#56B4E9", "#E69F00", "#000000", "#8A8A8A"
BROWN, NAVY, OLIVE = "#7F4F24", "#332288", "#6B7A12"

# Baselines are grey or black, so that the methods under test stand out.
COLOURS = {
    "none": GREY,
    "no_tuning": GREY,
    "random_search": BLACK,
    "tpe": BROWN,
    "cg": BLUE,
    "cg_per_weight_stopped": GOLD,
    "neumann": ORANGE,
    "nystrom": PURPLE,
    "woodbury": NAVY,
    "stochastic": GOLD,
    "identity": SKY,
    "dense": OLIVE,
    "unroll": GREEN,
    "truncated": OLIVE,
    "evolution": GOLD,
    "stn": GREEN,
    "delta_stn": PURPLE,
}
OTHERS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GOLD, NAVY, OLIVE)

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "image.cmap": "viridis",
    "svg.hashsalt": "experiments",
    "svg.fonttype": "none",
}


def colour(method: str) -> str:
    """The colour of a method; `cg_per_weight` has that of `cg`, an unknown name a stable one."""
    name = method
    while name:
        if name in COLOURS:
            return COLOURS[name]
        name = name.rpartition("_")[0]
    return OTHERS[crc32(method.encode()) % len(OTHERS)]


def label(method: str) -> str:
    """A method's name as it is written in a legend."""
    return {"cg": "CG", "tpe": "TPE", "stn": "STN"}.get(method, method.replace("_", " "))


FORMATS = ("png", "pdf", "svg")
_wanted: list[str] = []


@contextmanager
def formats(names: Sequence[str]) -> Iterator[None]:
    """Inside, every figure is also saved in these formats, beside its PNG."""
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise RunnerError(
            f"`--format` must be of {', '.join(FORMATS)}, with commas between, got {unknown[0]!r}"
        )
    before, _wanted[:] = list(_wanted), [name for name in names if name != "png"]
    try:
        yield
    finally:
        _wanted[:] = before


def save(drawn: "Figure", path: Path) -> None:
    """Saves a PNG, and what `formats` asks for beside it, without time stamps or versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Software": None})
    stamps: dict[str, Any] = {
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        "svg": {"Date": None, "Creator": None},
    }
    for name in _wanted:
        drawn.savefig(path.with_suffix(f".{name}"), metadata=stamps[name])


@contextmanager
def figure(
    path: Path, *, rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.0
) -> Iterator[tuple["Figure", Any]]:
    """Opens a figure (inches; one cell, or an array of cells) and saves it as a PNG at the end
    (and in the `formats` asked for).

    The file carries no time stamp and no version of the drawing library, so equal records give an
    equal figure.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(rows, columns, figsize=(width, height))
        try:
            yield drawn, axes
            save(drawn, path)
        finally:
            plt.close(drawn)


def curves(
    records: Sequence[Record], method: str, metric: str, *, best_so_far: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """One metric against cost, all seeds on one grid: costs (k,), values (seeds, k).

    A value holds from its own cost until the next record. The grid starts where every seed has a
    record and ends with the cheapest seed: nothing is extrapolated.
    """
    columns: dict[int, list[tuple[float, float]]] = {}
    for entry in records:
        if entry.method == method and metric in entry.metrics:
            columns.setdefault(entry.seed, []).append((entry.cost, float(entry.metrics[metric])))
    if not columns:
        raise ValueError(f"no record of method {method!r} has the metric {metric!r}")
    series = [np.array(sorted(points, key=lambda point: point[0])).T for points in columns.values()]
    start, stop = max(cost[0] for cost, _ in series), min(cost[-1] for cost, _ in series)
    grid = np.unique(np.concatenate([cost for cost, _ in series]))
    grid = grid[(grid >= start) & (grid <= stop)]
    if not grid.size:
        raise ValueError(f"the seeds of method {method!r} have no cost in common")
    rows = []
    for cost, values in series:
        values = np.fmin.accumulate(values) if best_so_far else values
        rows.append(values[np.searchsorted(cost, grid, side="right") - 1])
    return grid, np.stack(rows)


def band(
    axes: "Axes",
    records: Sequence[Record],
    method: str,
    metric: str,
    *,
    best_so_far: bool = False,
    name: str | None = None,
    dashed: bool = False,
) -> None:
    """Draws the median over seeds against cost, and the range between the quartiles."""
    cost, values = curves(records, method, metric, best_so_far=best_so_far)
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    axes.plot(
        cost,
        middle,
        color=colour(method),
        label=name or label(method),
        linestyle="--" if dashed else "-",
        drawstyle="steps-post" if best_so_far else "default",
    )
    if len(values) > 1:
        step = "post" if best_so_far else None
        axes.fill_between(cost, low, high, color=colour(method), alpha=0.18, linewidth=0, step=step)


def cost_axes(axes: "Axes", ylabel: str, *, log: bool = True) -> None:
    """Labels axes of a metric against cost, with a legend."""
    axes.set(xlabel="cost (inner-gradient evaluations)", ylabel=ylabel)
    if log:
        axes.set_yscale("log")
    axes.legend()


def trajectories(
    axes: "Axes", steps: Sequence[float], values: Mapping[str, Sequence[float]], ylabel: str
) -> None:
    """Draws each named hyperparameter against the outer step, labelled at the right end."""
    for index, series in enumerate(values.values()):
        axes.plot(steps, series, color=OTHERS[index % len(OTHERS)])
    low, high = axes.get_ylim()
    heights = apart([series[-1] for series in values.values()], 0.06 * (high - low))
    for index, (name, series) in enumerate(values.items()):
        axes.annotate(
            name,
            (steps[-1], series[-1]),
            xytext=(1.01, heights[index]),
            textcoords=("axes fraction", "data"),
            color=OTHERS[index % len(OTHERS)],
            va="center",
            annotation_clip=False,
        )
    axes.set(xlabel="outer step", ylabel=ylabel)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved as little as their order allows, so that neighbours are `gap` apart."""
    order = np.argsort(heights, kind="stable")
    moved = np.array(heights, float)[order]
    for _ in range(200):
        close = np.flatnonzero(np.diff(moved) < gap * (1 - 1e-6))
        if not close.size:
            break
        for i in close:
            short = (gap - (moved[i + 1] - moved[i])) / 2
            moved[i] -= short
            moved[i + 1] += short
    placed = np.empty_like(moved)
    placed[order] = moved
    return placed.tolist()


def heat_map(
    axes: "Axes", values: np.ndarray, title: str, *, unit: str = "", centred: bool = False
) -> None:
    """Draws a matrix with its colour bar; `centred` puts white at zero, for signed values."""
    limit = float(np.nanmax(np.abs(values))) if centred else None
    image = axes.imshow(
        values,
        cmap="RdBu_r" if centred else None,
        vmin=None if limit is None else -limit,
        vmax=limit,
    )
    axes.set(title=title, xticks=[], yticks=[])
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label=unit, shrink=0.85)
