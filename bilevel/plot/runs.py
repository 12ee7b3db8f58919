"""Pictures of runs: how hyperparameters moved, whether to trust them, what was reached."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.plot.canvas import BLUE, GREEN, GREY, ORANGE, canvas, colour, legend_of
from bilevel.plot.records import (
    Run,
    column,
    history_of,
    hyperparameters,
    named_runs,
    ratio,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 16
SUMMARY = ("norm", "min", "median", "mean", "max")


def trajectories(
    runs: Run | Sequence[Run] | Mapping[str, Run],
    names: Sequence[str] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
) -> "Figure":
    """Each hyperparameter against the outer step, one line per run.

    Runs from several starting points that end together have found an optimum; runs that stay
    apart have not. Of an array with more than 16 entries, which ``fit`` logs in summary, the
    line is the mean and the band spans least to largest.

    Args:
      runs: what ``fit`` returned, its ``history`` or the path of its ``log``; several of them,
        or a mapping from names to them.
      names: the hyperparameters to draw, as in the log; by default all, at most 16.
      labels: what to write instead of some names, such as ``{"decay": "log weight decay"}``.

    Returns:
      A matplotlib figure: ``figure.savefig("trajectories.png")``.

    Raises ``ValueError`` for a name that was not logged, ``ImportError`` without matplotlib.
    """
    histories = named_runs(runs)
    every = {name: hyperparameters(history) for name, history in histories.items()}
    steps = {name: [r["step"] for r in h if "hparams" in r] for name, h in histories.items()}
    first = next(iter(every.values()))
    names = _panels(first, names)
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    with canvas(
        "trajectories", rows, columns, width=max(3.0 * columns, 4.5), height=2.4 * rows + 0.5
    ) as (figure, grid):
        for axes, name in zip(grid.flat, names, strict=False):
            for i, (run, found) in enumerate(every.items()):
                middle = found.get(name, found.get(f"{name}/mean"))
                if middle is None:
                    continue
                axes.plot(steps[run], middle, color=colour(i), label=run)
                axes.plot(steps[run][0], middle[0], "o", color=colour(i), markersize=5)
                if name not in found:
                    low, high = found[f"{name}/min"], found[f"{name}/max"]
                    axes.fill_between(steps[run], low, high, color=colour(i), alpha=0.15, lw=0)
            axes.set_title((labels or {}).get(name, name))
        for axes in grid[-1]:
            axes.set_xlabel("outer step")
        for axes in list(grid.flat)[len(names) :]:
            axes.set_axis_off()
        if len(every) > 1:
            handles, named = grid[0, 0].get_legend_handles_labels()
            figure.legend(handles, named, loc="outside lower left", ncols=4, fontsize=9)
        figure.suptitle("Hyperparameters over the run (dots: start)", x=0.01, ha="left")
    return figure


def _panels(found: Mapping[str, Any], names: Sequence[str] | None) -> list[str]:
    known: list[str] = []
    for name in found:
        base, _, last = name.rpartition("/")
        summed = last in SUMMARY and all(
            f"{base}/{part}" in found
            for part in SUMMARY
            if part != "median"  # older logs have none
        )
        if (base if summed else name) not in known:
            known.append(base if summed else name)
    unknown = [name for name in names or () if name not in known and name not in found]
    if unknown:
        raise ValueError(f"`names` holds {unknown}, which were not logged: there are {known}.")
    return list(names) if names is not None else known[:PANELS]


def trust_strip(run: Run) -> "Figure":
    """Can the hypergradients of this run be trusted? One strip from top to bottom.

    Panels: the relative residual of the linear solve, the smallest and the largest curvature
    that it met, how far the parameters were from a minimum, and the status of every step. What
    lies in the shaded zone deserves a doubt. A panel is left out where nothing was measured.

    Args:
      run: what ``fit`` returned, its ``history`` or the path of its ``log``.

    Returns:
      A matplotlib figure.
    """
    history = history_of(run)
    residual = ratio(history, "residual_norm", "rhs_norm")
    low, high = column(history, "min_curvature"), column(history, "max_curvature")
    distance = column(history, "relative_stationarity")
    panels = [
        name
        for name, values in (("residual", residual), ("curvature", low), ("distance", distance))
        if len(values[0])
    ]
    rows = len(panels) + 1
    heights = [3.0] * len(panels) + [0.7]
    with canvas(
        "trust_strip", rows, width=8.0, height=1.7 * len(panels) + 1.2, sharex=True,
        gridspec_kw={"height_ratios": heights},
    ) as (figure, grid):  # fmt: skip
        for axes, name in zip(grid[:, 0], panels, strict=False):
            if name == "residual":
                _limited(axes, residual, 0.1, "Relative residual of the linear solve")
            elif name == "distance":
                _limited(
                    axes, distance, 0.05, "Distance from a minimum of the inner loss, relative"
                )
            else:
                axes.plot(*high, color=BLUE, label="largest")
                axes.plot(*low, color=ORANGE, label="smallest")
                if len(low[1]) and np.nanmin(low[1]) < 0:
                    axes.axhspan(np.nanmin(low[1]) * 1.2, 0, color=ORANGE, alpha=0.12, lw=0)
                linear = max(np.nanmax(np.abs(high[1]), initial=1e-6) * 1e-4, 1e-12)
                axes.set_yscale("symlog", linthresh=linear)
                axes.axhline(0, color=GREY, linewidth=0.8)
                axes.set_title("Curvature met (below zero: no minimum)")
                legend_of(axes)
        _status_bar(figure, grid[-1, 0], history)
    return figure


def _limited(axes: Any, values: tuple[np.ndarray, np.ndarray], limit: float, title: str) -> None:
    steps, numbers = values
    positive = np.where(numbers > 0, numbers, np.nan)
    axes.semilogy(steps, positive, color=BLUE)
    bad = positive > limit
    axes.semilogy(steps[bad], positive[bad], ".", color=ORANGE)
    bottom, top = axes.get_ylim()
    top = max(top, 3 * limit)
    axes.axhspan(limit, top, color=ORANGE, alpha=0.12, lw=0)
    axes.set_ylim(min(bottom, limit / 10), top)
    axes.set_title(f"{title} (doubtful above {limit:g})")


def _status_bar(figure: Any, axes: Any, history: Sequence[Any]) -> None:
    statuses = [r.get("status", "no status") for r in history]
    names = sorted(set(statuses), key=lambda name: (name != "ok", name))
    shades = {"ok": GREEN, "no status": GREY}
    others = iter([ORANGE, "#CC79A7", "#E69F00", "#332288", "#000000"] * 4)
    for name in names:
        shades.setdefault(name, next(others))
    for name in names:
        steps = [r["step"] for r, status in zip(history, statuses, strict=True) if status == name]
        spans = [(step - 0.5, 1) for step in steps]
        share = f"{name} ({len(steps)} of {len(history)})"
        axes.broken_barh(spans, (0, 1), color=shades[name], label=share, lw=0)
    axes.set(ylim=(0, 1), yticks=[], xlabel="outer step", title="Status")
    axes.grid(False)
    handles, named = axes.get_legend_handles_labels()
    figure.legend(handles, named, loc="outside lower left", ncols=3, fontsize=9)


def cost_curves(
    methods: Mapping[str, Sequence[Run]],
    *,
    metrics: Mapping[str, str] | None = None,
    cost: str = "cost",
    cost_label: str = "cost in inner gradients",
    log: bool = False,
) -> "Figure":
    """Validation and test against cost: a line per method, a band over its seeds.

    Args:
      methods: a mapping from the name of a method to its runs, one per seed.
      metrics: a mapping from titles to names in the records; by default the validation loss
        ``outer_loss`` and, where it was measured, ``evaluate`` as the test loss. One panel each.
      cost: the number in the records that says what a step cost; it is summed. Steps are
        counted where it is missing.
      cost_label: what is written at the axis.
      log: logarithmic losses.

    Returns:
      A matplotlib figure. Lines are medians, bands reach from the lowest to the highest seed;
      they end where the cheapest seed does.
    """
    runs = {name: [history_of(run) for run in every] for name, every in methods.items()}
    if not runs or not all(runs.values()):
        raise ValueError("`methods` must map names to lists of runs, at least one each.")
    if metrics is None:
        metrics = {"Validation loss": "outer_loss", "Test loss": "evaluate"}
        metrics = {
            title: name
            for title, name in metrics.items()
            if any(name in record for every in runs.values() for h in every for record in h)
        }
    with canvas(
        "cost_curves", 1, len(metrics), width=4.6 * len(metrics) + 0.4, height=3.6
    ) as (figure, grid):  # fmt: skip
        for axes, (title, metric) in zip(grid[0], metrics.items(), strict=True):
            for i, (name, every) in enumerate(runs.items()):
                x, values = _on_one_grid(every, metric, cost)
                if not len(x):
                    continue
                axes.plot(x, np.median(values, 0), color=colour(i), label=name)
                if len(values) > 1:
                    low, high = values.min(0), values.max(0)
                    axes.fill_between(x, low, high, color=colour(i), alpha=0.2, lw=0)
            axes.set(title=title, xlabel=cost_label)
            if log:
                axes.set_yscale("log")
            legend_of(axes)
        seeds = sorted({len(every) for every in runs.values()})
        if seeds[-1] > 1:
            many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
            figure.suptitle(f"Median and range of {many} seeds", fontsize=9, x=0.01, ha="left")
    return figure


def _on_one_grid(
    histories: Sequence[Sequence[Any]], metric: str, cost: str
) -> tuple[np.ndarray, np.ndarray]:
    """Costs (k,) and values (seeds, k); a value holds until the next record."""
    curves = []
    for history in histories:
        costs = np.cumsum([float(record.get(cost, 1)) for record in history])
        has = np.array([isinstance(record.get(metric), (int, float)) for record in history])
        values = np.array(
            [record[metric] for record, there in zip(history, has, strict=True) if there]
        )
        if has.any():
            curves.append((costs[has], values))
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    start, end = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    every = np.unique(np.concatenate([c[0] for c in curves]))
    x = every[(every >= start) & (every <= end)]
    return x, np.stack([v[np.searchsorted(c, x, "right") - 1] for c, v in curves])
