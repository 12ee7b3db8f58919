"""The pictures of `stn_ptb`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.stn_ptb import starts_figure
from experiments.stn_ptb.problem import PENALTIES, RATES
from experiments.stn_ptb.run import best_grid

NAMES = {
    "stn": "STN",
    "replay": "its schedule,\nreplayed",
    "final_value": "its final\nvalues",
    "best_grid": "best of\nthe grid",
    "random_search": "random\nsearch",
}
SHADES = {
    "stn": draw.GREEN,
    "replay": draw.BLUE,
    "final_value": draw.SKY,
    "best_grid": draw.GREY,
    "random_search": draw.BLACK,
}


def figures(out: Path) -> list[Path]:
    """The schedule that was found, and what it is worth; the same of the second part."""
    records = record.read(out)
    return [
        _schedule(records, out / "figures" / "schedule.png"),
        _perplexities(records, out / "figures" / "perplexities.png"),
        starts_figure.schedules(records, out, out / "figures" / "starts.png"),
        starts_figure.losses(records, out / "figures" / "starts_losses.png"),
    ]


def _schedule(records: list[record.Record], path: Path) -> Path:
    """The seven hyperparameters along training, a panel each: all seeds, and their median."""
    names = (*RATES, *PENALTIES)
    words = {"ar": "activation penalty (AR)", "tar": "temporal penalty (TAR)"}
    with draw.figure(path, rows=2, columns=4, width=12.0, height=5.6) as (_, axes):
        cells = np.ravel(axes)
        for cell, name in zip(cells, names, strict=False):
            shade = draw.BLUE if name in RATES else draw.ORANGE
            cost, values = draw.curves(records, "stn", f"h_{name}")
            cell.plot(cost, values.T, color=shade, alpha=0.35, linewidth=1.2)
            cell.plot(cost, np.median(values, axis=0), color=shade, linewidth=2.4)
            cell.set_title(words.get(name, f"dropout: {name}"))
            cell.set(ylim=(0, 0.9)) if name in RATES else cell.set(yscale="log", ylim=(0.03, 2))
        for cell in cells[len(names) :]:
            cell.axis("off")
        for cell in cells[3 : len(names)]:
            cell.set_xlabel("cost (inner gradients)")
    return path


def _perplexities(records: list[record.Record], path: Path) -> Path:
    """Left: validation perplexity so far. Right: each seed's figures at its best point."""
    of = {name: name for name in NAMES} | {"best_grid": best_grid(records)}
    with draw.figure(path, columns=2, width=12.0, height=4.4) as (_, (left, right)):
        for place, (name, method) in enumerate(of.items()):
            label = NAMES[name].replace("\n", " ")
            if name == "best_grid":
                label += f" (rate 0.{method[-2:]})"
            cost, values = draw.curves(records, method, "best_perplexity")
            left.plot(
                cost,
                np.median(values, axis=0),
                color=SHADES[name],
                label=label,
                drawstyle="steps-post" if name == "random_search" else "default",
            )
            ends: list[dict[str, Any]] = [
                r.metrics for (m, _), r in sorted(record.final(records).items()) if m == method
            ]
            for shift, (part, marker) in enumerate((("validation", "o"), ("test", "s"))):
                seeds = [end[f"{part}_perplexity"] for end in ends]
                where = place + 0.3 * shift - 0.15
                right.plot([where] * len(seeds), seeds, marker, color=SHADES[name], markersize=7)
                right.annotate(
                    f"{np.mean(seeds):.1f}", (where, max(seeds)), xytext=(0, 7),
                    textcoords="offset points", ha="center", fontsize=9,
                )  # fmt: skip
        lowest = [float(np.asarray(line.get_ydata())[-1]) for line in left.get_lines()]
        left.set(
            xlabel="cost (inner-gradient evaluations)",
            ylabel="best validation perplexity so far",
            ylim=(min(lowest) * 0.97, max(lowest) * 1.4),
        )
        left.legend()
        right.set(ylabel="perplexity", title="at the best validation point: ● validation  ■ test")
        right.set_xticks(range(len(NAMES)), list(NAMES.values()))
        right.margins(y=0.15)
    return path
