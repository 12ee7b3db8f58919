"""The pictures of `maid`, from saved records."""

from pathlib import Path

from experiments.common import figures as draw
from experiments.common import record
from experiments.maid.run import ACCURACIES, SCHEDULES, SEARCHES

NAMES = {
    "maid1": "MAID, first accuracy 1e-1",
    "maid3": "MAID, 1e-3",
    "maid5": "MAID, 1e-5",
    "exponential": "HOAG, exponential",
    "quadratic": "HOAG, quadratic",
    "cubic": "HOAG, cubic",
    "exact": "HOAG, exact solves",
    "random": "random search",
    "tpe": "TPE",
}
METHODS = (*ACCURACIES, *SCHEDULES, *SEARCHES)


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    tasks = list(dict.fromkeys(r.method.split("_")[0] for r in records))
    paths = [_values(records, tasks, out / "figures" / "values.png")]
    if "denoise" in tasks:
        paths.append(_images(records, out, out / "figures" / "images.png"))
    return paths


def _values(records: list[record.Record], tasks: list[str], path: Path) -> Path:
    """The best outer loss against cost, a panel for each problem, a line for each seed."""
    methods = {r.method for r in records}
    width = 5.2 * len(tasks)
    with draw.figure(path, columns=len(tasks), width=width, height=4.4) as (_, axes):
        panels = [axes] if len(tasks) == 1 else list(axes)
        seeds = sorted({r.seed for r in records})
        shades = (*draw.OTHERS, "#555555")
        for panel, task in zip(panels, tasks, strict=True):
            for shade, method in zip(shades, METHODS, strict=True):
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
            panel.set_xscale("log")
            panel.set_title(task)
            if panel is not panels[-1]:
                panel.get_legend().remove()
    return path


def _images(records: list[record.Record], out: Path, path: Path) -> Path:
    """An image: clean, noisy, and denoised by what MAID found."""
    seed = min(r.seed for r in records)
    pair = record.load_arrays(out, f"denoise_{seed}")
    found = record.load_arrays(out, f"denoise_maid3_{seed}")["image"]
    shown = {"clean": pair["clean"], "noisy": pair["noisy"], "denoised by MAID": found}
    with draw.figure(path, columns=3, width=9.6, height=3.4) as (_, axes):
        for panel, (title, image) in zip(axes, shown.items(), strict=True):
            panel.imshow(image, cmap="gray", vmin=0, vmax=1)
            panel.set_title(title)
            panel.grid(False)
            panel.set_xticks([])
            panel.set_yticks([])
    return path
