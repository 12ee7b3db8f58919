"""The picture of `NAME`, from saved records."""

from pathlib import Path

from experiments.common import figures as draw
from experiments.common import record


def figures(out: Path) -> list[Path]:
    """Validation loss against cost."""
    records, path = record.read(out), out / "figures" / "losses.png"
    with draw.figure(path) as (_, axes):
        for method in sorted({r.method for r in records}):
            draw.band(axes, records, method, "validation_loss")
        draw.cost_axes(axes, "validation loss")
    return [path]
