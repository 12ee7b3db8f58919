"""The picture of `many`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

TITLES = {"breast_cancer": "breast cancer", "digits_3_8": "digits, 3 against 8"}
WORDS = {
    "shared": "one for all\n(∞)",
    "prior_1e0": "1",
    "prior_1em1": "0.1",
    "prior_1em2": "0.01",
    "prior_1em3": "0.001",
    "prior_1em4": "0.0001",
    "free": "none\n(0)",
    "chosen": "chosen",
}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    tasks = [t for t in TITLES if any(r.method == f"{t}_shared" for r in records)]
    path = out / "figures" / "strengths.png"
    with draw.figure(path, columns=len(tasks), width=6.0 * len(tasks), height=4.4) as (drawn, all_):
        for axes, task in zip(np.atleast_1d(all_), tasks, strict=True):
            shared = _losses(records, f"{task}_shared")
            shown = [m for m in WORDS if _losses(records, f"{task}_{m}")]
            for i, method in enumerate(shown):
                found = _losses(records, f"{task}_{method}")
                ratios = np.array([found[s] / shared[s] for s in sorted(found)])
                shade = draw.BLUE if method == "chosen" else draw.GREY
                axes.scatter(np.full(len(ratios), i), ratios, color=shade, s=24)
                middle = np.exp(np.mean(np.log(ratios)))
                axes.plot([i - 0.3, i + 0.3], [middle, middle], color=shade)
            axes.axhline(1, color=draw.BLACK, linewidth=1)
            axes.set_yscale("log")
            axes.set_xticks(range(len(shown)), [WORDS[m] for m in shown])
            axes.set_xlabel("strength of the prior")
            axes.set_title(TITLES[task])
        np.atleast_1d(all_)[0].set_ylabel("test loss over that of one shared penalty")
    return [path]


def _losses(records: list[record.Record], method: str) -> dict[int, float]:
    return {r.seed: r.metrics["test_loss"] for r in records if r.method == method}
