"""One page and one picture of all finished runs, next to the published figures."""

from pathlib import Path
from typing import Any

from experiments.common import record
from experiments.common.cli import discover, folder_of
from experiments.common.outputs import RunnerError

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
        "",
        f"![Every value divided by its bound]({picture})",
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


def picture(summaries: list[dict[str, Any]], path: Path) -> None:
    """One mark a claim, at value / bound: left of the line is below the bound."""
    from experiments.common import figures

    rows = [
        (f"{summary['run']['experiment']}: {verdict['name']}", verdict)
        for summary in summaries
        for verdict in summary["verdicts"]
        if verdict["value"] is not None and verdict["bound"] > 0 and verdict["value"] > 0
    ]
    with figures.figure(path, width=16.0, height=1.2 + 0.4 * max(len(rows), 1)) as (_, axes):
        axes.axvline(1.0, color=figures.BLACK, linewidth=1)
        for height, (_, verdict) in enumerate(rows):
            axes.plot(
                verdict["value"] / verdict["bound"],
                height,
                marker="<" if verdict["relation"][0] == "<" else ">",
                markersize=9,
                color=figures.BLUE if verdict["met"] else figures.ORANGE,
            )
        axes.set(
            xscale="log", xlabel="value / bound (arrow: the side it should be on; orange: unmet)"
        )
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)


def write(results: Path, docs: Path, package: str = "experiments") -> Path:
    """Writes `experiments.md` and `figures/report.png` under `docs`; returns the page."""
    summaries = collect(results, package)
    if not summaries:
        raise RunnerError(
            f"there is no finished run under {results} and no committed summary; run one with: "
            "python -m experiments run NAME"
        )
    page = docs / "experiments.md"
    picture(summaries, docs / "figures" / "report.png")
    page.write_text(markdown(summaries, "figures/report.png"), "utf-8")
    return page
