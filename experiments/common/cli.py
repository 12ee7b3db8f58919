"""`python -m experiments list | new NAME | run NAME | report`."""

import argparse
import contextlib
import importlib.util
import inspect
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bilevel.run.lock import locked
from experiments.common import expected, outputs, record, report, settings, side_by_side, template
from experiments.common.catalog import claim_of, configuration, discover, folder_of, part
from experiments.common.files import DataMissing, HashMismatch
from experiments.common.outputs import RunnerError
from experiments.common.protocol import FIRST_TUNING

SEEDS = {"smoke": 1, "cpu": 3, "paper": 3}
SHADES = {"met": "green", "not met": "red", "within noise": "yellow", "not judged": "dim"}
NEEDED = ("matplotlib", "optuna", "PIL", "pooch", "rich", "sklearn")


def require(modules: Sequence[str] = NEEDED) -> None:
    """Raises `RunnerError` if a library that the experiments use is not installed."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        raise RunnerError(
            f"the experiments need {', '.join(absent)}: "
            "python -m pip install 'bilevel[experiments]'"
        )


def execute(
    name: str,
    *,
    preset: str = "cpu",
    seeds: Sequence[int] | None = None,
    out: Path | None = None,
    resume: bool = False,
    changes: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    jobs: int = 1,
    package: str = "experiments",
) -> tuple[Path, dict[str, Any]]:
    """Runs an experiment, draws its figures and judges it; returns its folder and its summary."""
    module, config = part(package, name, "run"), configuration(package, name, preset)
    config = settings.changed(config, changes)
    seeds = range(SEEDS[preset]) if seeds is None else seeds
    out = Path("results") / name / preset if out is None else out
    folder = folder_of(package) / name
    if methods is not None:
        methods = _methods(name, module, methods)
    identity = outputs.describe(
        name, preset, config, folder, methods=methods, changed=sorted(changes)
    )
    with _alone(out):
        run = outputs.claim(out, identity, seeds, resume)
        return out, _execute(name, module, config, out, run, resume, package, jobs)


def _methods(name: str, module: Any, wanted: Sequence[str]) -> list[str]:
    """The methods of a run of some only, in the order of the experiment."""
    if "methods" not in inspect.signature(module.run).parameters:
        raise RunnerError(
            f"`--methods`: {name} runs its methods together; its run() takes no `methods`"
        )
    unknown = [method for method in wanted if method not in module.METHODS]
    if unknown or not wanted:
        raise RunnerError(
            f"`--methods`: {name} has no method {', '.join(map(repr, unknown)) or repr('')}; it "
            f"has: {', '.join(module.METHODS)}"
        )
    return [method for method in module.METHODS if method in wanted]


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder for one process; a second one is told whose it is."""
    with contextlib.ExitStack() as stack:
        try:  # beside the folder: a lock inside would make it one that is not empty
            stack.enter_context(locked("--out", out, out.with_name(f".{out.name}.lock")))
        except OSError as error:
            raise RunnerError(str(error)) from None
        yield


def _execute(
    name: str, module: Any, config: Any, out: Path, run: dict[str, Any], resume: bool,
    package: str, jobs: int,
) -> dict[str, Any]:  # fmt: skip
    outputs.save(out, run)
    if jobs > 1 or (out / side_by_side.FOLDER).exists():
        start = time.monotonic()
        run = side_by_side.run(name, config, out, run, package, jobs)
        run["minutes"] += (time.monotonic() - start) / 60
    else:
        side_by_side.seeds_of(module, config, out, run, resume)
    run.update(status="finished", ended=outputs.now())
    outputs.save(out, run)
    summary = summarise(name, out, package)
    record.write_json(out / "summary.json", summary)
    return summary


def summarise(name: str, out: Path, package: str = "experiments") -> dict[str, Any]:
    """Draws the figures of a finished run and judges it by `expected.json`, from records alone."""
    run = record.read_json(out / outputs.FILE)
    records = record.read(out)
    statistics = expected.summarise(records)
    own = getattr(part(package, name, "run"), "summary", None)
    if own is not None:
        statistics = {**statistics, **own(records)}
    entries = expected.load(folder_of(package) / name / "expected.json")
    partial = bool(run.get("methods"))
    verdicts = expected.judge(entries, statistics, run["preset"], partial=partial)
    figures: list[Path] = []
    try:
        figures = part(package, name, "figure").figures(out)
    except (KeyError, IndexError, ValueError, OSError):
        if not partial:  # a picture of all methods cannot be drawn from some
            raise
    return {
        "run": {key: value for key, value in run.items() if key != "begun"},
        "statistics": statistics,
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "figures": sorted(Path(figure).name for figure in figures),
    }


def show(summary: dict[str, Any], chosen: Sequence[str] | None = None) -> None:
    """Prints the last record of every method and the inequalities, met or not.

    `chosen` names the metrics of the table, beside the cost; None shows all there are.
    """
    from rich.console import Console
    from rich.table import Table

    run, statistics = summary["run"], summary["statistics"]
    console = Console()
    methods = {
        name: metrics
        for name, metrics in statistics.items()
        if isinstance(metrics, dict) and "mean" in (metrics.get("cost") or {})
    }
    columns = list(dict.fromkeys(metric for metrics in methods.values() for metric in metrics))
    if chosen is not None:
        columns = [metric for metric in ("cost", *chosen) if metric in columns]
    seeds = len(run["seeds"])
    results = Table(title=f"{run['experiment']}, preset {run['preset']}, mean of {seeds} seed(s)")
    results.add_column("method", no_wrap=True)
    for metric in columns:
        results.add_column(metric.replace("_", " "), justify="right")
    for name, metrics in methods.items():
        cells = (metrics.get(metric) for metric in columns)
        results.add_row(name, *(f"{cell['mean']:.4g}" if cell else "" for cell in cells))
    console.print(results)
    claims = Table("claim", "value", "bound", "", title="what was expected")
    for verdict in summary["verdicts"]:
        value = "" if verdict["value"] is None else f"{verdict['value']:.4g}"
        if verdict["low"] is not None:
            value += f" [{verdict['low']:.3g}, {verdict['high']:.3g}]"
        bound = f"{verdict['relation']} {verdict['bound']:g}"
        word = f"[{SHADES[verdict['word']]}]{verdict['word']}[/]"
        claims.add_row(verdict["name"], value, bound, f"{word} {verdict['reason']}".strip())
    console.print(claims)


