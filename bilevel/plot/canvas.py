"""Figures in one quiet style, made without pyplot: no global state and no display is needed."""

import contextlib
from collections.abc import Iterator
from typing import Any

from bilevel.ground.settings import require_extra

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, GOLD, NAVY, OLIVE, GREY = "#56B4E9", "#E69F00", "#332288", "#6B7A12", "#6E6E6E"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, GOLD, NAVY, OLIVE)  # Okabe and Ito, and two more

STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


@contextlib.contextmanager
def canvas(
    who: str, rows: int = 1, columns: int = 1, *, width: float, height: float, **grid: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure (inches) and its array of axes (rows, columns), drawn in the style."""
    matplotlib = require_extra("matplotlib", "plot", f"`bilevel.plot.{who}`")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
        yield figure, figure.subplots(rows, columns, squeeze=False, **grid)


def colour(i: int) -> str:
    """The colour of line ``i``."""
    return CYCLE[i % len(CYCLE)]


def legend_of(axes: Any) -> None:
    """A legend where more than one thing is named."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=9)
