"""Pictures of a search and of what it costs: the surface under its path, memory and time."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.plot.canvas import BLUE, GREEN, GREY, ORANGE, SKY, canvas
from bilevel.tools.memory import MemoryReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def response_surface(
    values: Any | Callable[[float, float], float],
    x: Any,
    y: Any,
    *,
    path: Any = None,
    names: tuple[str, str] = ("first hyperparameter", "second hyperparameter"),
    label: str = "validation loss",
) -> "Figure":
    """A loss over two hyperparameters, with the path that a run took across it.

    Args:
      values: an array (len(y), len(x)), or a function of one ``x`` and one ``y``.
      x, y: coordinates of the grid.
      path: (steps, 2), the hyperparameters over the run.
      names: of the two axes.
      label: what the surface is.

    Returns:
      A matplotlib figure.

    Raises ``ValueError`` where shapes do not fit.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if callable(values):
        function: Any = values
        values = [[float(function(a, b)) for a in x] for b in y]
    grid_values = np.asarray(values, float)
    if grid_values.shape != (len(y), len(x)):
        raise ValueError(
            f"`values` has shape {grid_values.shape}, expected (len(y), len(x)) = "
            f"{(len(y), len(x))}."
        )
    with canvas("response_surface", width=5.4, height=4.2) as (figure, grid):
        axes = grid[0, 0]
        # Levels by quantiles: the valley is resolved even where the rim is a thousand times higher.
        levels = np.unique(np.nanquantile(grid_values, np.linspace(0, 1, 16)))
        if len(levels) < 2:
            levels = levels[0] + np.array([-1.0, 1.0]) * max(abs(levels[0]), 1.0) * 1e-6
        from matplotlib.colors import BoundaryNorm

        norm = BoundaryNorm(levels, 256)
        drawn = axes.contourf(x, y, grid_values, levels, cmap="viridis_r", norm=norm)
        axes.contour(x, y, grid_values, levels, colors="white", linewidths=0.4)
        bar = figure.colorbar(drawn, ax=axes, label=label)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        row, col = np.unravel_index(np.nanargmin(grid_values), grid_values.shape)
        axes.plot(
            x[col], y[row], "*", color="white", mec="black", ms=13, label="lowest on the grid"
        )
        if path is not None:
            moves = np.asarray(path, float)
            if moves.ndim != 2 or moves.shape[1] != 2:
                raise ValueError(f"`path` has shape {moves.shape}, expected (steps, 2).")
            axes.plot(*moves.T, "-", color=ORANGE, linewidth=2)
            axes.plot(*moves[0], "o", color=ORANGE, mec="white", ms=8, label="start of the run")
            axes.plot(*moves[-1], "s", color=ORANGE, mec="white", ms=8, label="its end")
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.grid(False)
        axes.set_title(f"{label[:1].upper()}{label[1:]} over two hyperparameters")
        figure.legend(loc="outside lower left", ncols=3, fontsize=9)
    return figure


def resource_bars(
    report: MemoryReport, seconds: Mapping[str, float] | Sequence[float] | None = None
) -> "Figure":
    """Memory of each way to compute one hypergradient, and the seconds it takes.

    Args:
      report: what :func:`~bilevel.memory_report` returned.
      seconds: of a call, measured by you, by the names of the rows or in their order; by
        default the seconds that each row took to compile.

    Returns:
      A matplotlib figure.
    """
    if not isinstance(report, MemoryReport) or not report.rows:
        raise TypeError(
            "`report` must be what `memory_report` returned, with at least one row, got "
            f"{type(report).__name__}."
        )
    names = [row.name for row in report.rows]
    title = "Seconds to compile" if seconds is None else "Seconds per call"
    if seconds is None:
        seconds = [row.compile_seconds for row in report.rows]
    times = [seconds[name] for name in names] if isinstance(seconds, Mapping) else list(seconds)
    if len(times) != len(names):
        raise ValueError(f"`seconds` has {len(times)} entries for {len(names)} rows: {names}.")
    places = np.arange(len(names))
    with canvas("resource_bars", 1, 2, width=9.0, height=0.38 * len(names) + 1.6, sharey=True) as (
        figure,
        grid,
    ):
        memory, time = grid[0]
        arguments = np.array([row.arguments for row in report.rows]) / 2**20
        working = np.array([row.temp for row in report.rows]) / 2**20
        results = np.array([row.outputs for row in report.rows]) / 2**20
        memory.barh(places, arguments, color=GREY, label="arguments")
        memory.barh(places, working, left=arguments, color=BLUE, label="working memory")
        memory.barh(places, results, left=arguments + working, color=SKY, label="results")
        time.barh(places, times, color=GREEN)
        total = arguments + working + results
        for axes, values, form in ((memory, total, "{:.3g}"), (time, times, "{:.2g}")):
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, " " + form.format(value), va="center", fontsize=8)
            axes.margins(x=0.15)
            axes.grid(axis="y", visible=False)
        memory.set_yticks(places, names)
        memory.invert_yaxis()
        memory.set(title="Memory of one hypergradient (MiB)")
        time.set(title=title)
        handles, named = memory.get_legend_handles_labels()
        figure.legend(handles, named, loc="outside lower left", ncols=3, fontsize=9)
    return figure
