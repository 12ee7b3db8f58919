"""The pictures of `cleaning`, from saved records and arrays."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

SETS = {
    "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10N (JPEG)",
    "digits": "digits",
}  # fmt: skip
NAMES = {
    "all": ("all labels", draw.BLACK),
    "both_parts": ("all labels and validation", draw.GREY),
    "valid": ("validation alone", draw.GOLD),
    "clean": ("right labels alone", draw.GREEN),
    "cg": ("CG", draw.BLUE),
    "lanczos": ("carried Krylov subspace", draw.SKY),
    "f2sa": ("F2SA", draw.ORANGE),
    "f2sa_2": ("F2SA, order 2", draw.BROWN),
    "pbgd": ("PBGD", draw.PURPLE),
    "bome": ("BOME", draw.NAVY),
}


def figures(out: Path) -> list[Path]:
    """Test errors at the end, validation loss on the way, and the weights that were found."""
    records = record.read(out)
    sets = [s for s in SETS if any(r.method == f"{s}_cg" for r in records)]
    path = out / "figures" / "cleaning.png"
    size = {"rows": len(sets), "columns": 3, "width": 15.0, "height": 4.2 * len(sets)}
    with draw.figure(path, **size) as (figure, axes):
        for row, name in zip(np.reshape(axes, (len(sets), 3)), sets, strict=True):
            _errors(row[0], records, name)
            _losses(row[1], records, name)
            _weights(row[2], records, out, name)
        figure.tight_layout()
    return [path]


def _errors(axes: Any, records: list[record.Record], name: str) -> None:
    ends = [r for r in records if "test_error" in r.metrics]
    shown = [m for m in NAMES if any(r.method == f"{name}_{m}" for r in ends)]
    for place, method in enumerate(shown):
        values = [100 * r.metrics["test_error"] for r in ends if r.method == f"{name}_{method}"]
        axes.barh(place, np.mean(values), color=NAMES[method][1], alpha=0.75, height=0.6)
        axes.plot(values, [place] * len(values), "o", color="white", mec=draw.BLACK, ms=4)
        axes.annotate(f"{np.mean(values):.1f}", (max(values), place), xytext=(7, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(shown)), [NAMES[m][0] for m in shown])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title=SETS[name], xlabel="test error, % (dots: single seeds)")


def _losses(axes: Any, records: list[record.Record], name: str) -> None:
    for method in ("cg", "lanczos", "f2sa", "f2sa_2", "pbgd", "bome"):
        cost, values = draw.curves(records, f"{name}_{method}", "loss_now")
        axes.plot(cost, np.median(values, 0), color=NAMES[method][1], label=NAMES[method][0])
    axes.set(xlabel="cost (inner-gradient evaluations)", ylabel="validation loss", yscale="log")
    axes.legend(fontsize=8)


def _weights(axes: Any, records: list[record.Record], out: Path, name: str) -> None:
    seed = min(r.seed for r in records if r.method == f"{name}_f2sa")
    saved = record.load_arrays(out, f"{name}_f2sa_{seed}")
    bins = np.linspace(0, 1, 41)
    for wrong, text, shade in ((False, "right label", draw.GREEN), (True, "wrong", draw.ORANGE)):
        chosen = saved["weights"][saved["wrong"].astype(bool) == wrong]
        axes.hist(chosen, bins, color=shade, alpha=0.6, label=text)
    axes.set(xlabel="weight of an example (F2SA)", ylabel="examples", yscale="log")
    axes.legend()
