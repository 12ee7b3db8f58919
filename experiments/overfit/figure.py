"""The pictures of `overfit`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.overfit.problem import GRANULARITY

SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "digits"}
MODELS = {"linear": "linear", "mlp": "MLP", "cnn": "CNN"}
PARTS = {"train": draw.GREY, "validation": draw.BLUE, "test": draw.ORANGE}
LINES = {"per_weight": "-", "per_layer": "--", "one": ":"}
WORDS = {"per_weight": "a decay per weight", "per_layer": "per layer", "one": "one in all"}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [
        _curves(records, "accuracy", out / "figures" / "accuracy.png"),
        _curves(records, "loss", out / "figures" / "loss.png"),
    ]


def _curves(records: list[record.Record], metric: str, path: Path) -> Path:
    """Train, validation and test against hypergradients: a row for a set, a column for a model."""
    known = {r.method for r in records}
    sets = [name for name in SETS if any(m.startswith(f"{name}_") for m in known)]
    models = [model for model in MODELS if f"{sets[0]}_{model}_one" in known]
    size = {"rows": len(sets), "columns": len(models)}
    with draw.figure(path, **size, width=13.0, height=3.6 * len(sets) + 0.6) as (drawn, axes):
        axes = np.reshape(axes, (len(sets), len(models)))
        for i, name in enumerate(sets):
            for j, model in enumerate(models):
                _cell(axes[i, j], records, f"{name}_{model}", metric)
                axes[i, j].set_title(
                    f"{SETS[name]}, {MODELS[model]}: {_count(records, name, model)}"
                )
                if i == len(sets) - 1:
                    axes[i, j].set_xlabel("hypergradients")
            unit = " (nats)" if metric == "loss" else ""
            axes[i, 0].set_ylabel(metric + unit)
        handles = axes[0, 0].get_legend_handles_labels()
        drawn.legend(*handles, loc="outside lower center", ncols=5)
    return path


def _count(records: list[record.Record], name: str, model: str) -> str:
    (count,) = {
        r.metrics["hyperparameters"] for r in records if r.method == f"{name}_{model}_per_weight"
    }
    return f"{count:,} decays".replace(",", " ")


def _cell(axes: Any, records: list[record.Record], prefix: str, metric: str) -> None:
    """A decay per weight in colour; in black the coarser ones, on the validation images only."""
    for granularity in GRANULARITY:
        fine = granularity == "per_weight"
        chosen = [r for r in records if r.method == f"{prefix}_{granularity}"]
        steps = sorted({r.step for r in chosen})
        for part in PARTS if fine else ("validation",):
            shade = PARTS[part] if fine else draw.BLACK
            values = np.array(
                [[r.metrics[f"{part}_{metric}"] for r in chosen if r.step == k] for k in steps]
            )
            axes.plot(
                steps,
                np.median(values, axis=1),
                color=shade,
                linestyle=LINES[granularity],
                label=f"{part}, {WORDS[granularity]}",
            )
            if fine:  # the range of the seeds
                low, high = values.min(1), values.max(1)
                axes.fill_between(steps, low, high, color=shade, alpha=0.15, linewidth=0)
    if metric == "loss":
        axes.set_yscale("log")
    else:
        axes.set_ylim(top=1.02)
