"""One page and one picture of all finished runs: a row per experiment, and all claims behind it."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common import expected, record, uncertainty
from experiments.common.catalog import claim_of, discover, folder_of
from experiments.common.outputs import RunnerError
from experiments.common.protocol import FIRST_TUNING

BOLD = {"met": "met", "not met": "**not met**", "within noise": "within noise"}
EDGE = 300.0  # per cent: what lies outside is drawn at the edge of the picture


class Row(NamedTuple):
    """What the report says of one run: its headline, judged, and all its other verdicts."""

    run: dict[str, Any]
    claim: str
    verdict: expected.Verdict
    ours: dict[str, Any] | None
    opponent: dict[str, Any] | None
    gain: tuple[float, float, float] | None  # per cent, and its interval
    published: str
    scale: str
    verdicts: list[expected.Verdict]


def collect(results: Path, package: str = "experiments") -> list[dict[str, Any]]:
    """The summaries of all finished runs: those under `results`, else the committed ones.

    A run of some methods, with settings of its own, or on seeds for tuning, is not its preset's.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    committed = [folder_of(package) / name / "results/summary.json" for name in discover(package)]
    fresh = sorted(results.rglob("summary.json")) if results.is_dir() else []
    for path in [*(path for path in committed if path.exists()), *fresh]:
        summary = record.read_json(path)
        run = summary["run"]
        own = run.get("methods") or run.get("changed") or max(run["seeds"]) >= FIRST_TUNING
        if run["status"] != "finished" or own:
            continue
        key = (run["experiment"], run["preset"])
        # Two finished runs of one preset: the one that ended last is the current one.
        if key not in found or run["ended"] >= found[key]["run"]["ended"]:
            found[key] = summary
    return [found[key] for key in sorted(found)]


def row(summary: dict[str, Any], package: str = "experiments") -> Row:
    """Judges a run by the present `expected.json`; its headline is the entry that has one."""
    run, statistics = summary["run"], summary["statistics"]
    folder = folder_of(package) / run["experiment"]
    if not (folder / "expected.json").exists():
        raise RunnerError(f"there is no {folder / 'expected.json'} to judge a run by")
    entries = expected.load(folder / "expected.json")
    # A claim that was made after the run may read what the run did not measure: not judged.
    verdicts = expected.judge(entries, statistics, run["preset"], partial=True)
    # Without a headline the first claim that this preset is meant for stands for all.
    order = sorted(
        range(len(entries)),
        key=lambda i: (verdicts[i].word == "not judged", "headline" not in entries[i], i),
    )
    entry, verdict = entries[order[0]], verdicts[order[0]]
    # A headline that the run cannot judge yet gives way to another claim, in that claim's words.
    headlined = any("headline" in other for other in entries)
    words = entry.get("headline", {})
    ours, opponent = words.get("ours"), words.get("opponent")
    if not words:
        ours, opponent = _sides(entry["expression"])
    return Row(
        run=run,
        claim=words.get("claim") or (not headlined and claim_of(folder)) or entry["name"],
        verdict=verdict,
        ours=_statistics(ours, statistics),
        opponent=_statistics(opponent, statistics),
        gain=_gain(ours, opponent, verdict, statistics, words.get("better")),
        published=str(words.get("published") or entry.get("published") or "–"),
        scale=words.get("scale", "–"),
        verdicts=verdicts,
    )


def _sides(expression: str) -> tuple[str | None, str | None]:
    """The two statistics of `a.x.mean - b.x.mean` or their ratio, if the expression is that."""
    for sign in (" / ", " - "):
        left, found, right = expression.partition(sign)
        names = [side.strip().removesuffix(".mean") for side in (left, right)]
        plain = all(name.replace(".", "").replace("_", "").isalnum() for name in names)
        if found and plain and left.strip().endswith(".mean") and right.strip().endswith(".mean"):
            return names[0], names[1]
    return None, None


def _statistics(path: str | None, statistics: dict[str, Any]) -> dict[str, Any] | None:
    found: Any = statistics
    for key in (path or "").split(".") if path else ():
        found = found.get(key) if isinstance(found, dict) else None
    return found if path and isinstance(found, dict) and "mean" in found else None


