"""The picture of `bo_rep`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.bo_rep.methods import NAMES, WORDS
from experiments.common import figures as draw
from experiments.common import record

TITLES = {
    "trec": "TREC: six kinds of questions",
    "sst2": "SST-2: two kinds of reviews",
    "made_up": "made-up sentences",
}
SHADES = {
    "bo_rep": draw.ORANGE,
    "soba": draw.BLUE,
    "amigo": draw.GREEN,
    "alternate_cg": draw.PURPLE,
    "plain": draw.GREY,
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    path = out / "figures" / "results.png"
    shown = [data for data in TITLES if any(r.method == f"{data}_tried" for r in records)]
    height = 0.5 + 3.6 * len(shown)
    with draw.figure(path, rows=len(shown), columns=2, width=11.0, height=height) as (_, axes):
        axes = np.reshape(axes, (len(shown), 2))
        for (left, right), data in zip(axes, shown, strict=True):
            _rates(left, records, data)
            left.set(title=TITLES[data])
            _results(right, records, data)
        axes[0][0].legend()
        axes[-1][0].set(xlabel="first step size of the hyperparameters")
        axes[-1][1].set(xlabel="test error")
    return [path]


def _rates(cell: Any, records: list[record.Record], data: str) -> None:
    """Loss on the guard part for every step size, at the better of the inner step sizes."""
    tried = [r.metrics for r in records if r.method == f"{data}_tried"]
    for name in NAMES:
        own = [m for m in tried if m["loop"] == name]
        rates = sorted({m["outer_rate"] for m in own})
        best = [
            min((m["guard_loss"], m["diverged"]) for m in own if m["outer_rate"] == rate)
            for rate in rates
        ]
        losses = [loss for loss, _ in best]
        cell.plot(rates, losses, "o-", color=SHADES[name], label=WORDS[name])
        broken = [(rate, loss) for rate, (loss, bad) in zip(rates, best, strict=True) if bad]
        if broken:
            cell.plot(*np.transpose(broken), "x", color="black", markersize=10)
    cell.set(xscale="log", ylabel="loss on held-out sentences (nats)")


def _results(cell: Any, records: list[record.Record], data: str) -> None:
    """A dot for each seed, a bar at their mean."""
    last = record.final(records)
    names = [n for n in (*NAMES, "plain") if any(m == f"{data}_{n}" for m, _ in last)]
    for i, name in enumerate(names):
        values = [r.metrics["test_error"] for (m, _), r in last.items() if m == f"{data}_{name}"]
        cell.plot(values, [i] * len(values), "o", color=SHADES[name], markersize=7)
        cell.plot([np.mean(values)] * 2, [i - 0.35, i + 0.35], color=SHADES[name])
    cell.set(yticks=range(len(names)), yticklabels=[WORDS[n] for n in names])
    cell.invert_yaxis()
