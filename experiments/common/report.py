"""One page and one picture of all finished runs, next to the published figures."""

from pathlib import Path
from typing import Any

from experiments.common import record
from experiments.common.catalog import discover, folder_of
from experiments.common.outputs import RunnerError

SHOWN = (1e-3, 1e1)  # range of the picture; what lies outside is drawn at its edge
STATUS = {True: "met", False: "**not met**", None: "not judged"}


def collect(results: Path, package: str = "experiments") -> list[dict[str, Any]]:
    """The summaries of all finished runs: those under `results`, else the committed ones."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    committed = [folder_of(package) / name / "results/summary.json" for name in discover(package)]
    fresh = sorted(results.rglob("summary.json")) if results.is_dir() else []
    for path in [*(path for path in committed if path.exists()), *fresh]:
        summary = record.read_json(path)
        run = summary["run"]
        if run["status"] != "finished":
            continue
        key = (run["experiment"], run["preset"])
        # Two finished runs of one preset: the one that ended last is the current one.
        if key not in found or run["ended"] >= found[key]["run"]["ended"]:
            found[key] = summary
    return [found[key] for key in sorted(found)]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value).replace("|", "\\|")


def markdown(summaries: list[dict[str, Any]], picture: str) -> str:
    """The page: a row for each claim of each run, then how each run was made."""
    lines = [
        "# Results of the experiments",
        "",
        "Written by `python -m experiments report` from saved summaries. Every value is computed",
        "from the last record of each seed; the bounds are those of each `expected.json`.",
        "The picture leaves out claims whose value or bound is not positive; the table has all.",
        "",
        f"![Every claim: met or not, and by how much]({picture})",
        "",
        "| experiment | preset | claim | published | ours | bound | seeds | minutes | status |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for summary in summaries:
        run = summary["run"]
        for verdict in summary["verdicts"]:
            cells = (
                run["experiment"],
                run["preset"],
                _cell(verdict["name"]),
                _cell(verdict["published"]),
                _cell(verdict["value"]),
                f"{verdict['relation']} {_cell(verdict['bound'])}",
                str(len(run["seeds"])),
                f"{run['minutes']:.1f}",
                STATUS[verdict["met"]],
            )
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## How they were made", ""]
    for summary in summaries:
        run = summary["run"]
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        revision = run["revision"][:12] + (" with uncommitted changes" if run["dirty"] else "")
        lines.append(
            f"- {run['experiment']}, preset {run['preset']}: revision {revision}; {versions}; "
            f"{run['device']}, {run['cores']} host cores; {run['started']} to {run['ended']}."
        )
    return "\n".join(lines) + "\n"


def _relative_to_bound(verdict: dict[str, Any]) -> float | None:
    """value / bound, or bound / value where more is better: met if at most one."""
    value, bound = verdict["value"], verdict["bound"]
    if value is None or value <= 0 or bound <= 0:
        return None
    ratio = value / bound if verdict["relation"][0] == "<" else bound / value
    return min(max(ratio, SHOWN[0]), SHOWN[1])


def picture(summaries: list[dict[str, Any]], path: Path) -> None:
    """One row per run, one dot per claim that has a positive value and bound."""
    from experiments.common import figures

    with figures.figure(path, width=10.0, height=1.6 + 0.42 * len(summaries)) as (_, axes):
        axes.axvline(1.0, color=figures.BLACK, linewidth=1)
        labels = []
        for row, summary in enumerate(summaries):
            verdicts = summary["verdicts"]
            met = sum(verdict["met"] is True for verdict in verdicts)
            run = summary["run"]
            preset = "" if run["preset"] == "cpu" else f", {run['preset']}"
            labels.append(f"{run['experiment']}{preset}: {met} of {len(verdicts)} met")
            for i, verdict in enumerate(verdicts):
                part = _relative_to_bound(verdict)
                if part is None:
                    continue
                # Dots of a row lie at five heights: claims of like values do not hide another.
                height = row + 0.14 * (i % 5 - 2)
                shade = figures.BLUE if verdict["met"] else figures.ORANGE
                axes.plot(part, height, marker="o", markersize=5, color=shade, alpha=0.85)
        axes.set(
            xscale="log",
            xlim=(SHOWN[0] / 1.3, SHOWN[1] * 1.3),
            xlabel="value relative to its bound (left of 1: met)",
            title="Every claim of every experiment: blue is met, orange is not",
        )
        axes.set_yticks(range(len(summaries)), labels)
        axes.set_ylim(len(summaries) - 0.5, -0.5)


def write(results: Path, docs: Path, package: str = "experiments", smoke: bool = True) -> Path:
    """Writes `experiments.md` and `figures/report.png` under `docs`; returns the page.

    Runs of the preset `smoke` only show that the code runs: `smoke=False` leaves them out.
    """
    summaries = collect(results, package)
    if not smoke:
        summaries = [summary for summary in summaries if summary["run"]["preset"] != "smoke"]
    if not summaries:
        raise RunnerError(
            f"there is no finished run under {results} and no committed summary; run one with: "
            "python -m experiments run NAME"
        )
    page = docs / "experiments.md"
    picture(summaries, docs / "figures" / "report.png")
    page.write_text(markdown(summaries, "figures/report.png"), "utf-8")
    return page