def _list(package: str) -> int:
    width = max(map(len, discover(package)), default=0)
    for name in discover(package):
        print(f"{name:{width}}  {claim_of(folder_of(package) / name)}".rstrip())
    return 0


def _run(options: argparse.Namespace, package: str) -> int:
    require()
    changes, methods = options.set or [], options.methods
    if options.jobs < 1:
        raise RunnerError(f"`--jobs`: at least 1 process runs the seeds; got {options.jobs}")
    if options.commit_summary and (changes or methods):
        raise RunnerError("`--commit-summary` keeps a preset as it is: leave out --set, --methods")
    seeds = None if options.seeds is None else settings.seeds(options.seeds)
    if options.commit_summary and seeds and max(seeds) >= FIRST_TUNING:
        raise RunnerError(
            f"`--commit-summary`: seeds of {FIRST_TUNING} and more are for choosing settings, and "
            f"are not reported; got --seeds {options.seeds}"
        )
    from experiments.common import figures

    with figures.formats(options.format.split(",")):
        out, summary = execute(
            options.name,
            preset=options.preset,
            seeds=seeds,
            out=options.out,
            resume=options.resume,
            changes=changes,
            methods=None if methods is None else methods.split(","),
            jobs=options.jobs,
            package=package,
        )
    show(summary, getattr(part(package, options.name, "run"), "TABLE", None))
    print(f"records, figures and summary are in {out}")
    if options.commit_summary:
        committed = folder_of(package) / options.name / "results"
        record.write_json(committed / "summary.json", summary)
        for name in summary["figures"]:  # in their folder, or beside the records
            drawn = out / "figures" / name
            shutil.copyfile(drawn if drawn.exists() else out / name, committed / name)
        print(f"summary and figures kept in {options.name}/results")
    unmet = any(verdict["word"] == "not met" for verdict in summary["verdicts"])
    return 1 if options.check and unmet else 0


def _new(options: argparse.Namespace, package: str) -> int:
    folder = template.write(options.name, package)
    print(f"written: {folder}; try it: python -m experiments run {options.name} --preset smoke")
    return 0


def _report(options: argparse.Namespace, package: str) -> int:
    require(("matplotlib",))
    folder = options.docs if options.commit else options.results
    page = report.write(options.results, folder, package, smoke=not options.commit)
    print(f"report written to {page}")
    if not options.commit:
        print("the committed page in docs/ is as it was; --commit writes that one")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = main_parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the experiments and what each claims")
    new = commands.add_parser("new", help="write the template of an experiment")
    new.add_argument("name")
    run = commands.add_parser("run", help="run one experiment and judge it")
    run.add_argument("name")
    run.add_argument("--preset", default="cpu", help="smoke, cpu (default) or paper")
    run.add_argument(
        "--seeds", help="N for 0 .. N-1, or seeds such as 3-12 (default: 1 for smoke, else 3)"
    )
    run.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="a setting in place of the preset's"
    )
    run.add_argument("--methods", metavar="A,B", help="some methods only (default: all)")
    run.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
    run.add_argument("--format", default="png", help="of figures: png (always), pdf, svg; a,b")
    run.add_argument("--out", type=Path, help="output folder (default: results/NAME/PRESET)")
    run.add_argument("--resume", action="store_true", help="continue the run that --out holds")
    run.add_argument("--check", action="store_true", help="exit 1 if a claim is not met")
    run.add_argument(
        "--commit-summary",
        action="store_true",
        help="also keep summary and figures in the experiment's own folder, to be committed",
    )
    report = commands.add_parser("report", help="one page and picture of all finished runs")
    report.add_argument("--results", type=Path, default=Path("results"), help="folder of outputs")
    report.add_argument(
        "--commit", action="store_true", help="write the committed page, without smoke runs"
    )
    report.add_argument("--docs", type=Path, default=Path("docs"), help="where --commit writes")
    return main_parser


def main(arguments: Sequence[str] | None = None, package: str = "experiments") -> int:
    """Runs the command line and returns its exit status; 2 for an error the user can put right."""
    options = parser().parse_args(arguments)
    try:
        match options.command:
            case "list":
                return _list(package)
            case "run":
                return _run(options, package)
            case "new":
                return _new(options, package)
            case _:
                return _report(options, package)
    except (RunnerError, DataMissing, HashMismatch) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = f"; continue with: {_again(options)}" if options.command == "run" else ""
        print(f"\ninterrupted{resume}", file=sys.stderr)
        return 130


def _again(options: argparse.Namespace) -> str:
    """The command that continues an interrupted run."""
    words = ["python -m experiments run", options.name, "--preset", options.preset]
    words += ["--seeds", options.seeds] if options.seeds else []
    words += [word for change in options.set or [] for word in ("--set", shlex.quote(change))]
    words += ["--methods", options.methods] if options.methods else []
    words += ["--jobs", str(options.jobs)] if options.jobs > 1 else []
    words += ["--out", str(options.out)] if options.out else []
    return " ".join([*words, "--resume"])
