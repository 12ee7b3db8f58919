"""The pictures of `lstm`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

SETS = {"wikitext2": "WikiText-2", "ptb": "Penn Treebank", "markov": "a made-up text"}
SHADES = {"untuned": draw.GREY, "tpe": draw.BROWN, "few": draw.BLUE, "many": draw.ORANGE}


def figures(out: Path) -> list[Path]:
    """Perplexities along the runs and at their ends, and what was learned."""
    records = record.read(out)
    sets = [name for name in SETS if any(r.method == f"{name}_many" for r in records)]
    return [
        _perplexities(records, sets, out / "figures" / "perplexities.png"),
        _learned(records, sets, out, out / "figures" / "learned.png"),
    ]


def _last(records: list[record.Record], method: str) -> list[dict[str, Any]]:
    return [r.metrics for (name, _), r in sorted(record.final(records).items()) if name == method]


def _label(method: str, ends: list[dict[str, Any]]) -> str:
    count = f"{ends[0]['hyperparameters']:,}".replace(",", " ")
    return {"untuned": "not tuned", "tpe": f"{count} by TPE"}.get(method, f"{count} tuned")


def _perplexities(records: list[record.Record], sets: list[str], path: Path) -> Path:
    """Left: best validation perplexity so far against cost. Right: each seed's final figures."""
    size = {"rows": len(sets), "columns": 2, "width": 11.0, "height": 3.9 * len(sets)}
    with draw.figure(path, **size) as (_, axes):
        for (left, right), name in zip(np.reshape(axes, (-1, 2)), sets, strict=True):
            for place, (method, shade) in enumerate(SHADES.items()):
                ends = _last(records, f"{name}_{method}")
                cost, values = draw.curves(records, f"{name}_{method}", "best_perplexity")
                middle = np.median(values, axis=0)
                left.plot(cost, middle, color=shade, label=_label(method, ends))
                left.fill_between(
                    cost, values.min(0), values.max(0), color=shade, alpha=0.18, linewidth=0
                )
                for shift, (part, marker) in enumerate((("validation", "o"), ("test", "s"))):
                    seeds = [end[f"{part}_perplexity"] for end in ends]
                    where = place + 0.3 * shift - 0.15
                    right.plot([where] * len(seeds), seeds, marker, color=shade, markersize=7)
                    right.annotate(
                        f"{np.mean(seeds):.1f}", (where, max(seeds)), xytext=(0, 7),
                        textcoords="offset points", ha="center", fontsize=9,
                    )  # fmt: skip
            left.set(
                xlabel="cost (inner-gradient evaluations)",
                ylabel="best validation perplexity so far",
                title=SETS[name],
            )
            ends = np.concatenate([line.get_ydata()[-1:] for line in left.get_lines()])
            left.set_ylim(ends.min() * 0.97, ends.max() * 1.45)
            left.legend(title="regularization strengths")
            right.set(
                ylabel="perplexity",
                title="at the best validation point: ● validation  ■ test",
                xlim=(-0.5, 3.5),
            )
            right.margins(y=0.15)
            right.set_xticks(range(4), ["not tuned", "TPE", "few", "many"])
    return path


def _learned(records: list[record.Record], sets: list[str], out: Path, path: Path) -> Path:
    """How the strengths moved, and what single words, units and weights got."""
    seed = min(r.seed for r in records)
    size = {"rows": len(sets), "columns": 3, "width": 14.0, "height": 3.9 * len(sets)}
    with draw.figure(path, **size) as (_, axes):
        for row, name in zip(np.reshape(axes, (-1, 3)), sets, strict=True):
            chosen = [r for r in records if r.seed == seed and r.method == f"{name}_few"]
            cost = [r.cost for r in chosen]
            kinds = [k for k in chosen[0].metrics if k.startswith("rates_")]
            for kind, shade in zip(kinds, draw.OTHERS, strict=False):
                values = [r.metrics[kind][1] for r in chosen]
                row[0].plot(cost, values, color=shade, label=kind.removeprefix("rates_"))
            row[0].set(
                xlabel="cost (inner-gradient evaluations)", ylabel="dropout rate",
                title=f"{SETS[name]}: one rate per kind",
            )  # fmt: skip
            row[0].legend()
            saved = record.load_arrays(out, f"{name}_many_{seed}")
            words = saved["rates_words"]
            row[1].scatter(
                np.arange(1, len(words) + 1), words, s=6, color=draw.ORANGE, rasterized=True
            )
            row[1].set(
                xscale="log", xlabel="word, by frequency", ylabel="dropout rate",
                title="one rate per word",
            )  # fmt: skip
            for kind, shade in zip(("embedding", "inputs", "recurrent"), draw.OTHERS, strict=False):
                decays = np.concatenate(
                    [v.ravel() for k, v in saved.items() if k.startswith("decays") and kind in k]
                )
                row[2].hist(decays, 60, color=shade, label=kind, histtype="step", density=True)
            row[2].set(
                xlabel="log decay", ylabel="density", yscale="log", title="one decay per weight"
            )
            row[2].legend()
    return path
