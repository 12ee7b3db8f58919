"""The pictures of `stn_digits`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.stn_digits.problem import PLACES

NAMES = {
    "delta_stn": "Delta-STN",
    "stn": "STN",
    "delta_stn_low": "Delta-STN, from 0.05",
    "stn_low": "STN, from 0.05",
    "random_search": "random search",
    "tpe": "TPE",
}
WORDS = {"input": "input", "hidden_1": "first hidden layer", "hidden_2": "second hidden layer"}


def figures(out: Path) -> list[Path]:
    """Schedules from all starts, losses against cost, and what a width too small does."""
    records = record.read(out)
    return [
        _schedules(records, out, out / "figures" / "schedules.png"),
        _losses(records, out / "figures" / "losses.png"),
        _response(records, out / "figures" / "response.png"),
    ]


def _schedules(records: list[record.Record], out: Path, path: Path) -> Path:
    """One panel a method and place: the rate against training, a line for each start."""
    seed = min(r.seed for r in records)
    with draw.figure(path, rows=2, columns=3, width=11.0, height=6.2) as (_, axes):
        for row, method in zip(axes, ("delta_stn", "stn"), strict=True):
            found = record.load_arrays(out, f"{method}_{seed}")
            last = [r for r in records if r.seed == seed and r.method == method][-1]
            for panel, place in zip(row, PLACES, strict=True):
                cost = np.linspace(0, last.cost, found[place].shape[1])
                panel.plot(cost, found[place].T, color=draw.colour(method), linewidth=1.5)
                panel.set(ylim=(0, 1), title=f"{NAMES[method]}, {WORDS[place]}")
            row[0].set_ylabel("dropout rate")
        for panel in axes[1]:
            panel.set_xlabel("cost (inner-gradient evaluations)")
    return path


def _losses(records: list[record.Record], path: Path) -> Path:
    """Losses against cost, of what all seeds run; the best fixed rate of the grid as a line."""
    with draw.figure(path, columns=2, width=11.0, height=4.4) as (_, (left, right)):
        for axes, metric in ((left, "validation_loss"), (right, "test_loss")):
            for method in ("random_search", "tpe", "stn_low", "delta_stn_low"):
                draw.band(axes, records, method, metric, name=NAMES[method])
            fixed = [
                r.metrics[metric] for r in record.final(records).values() if r.method == "grid"
            ]
            axes.axhline(
                float(np.median(fixed)), color=draw.GREY, linestyle=":", label="best fixed rate"
            )
            draw.cost_axes(axes, metric.replace("_", " ") + " (nats)")
            low, high = axes.get_ylim()
            axes.set_ylim(low, min(high, 8 * low))
        right.get_legend().remove()
    return path


def _response(records: list[record.Record], path: Path) -> Path:
    """The largest move of a rate: tuned freely, with a width too small, and without a response."""
    seed = min(r.seed for r in records)
    with draw.figure(path, width=6.5) as (_, axes):
        shown = {
            "sgd": ("width tuned", draw.colour("delta_stn")),
            "small_scale": ("width forced to 0.01", draw.ORANGE),
            "no_response": ("response held at zero", draw.BLACK),
        }
        for method, (name, shade) in shown.items():
            chosen = [r for r in records if r.seed == seed and r.method == method]
            for i, place in enumerate(PLACES):
                rate = [np.ravel(r.metrics[f"rate_{place}"])[0] for r in chosen]
                axes.plot(
                    [r.cost for r in chosen],
                    rate,
                    color=shade,
                    linestyle="--" if method == "no_response" else "-",
                    label=name if i == 0 else None,
                )
        axes.set(
            xlabel="cost (inner-gradient evaluations)",
            ylabel="dropout rate",
            title="Delta-STN's three rates by SGD, from 0.05",
        )
        axes.legend()
    return path