def _gain(
    ours: str | None,
    opponent: str | None,
    verdict: expected.Verdict,
    statistics: dict[str, Any],
    better: str | None = None,
) -> tuple[float, float, float] | None:
    """By how much ours is better than the opponent, in per cent; else than the bound.

    What is better, `less` or `more`, is that of the claim unless told. Decibels have no per cent.
    """
    sign = -1 if verdict.relation[0] == "<" else 1
    sides = _statistics(ours, statistics), _statistics(opponent, statistics)
    if sides[0] and sides[1]:
        if min(sides[0]["mean"], sides[1]["mean"]) < 0:
            return None
        sign = {"less": -1, "more": 1}.get(better or "", sign)
        expression = f"{ours}.mean / {opponent}.mean"
        value, spread = expected.evaluate(expression, statistics), None
        spread = uncertainty.spread(expression, statistics)
        ends = (spread.low, spread.high) if spread else (value, value)
    elif verdict.value is not None and verdict.value > 0 and verdict.bound > 0:
        value = verdict.value / verdict.bound
        low, high = (verdict.low, verdict.high) if verdict.low is not None else (None, None)
        ends = (value, value) if low is None or high is None else (low, high)
        ends = ends if low is None else (ends[0] / verdict.bound, ends[1] / verdict.bound)
    else:
        return None
    told = [100 * sign * (x - 1) for x in (value, *ends)]
    if not all(math.isfinite(x) for x in told):
        return None
    return told[0], min(told[1:]), max(told[1:])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value).replace("|", "\\|")


def _plus_minus(told: dict[str, Any] | None) -> str:
    if told is None:
        return "–"
    mean, std = told["mean"], told["std"]
    if told["seeds"] == 1 or not (0 < std < math.inf):
        return f"{mean:.4g}" + (" ± 0" if told["seeds"] > 1 and std == 0 else "")
    # As many digits of the mean as the deviation lets stand.
    digits = 1 - math.floor(math.log10(std))
    return f"{mean:.{max(digits, 0)}f} ± {std:.2g}"


def _interval(verdict: expected.Verdict) -> str:
    value = _cell(verdict.value)
    return value if verdict.low is None else f"{value} [{verdict.low:.3g}, {verdict.high:.3g}]"


def _table(header: str, alignment: str, rows: list[tuple[str, ...]]) -> list[str]:
    return [header, alignment, *("| " + " | ".join(cells) + " |" for cells in rows)]


def headlines(rows: list[Row]) -> list[str]:
    """One row per experiment."""
    told = []
    for row in rows:
        run, verdict = row.run, row.verdict
        preset = "" if run["preset"] == "cpu" else f" ({run['preset']})"
        told.append(
            (
                f"{run['experiment']}{preset}",
                _cell(row.claim),
                _plus_minus(row.ours) if row.ours else _cell(verdict.value),
                _plus_minus(row.opponent),
                _cell(row.published),
                _cell(row.scale),
                f"{BOLD.get(verdict.word, verdict.word)}: {_interval(verdict)} "
                f"{verdict.relation} {_cell(verdict.bound)}",
                f"{run['minutes']:.1f}"
                + (f" ({run['cpu_minutes']:.1f})" if "cpu_minutes" in run else ""),
            )
        )
    return _table(
        "| experiment | claim | ours | opponent | published | scale | verdict "
        "| minutes (of all cores) |",
        "| --- | --- | ---: | ---: | --- | --- | --- | ---: |",
        told,
    )


def claims(rows: list[Row]) -> list[str]:
    """All claims of all runs."""
    told = [
        (
            row.run["experiment"],
            row.run["preset"],
            _cell(verdict.name),
            _cell(verdict.published),
            _interval(verdict),
            f"{verdict.relation} {_cell(verdict.bound)}",
            str(len(row.run["seeds"])),
            BOLD.get(verdict.word, verdict.word),
        )
        for row in rows
        for verdict in row.verdicts
    ]
    return _table(
        "| experiment | preset | claim | published | ours | bound | seeds | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
        told,
    )


