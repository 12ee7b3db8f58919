"""The truth plot of `inverse`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

METHODS = {
    "identity": "identity (T1–T2): no product",
    "neumann": "Neumann series",
    "cg": "conjugate gradients",
    "nystrom": "Nyström of that rank",
}
TITLES = {
    "diabetes_conditioned": "ridge regression, diabetes",
    "diabetes": "the same with weaker decays",
    "concrete": "ridge regression, concrete",
    "bostonHousing": "ridge regression, Boston housing",
    "digits_hessian": "MLP on digits, damped Hessian",
    "digits_gauss_newton": "MLP on digits, damped Gauss–Newton",
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [_truth(records, out / "figures" / "truth.png")]


def _truth(records: list[record.Record], path: Path) -> Path:
    """Error against curvature products; a panel for each problem, all on one scale."""
    known = {r.method for r in records}
    problems = [name for name in TITLES if f"{name}_neumann" in known]
    rows = -(-(len(problems) + 1) // 3)  # the last cell holds the legend
    with draw.figure(path, rows=rows, columns=3, width=11.5, height=3.3 * rows) as (drawn, axes):
        cells = np.ravel(axes)
        for cell, name in zip(cells, problems, strict=False):
            for method in METHODS:
                _curve(cell, records, f"{name}_{method}", "relative_error", method)
            cell.set(yscale="log", ylim=(1e-10, 3e1))
            cell.set_title(f"{TITLES[name]}\n{_facts(records, name)}", fontsize=10.5)
        for place, cell in enumerate(cells[: len(problems)]):
            if place % 3 == 0:
                cell.set_ylabel("relative error")
            if place + 3 >= len(problems):
                cell.set_xlabel("curvature products")
        for cell in cells[len(problems) :]:
            cell.axis("off")
        cells[len(problems)].legend(
            *cells[0].get_legend_handles_labels(), loc="center left", fontsize=11
        )
        drawn.suptitle("How near to the true hypergradient does a number of products come?")
    return path


def _facts(records: list[record.Record], name: str) -> str:
    checks = [r.metrics for r in records if r.method == f"{name}_checks"]
    condition = np.median(
        [m.get("condition", m.get("max_curvature", 0) / m.get("min_curvature", 1)) for m in checks]
    )
    return f"{checks[0]['size']:.0f} decays, condition number {condition:.0f}"


def _curve(axes: Any, records: list[record.Record], name: str, metric: str, method: str) -> None:
    """The median over seeds and the range of all of them, against products."""
    chosen = [r for r in records if r.method == name]
    budgets = sorted({r.step for r in chosen})
    # An error of exactly zero cannot be drawn on a logarithmic axis: rounding stands for it.
    values = [[max(r.metrics[metric], 1e-16) for r in chosen if r.step == k] for k in budgets]
    low, middle, high = (np.array([f(v) for v in values]) for f in (min, np.median, max))
    shade = draw.colour(method)
    if method == "identity":
        axes.axhline(middle[0], color=shade, linestyle="--", label=METHODS[method])
        return
    axes.plot(budgets, middle, color=shade, marker="o", markersize=3.5, label=METHODS[method])
    axes.fill_between(budgets, low, high, color=shade, alpha=0.18, linewidth=0)
