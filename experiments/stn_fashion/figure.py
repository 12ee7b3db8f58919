"""The pictures of `stn_fashion`, from saved records."""

from pathlib import Path
from typing import Any

from experiments.common import figures as draw
from experiments.common import record
from experiments.stn_fashion import problem

SHOWN = {
    "delta_stn": ("occluded images", draw.colour("delta_stn"), "-"),
    "delta_stn_clean": ("clean images", draw.SKY, "-"),
    "sgd": ("occluded, by SGD", draw.GOLD, "-"),
    "small_scale": ("occluded, by SGD, width forced to 0.01", draw.ORANGE, "--"),
    "no_response": ("occluded, by SGD, response held at zero", draw.BLACK, ":"),
}


def figures(out: Path) -> list[Path]:
    """Cutout, losses against cost, and all fifteen hyperparameters."""
    records = record.read(out)
    return [
        _cutout(records, out / "figures" / "cutout.png"),
        _losses(records, out / "figures" / "losses.png"),
        _schedules(records, out / "figures" / "schedules.png"),
    ]


def _series(records: list[record.Record], method: str, metric: str) -> tuple[Any, Any]:
    """Costs, and the mean over seeds."""
    cost, values = draw.curves(records, method, metric)
    return cost, values.mean(axis=0)


def _cutout(records: list[record.Record], path: Path) -> Path:
    """Holes, their side, and the pixels they cut from an image, against cost."""
    panels = {
        "holes": "number of holes",
        "length": "side of a hole (pixels)",
        "area": "pixels cut, mean over draws",
    }
    with draw.figure(path, columns=3, width=12.5, height=3.9) as (_, axes):
        for panel, (metric, words) in zip(axes, panels.items(), strict=True):
            for method, (name, shade, line) in SHOWN.items():
                cost, mean = _series(records, method, metric)
                panel.plot(cost, mean, color=shade, linestyle=line, label=name)
            panel.set(xlabel="cost (inner-gradient evaluations)", ylabel=words)
        axes[0].legend()
    return path


def _losses(records: list[record.Record], path: Path) -> Path:
    """Validation loss against cost: tuned on occluded images, searched, fixed."""
    with draw.figure(path, width=7.0) as (_, axes):
        for method, name in (
            ("fixed", "fixed at the start"),
            ("random_search", "random search"),
            ("delta_stn", "Delta-STN"),
        ):
            draw.band(axes, records, method, "validation_loss", name=name)
        draw.cost_axes(axes, "validation loss, occluded images (nats)")
    return path


def _schedules(records: list[record.Record], path: Path) -> Path:
    """Every hyperparameter of the tuned run, as a part of its range."""
    groups = {
        "dropout": problem.DROPOUTS,
        "jitter and scaling": (*problem.JITTER, "input_scaling"),
        "cutout": problem.CUTOUT,
    }
    top = dict.fromkeys(problem.DROPOUTS, 0.9) | {"hue": 0.5, "input_scaling": 0.3}
    with draw.figure(path, columns=3, width=13.5, height=4.2) as (_, axes):
        for panel, (title, names) in zip(axes, groups.items(), strict=True):
            for i, name in enumerate(names):
                cost, mean = _series(records, "delta_stn", name)
                if name in problem.CUTOUT:
                    values = mean
                else:
                    values = mean / top.get(name, 1.0)
                shade = (*draw.OTHERS, draw.BROWN)[i % (len(draw.OTHERS) + 1)]
                idle = name in problem.IDLE
                words = name.replace("_", " ") + (" (idle)" if idle else "")
                panel.plot(cost, values, color=shade, label=words, linestyle="--" if idle else "-")
            panel.set(title=title, xlabel="cost (inner-gradient evaluations)")
            panel.set_ylim(bottom=0)
            panel.legend(fontsize=8)
        axes[0].set_ylabel("part of the range")
        axes[2].set_ylabel("number, pixels")
    return path
