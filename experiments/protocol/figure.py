"""The picture of `protocol`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

NAMES = {
    "no_tuning": "not tuned",
    "random_search": "random search,\nfour decays",
    "tuned_per_weight": "hypergradients,\na decay per weight",
}
LOOKS = {
    "validation_loss": ("validation loss of the winner", draw.ORANGE),
    "same_seed_test": ("its test loss", draw.SKY),
    "other_seed_test": ("test loss on another seed, trained anew", draw.BLUE),
}


def figures(out: Path) -> list[Path]:
    """The same winners, looked at in three ways."""
    last = record.final(record.read(out))
    path = out / "figures" / "protocol.png"
    with draw.figure(path, width=9.0, height=4.2) as (_, axes):
        for place, method in enumerate(NAMES):
            points = np.array(
                [
                    [r.metrics[look] for look in LOOKS]
                    for (name, _), r in sorted(last.items())
                    if name == method
                ]
            )
            x = place + 0.26 * (np.arange(3) - 1)
            axes.plot(x, points.T, color=draw.GREY, linewidth=0.8, alpha=0.5)
            for i, (name, shade) in enumerate(LOOKS.values()):
                axes.plot(
                    [x[i]] * len(points), points[:, i], "o", markersize=5, color=shade, alpha=0.6
                )
                axes.plot(
                    x[i], points[:, i].mean(), "_", markersize=26, markeredgewidth=3, color=shade,
                    label=name if place == 0 else None,
                )  # fmt: skip
        axes.set_xticks(range(len(NAMES)), list(NAMES.values()))
        axes.set(
            ylabel="cross-entropy", title="The same winners, seen three ways; a line is a seed"
        )
        axes.set_ylim(bottom=0)
        axes.legend()
    return [path]
