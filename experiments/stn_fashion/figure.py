"""The pictures of `stn_fashion`, from saved records and arrays."""

from pathlib import Path
from typing import Any

from experiments.common import figures as draw
from experiments.common import record
from experiments.stn_fashion import problem, run

COST = "cost (inner-gradient evaluations)"
TUNED = {
    "delta_stn": ("occluded", draw.PURPLE, "-"),
    "delta_stn_clean": ("clean", draw.BLUE, "-"),
    "small_scale": ("occluded, perturbations of width 0.01", draw.ORANGE, "--"),
    "no_response": ("occluded, response held at zero", draw.BLACK, ":"),
}
NETWORKS = {
    "delta_stn": ("Delta-STN", draw.PURPLE, "-"),
    "random_search_low": ("best of random search, low rates only", draw.GOLD, "-"),
    "random_search": ("best of random search", draw.BLACK, "-"),
    "fixed": ("starting values, fixed", draw.GREY, "-"),
}
COMPARED = {"delta": ("Delta-STN", draw.PURPLE), "stn": ("STN", draw.ORANGE)}
FROM = ("-", "--", ":", "-.")  # a line for each start
EXAMPLES = {
    "validation": "to validate on",
    "start": "to train on,\nat the start",
    "tuned": "to train on,\ntuned",
    "tuned_clean": "to train on,\ntuned on\nclean images",
}


def figures(out: Path) -> list[Path]:
    """Images, cutout and dropout against cost, losses, and all hyperparameters."""
    records = record.read(out)
    folder = out / "figures"
    compared = any(r.method == "stn_starts" for r in records)
    starts = record.read_json(out / "run.json")["config"]["starts"] if compared else []
    return [
        *([_starts(records, starts, folder / "starts.png")] if starts else []),
        _images(out, min(r.seed for r in records), folder / "images.png"),
        _moves(records, folder / "moves.png"),
        _losses(records, folder / "losses.png"),
        _schedules(records, folder / "schedules.png"),
    ]


def _series(cell: Any, records: Any, method: str, metric: str, style: Any) -> None:
    """Mean and range over seeds."""
    text, shade, line = style
    cost, values = draw.curves(records, method, metric)
    cell.plot(cost, values.mean(0), color=shade, linestyle=line, label=text)
    cell.fill_between(cost, values.min(0), values.max(0), color=shade, alpha=0.15, linewidth=0)


def _images(out: Path, seed: int, path: Path) -> Path:
    """What one seed validates on and trains on, before and after tuning."""
    found = record.load_arrays(out, f"examples_{seed}")
    count = len(found["validation"])
    height = 1.15 * len(EXAMPLES)
    with draw.figure(
        path, rows=len(EXAMPLES), columns=count, width=1.1 * count + 1.5, height=height
    ) as (_, axes):
        for row, (name, text) in zip(axes, EXAMPLES.items(), strict=True):
            for cell, image in zip(row, found[name], strict=True):
                cell.imshow(image, cmap="gray", vmin=0, vmax=1)
                cell.set(xticks=[], yticks=[])
                cell.grid(False)
            row[0].set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8)
    return path


def _moves(records: list[record.Record], path: Path) -> Path:
    """Cutout and dropout against cost: tuned, on clean images, and with no response to learn."""
    panels = {
        "holes": "number of holes",
        "length": "side of a hole (pixels)",
        "area_growth": "pixels cut, over those at the start",
        "moved_dropout": "move of a dropout rate (mean of all)",
    }
    with draw.figure(path, rows=2, columns=2, width=10.5, height=7.4) as (whole, axes):
        for cell, (metric, words) in zip(axes.flat, panels.items(), strict=True):
            for method, style in TUNED.items():
                _series(cell, records, method, metric, style)
            cell.set(xlabel=COST, ylabel=words)
            cell.set_ylim(bottom=0)
        handles, names = axes.flat[0].get_legend_handles_labels()
        whole.legend(
            handles, names, loc="outside upper center", ncols=2, title="validation images are"
        )
    return path


def _losses(records: list[record.Record], path: Path) -> Path:
    """Loss on occluded images against cost, mean and range over seeds."""
    ends = [
        r.metrics["validation_loss"] for r in record.final(records).values() if r.method in NETWORKS
    ]
    with draw.figure(path, columns=2, width=11.5, height=4.4) as (whole, axes):
        for cell, part in zip(axes, ("validation", "test"), strict=True):
            for method, style in NETWORKS.items():
                _series(cell, records, method, f"{part}_loss", style)
            cell.set(xlabel=COST, ylabel=f"{part} loss, occluded images (nats)")
            cell.set_ylim(0.9 * min(ends), 1.1 * max(ends))
        handles, names = axes[0].get_legend_handles_labels()
        whole.legend(handles, names, loc="outside upper center", ncols=2)
    return path


def _starts(records: list[record.Record], starts: list[float], path: Path) -> Path:
    """STN and Delta-STN from every start, mean over seeds: the loss, and the dropout rates."""
    panels = {
        "validation_loss": "validation loss, occluded images (nats)",
        "mean_dropout": "dropout rate (mean of all)",
    }
    ends = []
    with draw.figure(path, columns=2, width=11.5, height=4.6) as (whole, axes):
        for cell, (metric, words) in zip(axes, panels.items(), strict=True):
            for method, (text, shade) in COMPARED.items():
                for index, (start, line) in enumerate(zip(starts, FROM, strict=False)):
                    cost, values = draw.curves(records, run.from_start(method, index), metric)
                    label = f"{text} from {start:g}"
                    cell.plot(cost, values.mean(0), color=shade, linestyle=line, label=label)
                    if metric == "validation_loss":
                        ends.append(values.mean(0)[-1])
            cell.set(xlabel=COST, ylabel=words)
        axes[0].set_ylim(0.95 * min(ends), 1.5 * max(ends))
        axes[1].set_ylim(bottom=0)
        handles, names = axes[0].get_legend_handles_labels()
        whole.legend(handles, names, loc="outside upper center", ncols=2)
    return path


def _schedules(records: list[record.Record], path: Path) -> Path:
    """A panel for every hyperparameter, tuned on occluded and on clean images."""
    metrics = next(r.metrics for r in records if r.method == "delta_stn")
    names = [name.removeprefix("scale_") for name in metrics if name.startswith("scale_")]
    columns = 5
    rows = -(-len(names) // columns)
    with draw.figure(path, rows=rows, columns=columns, width=13.5, height=2.5 * rows) as (f, axes):
        for cell in axes.flat[len(names) :]:
            cell.set_axis_off()
        for cell, name in zip(axes.flat, names, strict=False):
            for method in ("delta_stn", "delta_stn_clean"):
                _series(cell, records, method, name, TUNED[method])
            idle = " (gray: no effect)" if name in problem.IDLE else ""
            cell.set_title(name.replace("_", " ") + idle, fontsize=11)
            top = cell.get_ylim()[1]
            cell.set_ylim(0, max(top, 0.25))
        for cell in axes[-1]:
            cell.set_xlabel("cost")
        handles, texts = axes.flat[0].get_legend_handles_labels()
        f.legend(handles, texts, loc="outside upper center", ncols=2, title="validation images are")
    return path
