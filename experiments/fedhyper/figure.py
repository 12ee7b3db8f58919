"""The picture of `fedhyper`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

NAMES = {
    "fedavg": ("FedAvg", draw.GREY),
    "global": ("global (G)", draw.BLUE),
    "momentum": ("global with momentum (GM)", draw.NAVY),
    "server": ("server-side local (SL)", draw.GREEN),
    "client": ("client-side local (CL)", draw.GOLD),
    "full": ("GM and CL", draw.ORANGE),
}
TITLES = {"poor": "from a rate that is too low", "best": "from the best rate of FedAvg"}


def figures(out: Path) -> list[Path]:
    """Validation accuracy against rounds, from both rates, and the factors of the server."""
    records = record.read(out)
    path = out / "figures" / "accuracy.png"
    with draw.figure(path, columns=3, width=15.0, height=4.4) as (_, axes):
        for panel, (rate, title) in zip(axes, TITLES.items(), strict=False):
            for method, (name, shade) in NAMES.items():
                steps, values = _median(records, f"{method}_{rate}", "accuracy")
                panel.plot(steps, 100 * values, color=shade, label=name)
            panel.set(title=title, xlabel="round")
        axes[0].set_ylabel("validation accuracy, % (median of seeds)")
        axes[0].legend(fontsize=8, loc="lower right")
        low = min(axes[0].get_ylim()[1], axes[1].get_ylim()[1])
        for panel in axes[:2]:
            panel.set_ylim(max(0.0, low - 45), None)
        for method in ("global", "momentum", "full"):
            name, shade = NAMES[method]
            for rate, style in (("poor", "-"), ("best", "--")):
                steps, values = _median(records, f"{method}_{rate}", "factor")
                axes[2].plot(steps, values, style, color=shade, label=f"{name}, {rate} rate")
        axes[2].set(title="factor of the global update", xlabel="round", ylim=(0, 5.2))
        axes[2].legend(fontsize=8)
    return [path]


def _median(
    records: list[record.Record], method: str, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    chosen = [r for r in records if r.method == method and metric in r.metrics]
    steps = np.array(sorted({r.step for r in chosen}))
    return steps, np.array([np.median([r.metrics[metric] for r in chosen if r.step == k])
                            for k in steps])  # fmt: skip
