"""The pictures of `stn_cifar`, from saved records and arrays."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

NAMES = {
    "delta_stn": ("Delta-STN", draw.PURPLE, "-"),
    "replay": ("plain network on its schedule", draw.BLUE, "--"),
    "random_search": ("best of random search so far", draw.BLACK, "-"),
    "fixed": ("starting values, fixed", draw.GREY, "-"),
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    folder = out / "figures"
    return [
        _losses(records, folder / "losses.png"),
        _schedules(records, out, folder / "schedules.png"),
    ]


def _losses(records: list[record.Record], path: Path) -> Path:
    """Validation and test loss against cost, mean and range over seeds."""
    with draw.figure(path, columns=2, width=11.5, height=4.4) as (_, axes):
        for cell, part in zip(axes, ("validation", "test"), strict=True):
            for method, (text, shade, line) in NAMES.items():
                cost, values = draw.curves(records, method, f"{part}_loss")
                cell.plot(cost, values.mean(0), color=shade, linestyle=line, label=text)
                cell.fill_between(
                    cost, values.min(0), values.max(0), color=shade, alpha=0.15, linewidth=0
                )
            cell.set(xlabel="cost (inner-gradient evaluations)", ylabel=f"{part} loss (nats)")
        low, high = _limits(records)
        for cell in axes:
            cell.set_ylim(low, high)
        axes[0].legend()
    return path


def _limits(records: list[record.Record]) -> tuple[float, float]:
    """The range of what matters: a network that over-fits leaves the picture at the top."""
    ends = record.final(records)
    found = [
        r.metrics[name]
        for r in [*ends.values(), *(r for r in records if r.method == "random_search")]
        for name in ("validation_loss", "test_loss")
        if r.method in ("delta_stn", "random_search", "replay")
    ]
    low = min(r.metrics["validation_loss"] for r in records)
    return 0.93 * low, 1.25 * max(found)


def _schedules(records: list[record.Record], out: Path, path: Path) -> Path:
    """What each hyperparameter did while the network trained; a line for a seed."""
    seeds = sorted({r.seed for r in records if r.method == "delta_stn"})
    found = [record.load_arrays(out, f"schedule_{seed}") for seed in seeds]
    # The saved schedule is what training read, with whole numbers; the records hold the
    # relaxed ones behind them.
    panels = _panels(list(found[0]))
    with draw.figure(path, columns=len(panels), width=4.6 * len(panels), height=4.0) as (_, axes):
        for cell, (title, names) in zip(np.atleast_1d(axes), panels.items(), strict=True):
            for index, name in enumerate(names):
                shade = draw.OTHERS[index % len(draw.OTHERS)]
                for seed in seeds:
                    rows = [r for r in records if r.method == "delta_stn" and r.seed == seed]
                    cell.plot(
                        [r.cost for r in rows],
                        [r.metrics[name] for r in rows],
                        color=shade,
                        linewidth=1.6,
                        label=name.replace("_", " ") if seed == seeds[0] else None,
                    )
            cell.set(title=title, xlabel="cost (inner-gradient evaluations)")
            _headroom(cell, len(names))
            cell.legend(loc="upper left", fontsize=9)
    return path


def _headroom(cell: Any, names: int) -> None:
    """Room above the curves for the legend."""
    low, high = cell.get_ylim()
    cell.set_ylim(min(low, 0), high + 0.075 * (names + 1) * (high - low))


def _panels(names: list[str]) -> dict[str, list[str]]:
    return {
        "dropout": [n for n in names if "dropout" in n],
        "colour jitter and scaling": [
            n
            for n in ("brightness", "contrast", "saturation", "hue", "input_scaling")
            if n in names
        ],
        "cutout: number of holes": [n for n in names if n == "cutout_holes"],
        "cutout: side in pixels": [n for n in names if n == "cutout_length"],
    }
