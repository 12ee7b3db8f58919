"""The pictures of `digits`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.digits.methods import BLACK_BOX, GRADIENT

TENSORS = ("hidden_kernel", "hidden_bias", "readout_kernel", "readout_bias")


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [
        _losses(records, out / "figures" / "losses.png"),
        _decays(records, out / "figures" / "decays.png"),
        _pixels(records, out, out / "figures" / "pixels.png"),
    ]


def _losses(records: list[record.Record], path: Path) -> Path:
    """Validation and test loss against cost, for every method."""
    with draw.figure(path, columns=2, width=11.0, height=4.4) as (_, (left, right)):
        for axes, metric in ((left, "validation_loss"), (right, "chosen_test_loss")):
            for method in ("no_tuning", *BLACK_BOX, *GRADIENT):
                draw.band(
                    axes,
                    records,
                    method,
                    metric,
                    name=NAMES.get(method),
                    dashed=method.endswith("per_tensor") or method == "tpe",
                )
        draw.cost_axes(left, "validation loss (nats)")
        cost, values = draw.curves(records, "cg_per_weight", "test_loss")
        right.plot(
            cost, np.median(values, axis=0), color=draw.colour("cg"), linewidth=1, linestyle=":"
        )  # what the same run is worth without a stop
        draw.cost_axes(right, "test loss (nats) at the best point so far", log=False)
        right.get_legend().remove()
        right.set_ylim(0.1, 0.35)
        left.set_ylim(top=1.0)
        left.set_title("Validation loss keeps falling, with a decay per weight")
        right.set_title("Test loss of what each would hand over")
    return path


NAMES = {
    "no_tuning": "no tuning",
    "random_search": "random search",
    "tpe": "TPE",
    "cg_per_tensor": "CG, a decay per tensor",
    "neumann_per_tensor": "Neumann, a decay per tensor",
    "cg_per_weight": "CG, a decay per weight",
    "neumann_per_weight": "Neumann, a decay per weight",
    "cg_per_weight_stopped": "CG, a decay per weight, stopped by a third split",
}


def _decays(records: list[record.Record], path: Path) -> Path:
    """How the four log decays move, and how a decay per weight spreads (its quartiles)."""
    seed = min(r.seed for r in records)
    with draw.figure(path, columns=2, width=11.0, height=4.0) as (_, (left, right)):
        chosen = [r for r in records if r.seed == seed and r.method == "cg_per_tensor"]
        draw.trajectories(
            left,
            [r.step for r in chosen],
            {n.replace("_", " "): [r.metrics[f"{n}_median"] for r in chosen] for n in TENSORS},
            "log decay",
        )
        left.set_title("One decay per tensor")
        chosen = [r for r in records if r.seed == seed and r.method == "cg_per_weight"]
        steps = [r.step for r in chosen]
        for index, name in enumerate(TENSORS):
            shade = draw.OTHERS[index % len(draw.OTHERS)]
            low, middle, high = (
                [r.metrics[f"{name}_{q}"] for r in chosen] for q in ("low", "median", "high")
            )
            right.plot(steps, middle, color=shade, label=name.replace("_", " "))
            right.fill_between(steps, low, high, color=shade, alpha=0.18, linewidth=0)
        right.set(
            xlabel="outer step",
            ylabel="log decay",
            title="One decay per weight: median and quartiles",
        )
        right.legend()
    return path


def _pixels(records: list[record.Record], out: Path, path: Path) -> Path:
    """The learned decay of each pixel (mean over its weights), beside the mean digit."""
    seed = min(r.seed for r in records)
    saved = record.load_arrays(out, f"cg_per_weight_{seed}")
    decay = saved["hidden_kernel"].reshape(8, 8, -1).mean(axis=-1)
    with draw.figure(path, columns=3, width=10.5, height=3.6) as (_, (left, middle, right)):
        draw.heat_map(left, saved["mean_image"].reshape(8, 8), "mean digit")
        draw.heat_map(middle, saved["deviation"].reshape(8, 8), "what varies between digits")
        draw.heat_map(
            right, decay - np.median(decay), "log decay per pixel, minus its median", centred=True
        )
        for axes in (left, middle, right):
            axes.grid(False)
    return path
