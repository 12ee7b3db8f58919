"""The picture of `elbo`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

SOURCES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "digits"}
ARMS = {"head": "head on frozen features", "whole": "all weights"}
METHODS = {
    "grid": ("grid search over decays", draw.BLACK),
    "elbo": ("DE-ELBo, one run", draw.BLUE),
    "plain": ("plain ELBo, one run", draw.GOLD),
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    return [_losses(record.read(out), out / "figures" / "losses.png")]


def _losses(records: list[record.Record], path: Path) -> Path:
    """Test loss and error of every seed; lines join what one seed gave to each method."""
    names = [
        (f"{source}_{arm}", f"{SOURCES[source]}\n{ARMS[arm]}")
        for source in SOURCES
        for arm in ARMS
        if any(r.method == f"{source}_{arm}_elbo" for r in records)
    ]
    with draw.figure(path, columns=2, width=11.5, height=4.6) as (drawn, axes):
        for cell, metric, text in zip(
            axes, ("test_loss", "test_error"), ("test loss, nats", "test error"), strict=True
        ):
            for place, (name, _) in enumerate(names):
                for j, (method, (words, shade)) in enumerate(METHODS.items()):
                    values = [r.metrics[metric] for r in records if r.method == f"{name}_{method}"]
                    x = place + 0.26 * (j - 1)
                    cell.scatter(
                        np.full(len(values), x), values, s=14, color=shade, alpha=0.6,
                        label=words if place == 0 else None,
                    )  # fmt: skip
                    cell.plot([x - 0.1, x + 0.1], [np.mean(values)] * 2, color=shade)
            cell.set_xticks(range(len(names)), [words for _, words in names], fontsize=9)
            cell.set_ylabel(text)
        axes[0].set_title("One variational run beside a grid search")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return path