def markdown(rows: list[Row], picture: str) -> str:
    """The page: headlines on one screen; all claims and how each run was made, folded away."""
    counts = {
        word: sum(verdict.word == word for row in rows for verdict in row.verdicts)
        for word in expected.WORDS
    }
    lines = [
        "# Results of the experiments",
        "",
        "Written by `python -m experiments report` from saved summaries: the headline of each",
        "experiment, mean ± standard deviation over seeds. A claim on means is judged by its 95 %",
        "interval, paired over seeds: *met* or *not met* if the whole interval is on one side of",
        "the bound, *within noise* if it holds it. A dash: not applicable, or not known to us.",
        "",
        *headlines(rows),
        "",
        f"![Gain of each headline over its opponent, with its interval]({picture})",
        "",
        '<details markdown="1">',
        f"<summary>All claims: {counts['met']} met, {counts['not met']} not met, "
        f"{counts['within noise']} within noise</summary>",
        "",
        *claims(rows),
        "",
        "</details>",
        "",
        '<details markdown="1">',
        "<summary>How the runs were made</summary>",
        "",
    ]
    for row in rows:
        run = row.run
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        revision = run["revision"][:12] + (" with uncommitted changes" if run["dirty"] else "")
        lines.append(
            f"- {run['experiment']}, preset {run['preset']}: revision {revision}; {versions}; "
            f"{run['device']}, {run['cores']} host cores; {run['started']} to {run['ended']}."
        )
    return "\n".join([*lines, "", "</details>"]) + "\n"


def picture(rows: list[Row], path: Path) -> None:
    """The gain of every headline, in per cent, with its interval."""
    from experiments.common import figures

    shades = {"met": figures.BLUE, "not met": figures.ORANGE, "within noise": figures.GREY}
    drawn = [(row, row.gain) for row in rows if row.gain is not None]
    with figures.figure(path, width=9.0, height=1.6 + 0.32 * len(drawn)) as (_, axes):
        axes.axvline(0.0, color=figures.BLACK, linewidth=1)
        labels = []
        for height, (row, gain) in enumerate(drawn):
            middle, low, high = (min(max(x, -EDGE), EDGE) for x in gain)
            shade = shades.get(row.verdict.word, figures.GREY)
            axes.plot([low, high], [height, height], color=shade, linewidth=2.5, alpha=0.6)
            axes.plot(middle, height, marker="o", markersize=7, color=shade)
            preset = "" if row.run["preset"] == "cpu" else f", {row.run['preset']}"
            against = "" if row.opponent else " (bound)"
            labels.append(f"{row.run['experiment']}{preset}{against}")
        axes.set_xscale("symlog", linthresh=10.0)
        ticks = [-100, -30, -10, -3, 0, 3, 10, 30, 100]
        axes.set_xticks(
            ticks, [f"{tick:+d} %".replace("-", "−") if tick else "0" for tick in ticks]
        )
        axes.set(
            xlim=(-EDGE * 1.1, EDGE * 1.1),
            xlabel="better than the opponent, or than the bound, by",
            title="Headlines with 95 % intervals: blue is met, orange is not, grey is within noise",
        )
        axes.set_yticks(range(len(drawn)), labels)
        axes.set_ylim(len(drawn) - 0.5, -0.5)


def write(results: Path, docs: Path, package: str = "experiments", smoke: bool = True) -> Path:
    """Writes `experiments.md` and `figures/report.png` under `docs`; returns the page.

    Runs of the preset `smoke` only show that the code runs: `smoke=False` leaves them out.
    """
    summaries = collect(results, package)
    if not smoke:
        summaries = [summary for summary in summaries if summary["run"]["preset"] != "smoke"]
    known = discover(package)
    summaries = [summary for summary in summaries if summary["run"]["experiment"] in known]
    if not summaries:
        raise RunnerError(
            f"there is no finished run under {results} and no committed summary; run one with: "
            "python -m experiments run NAME"
        )
    rows = [row(summary, package) for summary in summaries]
    page = docs / "experiments.md"
    picture(rows, docs / "figures" / "report.png")
    page.write_text(markdown(rows, "figures/report.png"), "utf-8")
    return page
