"""The pictures of `hoag`, from saved records."""

from pathlib import Path

from experiments.common import figures as draw
from experiments.common import record
from experiments.hoag.methods import ACCURACIES, SCHEDULES, SEARCHES

NAMES = {
    "cold": "cold starts, fixed tolerance",
    "warm": "warm starts, fixed tolerance",
    "adaptive": "warm starts, falling tolerance",
    "preconditioned": "... preconditioned",
    "single": "one penalty for all weights",
    "tpe": "TPE",
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    found = {tuple(r.method.split("_")) for r in records}
    paths = []
    for wanted, file in (((*SCHEDULES, *SEARCHES), "one_penalty"), (ACCURACIES, "every_weight")):
        tasks = sorted({task for task, method in found if method in wanted})
        if tasks:
            paths.append(_losses(records, tasks, wanted, out / "figures" / f"{file}.png"))
    tasks = sorted({r.method.split("_")[0] for r in records if "bound" in r.metrics})
    if tasks:
        paths.append(_errors(records, tasks, out / "figures" / "errors.png"))
    return paths


def _errors(records: list[record.Record], tasks: list[str], path: Path) -> Path:
    """The error of each hypergradient over its size, and its bound, a line for each seed."""
    with draw.figure(path, columns=len(tasks), width=4.6 * len(tasks), height=4.0) as (_, axes):
        panels = [axes] if len(tasks) == 1 else list(axes)
        for panel, task in zip(panels, tasks, strict=True):
            seeds = sorted({r.seed for r in records if "bound" in r.metrics})
            for seed in seeds:
                way = [
                    r
                    for r in records
                    if (r.method, r.seed) == (f"{task}_exponential", seed) and "bound" in r.metrics
                ]
                steps = [r.step + 1 for r in way]
                lines = (
                    ("bound", "bound of the theory", draw.GREY, "--"),
                    ("error", "measured error", draw.BLUE, "-"),
                )
                for metric, name, shade, style in lines:
                    panel.plot(
                        steps,
                        [r.metrics[metric] / r.metrics["derivative"] for r in way],
                        color=shade,
                        linestyle=style,
                        label=name if seed == seeds[0] else None,
                    )
            panel.set(yscale="log", xlabel="outer step", title=task)
        panels[0].set_ylabel("error over hypergradient")
        panels[0].legend()
    return path


def _losses(
    records: list[record.Record], tasks: list[str], methods: tuple[str, ...], path: Path
) -> Path:
    """The best validation loss against cost, a panel for each problem, a line for each seed."""
    width = 5.2 * len(tasks)
    with draw.figure(path, columns=len(tasks), width=width, height=4.4) as (_, axes):
        panels = [axes] if len(tasks) == 1 else list(axes)
        seeds = sorted({r.seed for r in records})
        shades = dict(zip(methods, draw.OTHERS, strict=False))
        for panel, task in zip(panels, tasks, strict=True):
            for method in methods:
                name = NAMES.get(method, method.replace("_", " "))
                style = "--" if method in SEARCHES else "-"
                for seed in seeds:
                    way = [r for r in records if (r.method, r.seed) == (f"{task}_{method}", seed)]
                    panel.plot(
                        [r.cost for r in way],
                        [r.metrics["validation_loss"] for r in way],
                        color=shades.get(method),
                        label=name if seed == seeds[0] else None,
                        linestyle=style,
                        drawstyle="steps-post",
                    )
            draw.cost_axes(panel, "validation loss (nats an example)")
            panel.set_xscale("log")
            panel.set_title(task)
            if panel is not panels[0]:
                panel.get_legend().remove()
    return path
