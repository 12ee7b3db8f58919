"""The pictures of `sure`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.sure.run import ARMS

MODELS = {
    "quadratic": "quadratic smoothing\n1 hyperparameter",
    "tv": "total variation\n2 hyperparameters",
    "filters": "24 filters\n48 hyperparameters",
}
WORDS = {
    "sure": "SURE, on the noisy images themselves",
    "sure_train": "SURE, on other noisy images",
    "supervised": "other images, clean ones seen",
    "oracle": "oracle: these images, clean ones seen",
}
SHADES = dict(zip(ARMS, (draw.BLUE, draw.ORANGE, draw.BROWN, draw.BLACK), strict=True))


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    return [_risks(records, out / "figures" / "risks.png")]


def _risks(records: list[record.Record], path: Path) -> Path:
    """Left: PSNR on held-out images. Right: the estimate beside the risk along the way."""
    models = [m for m in MODELS if any(r.method == f"{m}_oracle" for r in records)]
    with draw.figure(path, columns=2, width=11.5, height=4.6) as (drawn, axes):
        bars, way = axes
        for i, model in enumerate(models):
            for j, arm in enumerate(ARMS):
                values = [r.metrics["psnr"] for r in records if r.method == f"{model}_{arm}"]
                place = i + 0.19 * (j - 1.5)
                bars.scatter(
                    np.full(len(values), place), values, color=SHADES[arm], s=26,
                    label=WORDS[arm] if i == 0 else None,
                )  # fmt: skip
        noisy = np.mean([r.metrics["psnr"] for r in records if r.method == "noisy"])
        bars.axhline(noisy, color=draw.GREY, linestyle="--", label="the noisy images")
        bars.set_xticks(range(len(models)), [MODELS[m] for m in models])
        bars.set_ylabel("PSNR of held-out images, dB")
        bars.set_title("SURE tunes as well as clean images do")
        _way(way, records, models[-1])
        drawn.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return path


def _way(axes: Any, records: list[record.Record], model: str) -> None:
    """The estimate and the true risk of one seed, along the outer steps."""
    first = min(r.seed for r in records)
    rows = [r for r in records if r.method == f"{model}_sure_path" and r.seed == first]
    steps = [r.step for r in rows]
    for name, text, shade in (
        ("value", "estimate (SURE)", draw.BLUE),
        ("risk", "true risk", draw.BLACK),
    ):
        axes.plot(steps, [r.metrics[name] for r in rows], color=shade, label=text)
    axes.set_xlabel("outer steps")
    axes.set_ylabel("squared error per pixel")
    axes.set_title(f"{MODELS[model].splitlines()[0]}: the estimate ends below the risk")
    axes.legend()
