"""The figure of `schedule`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    seeds = sorted({r.seed for r in records if r.method == "learned"})
    last = record.final(records)
    path = out / "figures" / "schedule.png"
    with draw.figure(path, columns=2, width=9.0, height=3.8) as (drawn, axes):
        left, right = np.atleast_1d(axes).ravel()
        for seed in seeds:
            grid = [r.metrics for r in records if r.seed == seed and r.method == "grid"]
            named = {} if seed != seeds[0] else {"label": "cosine, one per peak"}
            left.plot(
                [row["peak"] for row in grid], [row["test_loss"] for row in grid], ".-",
                color=draw.GREY, linewidth=0.8, **named,
            )  # fmt: skip
            learned = last["learned", seed].metrics
            named = {} if seed != seeds[0] else {"label": "learned"}
            rates = np.exp(np.asarray(learned["log_rates"]))
            part = np.linspace(0, 1, 200)
            knots = np.interp(part, np.linspace(0, 1, len(rates)), learned["log_rates"])
            curve = 0.5 * (1 + np.cos(np.pi * part)) * np.exp(knots)
            left.plot(curve.max(), learned["test_loss"], "o", color=draw.BLUE, **named)
            right.plot(part, curve, color=draw.BLUE, **named)
            found = last["tpe", seed].metrics
            named = {} if seed != seeds[0] else {"label": "TPE, five runs"}
            left.plot(found["peak"], found["test_loss"], "x", color=draw.BROWN, **named)
            best = min(grid, key=lambda row: row["valid_loss"])["peak"]
            named = {} if seed != seeds[0] else {"label": "the best cosine in validation"}
            right.plot(
                part, 0.5 * (1 + np.cos(np.pi * part)) * best, color=draw.GREY, linewidth=0.8,
                **named,
            )  # fmt: skip
        left.set_xscale("log")
        lowest = min(r.metrics["test_loss"] for r in records if r.method == "grid")
        left.set_ylim(0.95 * lowest, 1.6 * lowest)
        left.set_xlabel("peak of the learning rate")
        left.set_ylabel("test loss of fresh runs")
        left.legend()
        right.set_xlabel("part of the run")
        right.set_ylabel("learning rate")
        right.legend()
        drawn.suptitle("Five metagradients of short runs find the best of twenty cosines")
    return [path]
