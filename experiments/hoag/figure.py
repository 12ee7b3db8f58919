"""The pictures of `hoag`, from saved records."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.common import figures as draw
from experiments.common import record
from experiments.hoag.methods import ACCURACIES, SCHEDULES, SEARCHES

NAMES = {
    "cold": "cold starts, fixed tolerance",
    "adaptive": "warm starts, falling tolerance",
    "preconditioned": "... preconditioned",
    "single": "one penalty for all weights",
    "tpe": "TPE",
}


LEAST = 1e-5  # of what a logarithmic axis shows


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    found = {tuple(r.method.split("_")) for r in records}
    paths = []
    for wanted, draws in (((*SCHEDULES, *SEARCHES), _one_penalty), (ACCURACIES, _every_weight)):
        tasks = sorted({task for task, method in found if method in wanted})
        if tasks:
            paths.append(draws(records, tasks, wanted, out / "figures"))
    tasks = sorted({r.method.split("_")[0] for r in records if "bound" in r.metrics})
    if tasks:
        paths.append(_errors(records, tasks, out / "figures" / "errors.png"))
    return paths


def _errors(records: list[record.Record], tasks: list[str], path: Path) -> Path:
    """The error of each hypergradient over its size, and its bound, a line for each seed."""
    with _panels(path, tasks) as panels:
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


def _one_penalty(
    records: list[record.Record], tasks: list[str], methods: tuple[str, ...], folder: Path
) -> Path:
    """How far the loss is above the best of all methods, against cost; a line for each seed."""
    path = folder / "one_penalty.png"
    with _panels(path, tasks) as panels:
        for panel, task in zip(panels, tasks, strict=True):
            lines = _lines(records, task, methods)
            least = {
                seed: min(
                    r.metrics["true_loss"] for way in lines for r in way[-1:] if r.seed == seed
                )
                for seed in {r.seed for way in lines for r in way}
            }
            for way in lines:
                best = least[way[0].seed]
                losses = [r.metrics.get("true_loss", r.metrics["validation_loss"]) for r in way]
                excess = [max(loss / best - 1, LEAST) for loss in losses]
                _line(panel, task, way, [r.cost for r in way], excess, methods)
            panel.axhline(1e-3, color=draw.GREY, linewidth=0.8)
            panel.set(yscale="log", title=task)
            _logarithmic(panel, "cost (inner-gradient evaluations)")
        panels[0].set_ylabel("validation loss above the least, relative")
        # The first has the most methods, the last the most room.
        panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="lower left")
    return path


def _every_weight(
    records: list[record.Record], tasks: list[str], methods: tuple[str, ...], folder: Path
) -> Path:
    """The validation loss against products, until it is that of cold solves."""
    path = folder / "every_weight.png"
    with _panels(path, tasks) as panels:
        for panel, task in zip(panels, tasks, strict=True):
            for way in _lines(records, task, methods):
                products = [r.metrics["products"] for r in way]
                losses = [r.metrics["validation_loss"] for r in way]
                _line(panel, task, way, products, losses, methods)
            panel.set(title=task)
            _logarithmic(panel, "curvature products")
        panels[0].set_ylabel("validation loss (nats per example)")
        panels[-1].legend(loc="lower left")
    return path


def _logarithmic(panel: Any, label: str) -> None:
    """A logarithmic axis of numbers written out, three per decade."""
    panel.set(xscale="log", xlabel=label)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _panels(path: Path, tasks: list[str]) -> Iterator[list[Any]]:
    with draw.figure(path, columns=len(tasks), width=4.8 * len(tasks), height=4.4) as (_, axes):
        yield [axes] if len(tasks) == 1 else list(axes)


def _lines(
    records: list[record.Record], task: str, methods: tuple[str, ...]
) -> list[list[record.Record]]:
    """The runs of a task: each method, each seed."""
    seeds = sorted({r.seed for r in records})
    ways = [
        [r for r in records if (r.method, r.seed) == (f"{task}_{method}", seed)]
        for method in methods
        for seed in seeds
    ]
    return [way for way in ways if way]


def _line(
    panel: Any,
    task: str,
    way: list[record.Record],
    x: list[float],
    y: list[float],
    methods: tuple[str, ...],
) -> None:
    method = way[0].method.removeprefix(f"{task}_")
    shade = dict(zip(methods, draw.OTHERS, strict=False))[method]
    name = NAMES.get(method, method.replace("_", " "))
    known = {line.get_label() for line in panel.get_lines()}
    panel.plot(
        x, y, color=shade, drawstyle="steps-post", linewidth=1.5,
        linestyle="--" if method in SEARCHES else "-", marker="o", markersize=3,
        label="_" + name if name in known else name,
    )  # fmt: skip
