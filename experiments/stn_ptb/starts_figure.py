"""The pictures of the second part of `stn_ptb`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.stn_ptb.starts_summary import grid_methods
from experiments.stn_ptb.starts_summary import summary as starts_summary

SHADES = (draw.BLUE, draw.SKY, draw.GREEN, draw.GOLD, draw.ORANGE)
NAMES = {
    "starts_stn": "STN, mean of five starts",
    "starts_stn_replay": "plain network on STN's schedules",
    "starts_delta_stn": "Delta-STN, mean of five starts",
    "starts_delta_stn_replay": "plain network on Delta-STN's schedules",
    "starts_random_search": "random search",
    "starts_tpe": "TPE",
}


def schedules(records: list[record.Record], out: Path, path: Path) -> Path:
    """A panel a method: the rate along training, a colour for each start, a line for each seed."""
    with draw.figure(path, columns=2, width=12.0, height=4.6) as (_, panels):
        for axes, method in zip(panels, ("starts_stn", "starts_delta_stn"), strict=True):
            ends = [last for (m, _), last in record.final(records).items() if m == method]
            for last in ends:
                found = record.load_arrays(out, f"{method}_{last.seed}")["rates"]
                cost = np.linspace(0, last.cost, found.shape[1])
                for i, rates in enumerate(found):
                    shade = SHADES[i % len(SHADES)]
                    axes.plot(cost, rates, color=shade, linewidth=1.3, alpha=0.9)
                    axes.plot(0, rates[0], "o", color=shade, markersize=7, clip_on=False, zorder=5)
            spread = np.mean([last.metrics["spread"] for last in ends])
            axes.set(
                xlabel="cost of the run (inner-gradient evaluations)",
                xlim=(0, None),
                ylim=(0, 1),
                title=f"{NAMES[method].split(',')[0]}: the starts end {100 * spread:.0f} % as far "
                "apart as they began",
            )
        panels[0].set_ylabel("output dropout rate")
        panels[0].text(
            0.98, 0.04, "a colour for each start, a line for each seed",
            transform=panels[0].transAxes, ha="right", color="#555555",
        )  # fmt: skip
    return path


def losses(records: list[record.Record], path: Path) -> Path:
    """Left: the best loss so far against cost. Right: fixed rates, and where the others end."""
    with draw.figure(path, columns=2, width=12.0, height=4.6) as (_, (left, right)):
        for method, name in NAMES.items():
            shade, replay = draw.colour(method.removeprefix("starts_")), method.endswith("replay")
            cost, values = draw.curves(records, method, "validation_loss", best_so_far=True)
            left.plot(
                cost,
                values.mean(axis=0),
                color=shade,
                label=name,
                linestyle="--" if replay else "-",
                drawstyle="steps-post"
                if method in ("starts_random_search", "starts_tpe")
                else None,
            )
        lowest = min(float(np.min(line.get_ydata())) for line in left.get_lines())  # type: ignore[arg-type]
        fixed = starts_summary(records)["starts_grid"]["validation_loss"]["mean"]
        left.axhline(fixed, color=draw.GREY, linestyle=":", label="best fixed rate, where it ends")
        left.set(
            xlabel="cost (inner-gradient evaluations)",
            ylabel="best validation loss so far (nats)",
            ylim=(lowest - 0.01, lowest + 0.36),
            title="mean of the seeds",
        )
        left.legend(loc="upper right")
        grid = grid_methods(records)
        ends = record.final(records)
        points = [
            (last.metrics["rate"], last.metrics["validation_loss"])
            for (method, _), last in ends.items()
            if method in grid
        ]
        rates = sorted({rate for rate, _ in points})
        means = [np.mean([loss for r, loss in points if r == rate]) for rate in rates]
        right.plot(*zip(*points, strict=True), "o", color=draw.GREY, markersize=5, alpha=0.7)
        right.plot(rates, means, color=draw.GREY, label="fixed rates, a whole budget each")
        for method in ("starts_stn", "starts_delta_stn"):
            shade = draw.colour(method.removeprefix("starts_"))
            each = [
                (rate, loss)
                for (m, _), last in ends.items()
                if m == method
                for rate, loss in zip(last.metrics["rates"], last.metrics["losses"], strict=True)
            ]
            name = NAMES[method].split(",")[0] + ", each start: at its last rate"
            right.plot(*zip(*each, strict=True), "s", color=shade, markersize=4.5, label=name)
        for method, marker in (("starts_random_search", "x"), ("starts_tpe", "+")):
            each = [
                (last.metrics["rate"], last.metrics["validation_loss"])
                for (m, _), last in ends.items()
                if m == method
            ]
            right.plot(
                *zip(*each, strict=True), marker, color=draw.colour(method.removeprefix("starts_")),
                markersize=8, markeredgewidth=2, label=f"{NAMES[method]}: at its best rate",
            )  # fmt: skip
        right.set(
            xlabel="output dropout rate", ylabel="best validation loss (nats)", xlim=(-0.03, 0.95)
        )
        right.legend(loc="lower left")
    return path
