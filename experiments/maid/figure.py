"""The pictures of `maid`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.maid import images
from experiments.maid.run import ACCURACIES, SCHEDULES, SEARCHES

NAMES = {
    "maid1": "MAID, first accuracy 1e-1",
    "maid3": "MAID, 1e-3",
    "maid5": "MAID, 1e-5",
    "accelerated": "MAID, 1e-3, accelerated steps",
    "exponential": "HOAG, exponential",
    "exact": "HOAG, exact solves",
    "grid": "grid",
    "random": "random search",
    "tpe": "TPE",
}
METHODS = (*ACCURACIES, *SCHEDULES, *SEARCHES)
SHADES = (*draw.OTHERS, "#555555", "#a05a2c", "#000000")
TITLES = {"variation": "total variation", "experts": "fields of experts"}
COLUMNS = {
    "variation_grid": "total variation, best of the grid",
    "variation_maid3": "total variation, learned",
    "experts_maid3": "fields of experts, learned",
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    tasks = list(dict.fromkeys(r.method.split("_")[0] for r in records))
    paths = [_values(records, tasks, out / "figures" / "values.png")]
    if {"variation", "experts"} <= set(tasks):
        seed = min(r.seed for r in records)
        found = {name: record.load_arrays(out, f"{name}_{seed}") for name in COLUMNS}
        paths.append(_denoised(found, out / "figures" / "denoised.png"))
        paths.append(_filters(found["experts_maid3"], out / "figures" / "filters.png"))
    return paths


def _values(records: list[record.Record], tasks: list[str], path: Path) -> Path:
    """The best outer loss against cost, a panel for each problem, a line for each seed."""
    methods = {r.method for r in records}
    size: dict[str, Any] = {"width": 4.6 * len(tasks), "height": 5.0}
    with draw.figure(path, columns=len(tasks), **size) as (drawn, axes):
        panels = [axes] if len(tasks) == 1 else list(axes)
        seeds = sorted({r.seed for r in records})
        lines: dict[Any, Any] = {}
        for panel, task in zip(panels, tasks, strict=True):
            for shade, method in zip(SHADES, METHODS, strict=False):
                if f"{task}_{method}" not in methods:
                    continue
                style = "--" if method in SEARCHES else "-"
                for seed in seeds:
                    way = [r for r in records if (r.method, r.seed) == (f"{task}_{method}", seed)]
                    panel.plot(
                        [r.cost for r in way],
                        [r.metrics["value"] for r in way],
                        color=shade,
                        label=NAMES[method] if seed == seeds[0] else None,
                        linestyle=style,
                        drawstyle="steps-post",
                    )
            draw.cost_axes(panel, "outer loss")
            panel.set(xscale="log", yscale="log" if task == "quadratic" else "linear")
            panel.set_title(TITLES.get(task, task))
            panel.get_legend().remove()
            lines |= {line.get_label(): line for line in panel.get_legend_handles_labels()[0]}
        drawn.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=5)
    return path


def _shown(panel: Any, image: np.ndarray, title: str, **more: Any) -> None:
    panel.imshow(image, cmap="gray", **more)
    panel.set_title(title, fontsize=9)
    panel.grid(False)
    panel.set_xticks([])
    panel.set_yticks([])


def _denoised(found: dict[str, Any], path: Path) -> Path:
    """Held-out images: clean, noisy, denoised by the grid's best point and by what was learned."""
    clean, noisy, _ = found["variation_grid"]["pictures"]
    rows = [("clean", clean), ("with noise", noisy)]
    rows += [(title, found[name]["pictures"][2]) for name, title in COLUMNS.items()]
    count = len(clean)
    size: dict[str, Any] = {"width": 2.9 * len(rows), "height": 3.1 * count}
    with draw.figure(path, rows=count, columns=len(rows), **size) as (_, axes):
        grid = np.reshape(np.asarray(axes), (count, len(rows)))
        for column, (title, pictures) in enumerate(rows):
            told = np.asarray(images.decibels(pictures, clean))
            for i in range(count):
                label = title if column == 0 else f"{title}: {told[i]:.2f} dB"
                _shown(grid[i, column], images.measured(pictures)[i], label, vmin=0, vmax=1)
    return path


def _filters(learned: dict[str, Any], path: Path) -> Path:
    """The learned filters, those that weigh most first."""
    order = np.argsort(-learned["weight"])
    with draw.figure(path, rows=3, columns=8, width=9.6, height=4.4) as (drawn, axes):
        for panel, k in zip(np.ravel(axes), order, strict=True):
            square = learned["filters"][k].reshape(images.SIZE, images.SIZE)
            reach = np.abs(square).max()
            _shown(panel, square, f"{np.exp(learned['weight'][k]):.3g}", vmin=-reach, vmax=reach)
        drawn.suptitle("Learned filters with their weights")
    return path
