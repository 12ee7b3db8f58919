"""The pictures of `many`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import expected, record
from experiments.common import figures as draw
from experiments.many.sets import TITLES

BASE = "one_repeated"
WORDS = {"none": "one per feature, no prior", "chosen": "one per feature, prior chosen"}
SHADES = {"none": draw.GREY, "chosen": draw.BLUE}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    names = [n for n in TITLES if any(r.method == f"{n}_chosen" for r in records)]
    return [_effects(records, names, out / "figures" / "effects.png")]


def _effects(records: list[record.Record], names: list[str], path: Path) -> Path:
    """All sets at a glance: how test loss changes, and the interval over the draws."""
    told = {
        (name, arm): _change(records, f"{name}_{arm}", f"{name}_{BASE}")
        for name in names
        for arm in WORDS
    }
    names = sorted(names, key=lambda name: -told[name, "chosen"]["mean"])
    height = 1.6 + 0.36 * len(names)
    with draw.figure(path, columns=1, width=8.0, height=height) as (drawn, axes):
        for arm, shift in (("none", 0.16), ("chosen", -0.16)):
            rows = [told[name, arm] for name in names]
            middles = np.array([row["mean"] for row in rows])
            ends = np.array([[row["mean"] - row["low"], row["high"] - row["mean"]] for row in rows])
            axes.errorbar(
                middles, np.arange(len(names)) + shift, xerr=ends.T, fmt="o", markersize=5,
                color=SHADES[arm], elinewidth=2, label=WORDS[arm],
            )  # fmt: skip
        axes.axvline(0, color=draw.BLACK, linewidth=1)
        axes.set_yticks(range(len(names)), [TITLES[name] for name in names])
        axes.set_xscale("symlog", linthresh=2, linscale=1.5)
        ticks = [-10, -1, 0, 1, 10, 100, 1000]
        low, high = axes.get_xlim()
        axes.set_xticks([t for t in ticks if low <= t <= high])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g} %" if x else "0")
        axes.minorticks_off()
        axes.set_xlabel("test loss against one penalty (repeated folds): mean and 95 % interval")
        axes.set_title("The chosen prior keeps the gains and takes the losses away")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return path


def _change(records: list[record.Record], a: str, b: str) -> dict[str, Any]:
    told = expected.paired(records, "test_loss", a, b, ratio=True)
    return {end: 100 * (told[end] - 1) for end in ("mean", "low", "high")}
