"""The pictures of `pes`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.pes import scalar

NAMES = {
    "pes": ("PES", draw.BLUE),
    "truncated_es": ("truncated ES", draw.GOLD),
    "truncated_gradient": ("truncated gradient", draw.ORANGE),
}


def figures(out: Path) -> list[Path]:
    """Bias and variance on the scalar system; the way of each method over the landscape."""
    records = record.read(out)
    paths = [out / "figures" / "scalar.png", out / "figures" / "landscape.png"]
    _scalar(records, paths[0])
    _landscapes(records, out, paths[1])
    return paths


def _scalar(records: list[record.Record], path: Path) -> None:
    seed = min(r.seed for r in records)
    truth, variance = scalar.closed_form()
    t = np.arange(1, scalar.STEPS + 1)
    with draw.figure(path, columns=2, width=10.0, height=4.0) as (_, (left, right)):
        left.plot(t, truth, color=draw.BLACK, label="true derivative", lw=1.2)
        right.plot(t, variance, color=draw.BLACK, label="closed form", lw=1.2)
        for method in ("pes", "truncated_es"):
            chosen = [r for r in records if r.seed == seed and r.method == f"scalar_{method}"]
            label, colour = NAMES[method]
            points = {"color": colour, "label": label, "ls": "", "marker": "o", "ms": 4}
            left.plot(t, [r.metrics["estimate"] for r in chosen], **points)
            right.plot(t, [r.metrics["variance"] for r in chosen], **points)
        left.set(xlabel="steps of the run", ylabel="mean of the estimate", ylim=(0, None))
        right.set(xlabel="steps of the run", ylabel="variance of one pair", yscale="log")
        left.set_title("The estimate of PES is unbiased")
        right.set_title("Its variance grows with the length of the run")
        left.legend()
        right.legend()


def _landscapes(records: list[record.Record], out: Path, path: Path) -> None:
    seed = min(r.seed for r in records)
    names = [n for n in ("digits", "fashion") if (out / "arrays" / f"landscape_{n}.npz").exists()]
    with draw.figure(path, columns=len(names), width=6.0 * len(names), height=4.8) as (_, axes):
        for axis, name in zip(np.atleast_1d(axes), names, strict=True):
            arrays = record.load_arrays(out, f"landscape_{name}")
            edges = arrays["axis"]
            losses = np.log10(np.fmin(arrays["losses"], 10.0))  # a diverged run is as dark as any
            mesh = axis.pcolormesh(edges, edges, losses.T, shading="nearest", cmap="Greys")
            axis.figure.colorbar(mesh, ax=axis, label="log10 of the mean loss over a run")
            start = [r for r in records if r.seed == seed and r.method == f"{name}_none"]
            for method, (label, colour) in NAMES.items():
                chosen = [r for r in records if r.seed == seed and r.method == f"{name}_{method}"]
                chosen = [*start, *chosen]
                x = [r.metrics["log_rate_start"] for r in chosen]
                y = [r.metrics["log_rate_end"] for r in chosen]
                axis.plot(x, y, color=colour, label=label, lw=2)
                axis.plot(x[-1], y[-1], marker="o", ms=9, color=colour, mec="white")
            found = [r for r in records if r.seed == seed and r.method == f"{name}_tpe"]
            if found:
                at = [found[-1].metrics[f"log_rate_{end}"] for end in ("start", "end")]
                axis.plot(*at, "*", ms=13, color=draw.BROWN, mec="white", label="best of TPE")
            axis.set(xlabel="log learning rate at the start", ylabel="log learning rate at the end")
            axis.grid(False)
            axis.set_title(f"{name}: paths from one start to the dots")
            axis.legend(facecolor="white", framealpha=0.9, frameon=True)
