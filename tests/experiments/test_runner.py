"""The runner of the experiments, on toy experiments written into a temporary folder."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("optuna", reason="needs bilevel[experiments]")
pytest.importorskip("matplotlib", reason="needs bilevel[experiments]")

import bilevel
from bilevel.run.lock import locked
from experiments.common import (
    baselines,
    budget,
    catalog,
    cli,
    expected,
    figures,
    record,
    report,
    settings,
)

ROOT = Path(__file__).resolve().parents[2]
numbers = itertools.count()

CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    steps: int = 4
    rate: float = 0.5

def smoke():
    return Config(steps=2)

def cpu():
    return Config()
"""
RUN = """
import os
from experiments.common.record import Records, read

def run(config, seed, out, resume):
    records = Records(out, seed)
    done = len(read(out, seed=seed)) if resume else 0
    records.rewind(step=done)
    for step in range(done + 1, config.steps + 1):
        if (seed, step) == (1, 3) and "TOY_FAILS" in os.environ:
            raise KeyboardInterrupt
        records.append("cg", step, cost=10.0 * step, loss=(1 + seed) * config.rate**step)
    records.append("tpe", 1, cost=10.0, loss=1.0 + seed)
"""
FIGURE = """
from experiments.common import record
from experiments.common.figures import band, cost_axes, figure

def figures(out):
    path = out / "figures" / "loss.png"
    with figure(path) as (_, axes):
        band(axes, record.read(out), "cg", "loss")
        cost_axes(axes, "loss")
    return [path]
"""
EXPECTED = [
    {
        "name": "cg beats TPE",
        "expression": "cg.loss.mean / tpe.loss.mean",
        "relation": "<=",
        "bound": 0.9,
        "source": "ours",
        "published": 0.8,
    },
    {"name": "too good", "expression": "cg.loss.max", "bound": 1e-9, "source": "ours"},
    {
        "name": "paper only",
        "expression": "cg.loss.max",
        "bound": 1.0,
        "source": "ours",
        "presets": ["paper"],
    },
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one toy experiment, and the working directory in an empty folder."""
    name = f"toys_{next(numbers)}"
    folder = tmp_path / name / "toy"
    folder.mkdir(parents=True)
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "not_an_experiment").mkdir()
    (folder / "__init__.py").touch()
    (folder / "config.py").write_text(CONFIG)
    (folder / "run.py").write_text(RUN)
    (folder / "figure.py").write_text(FIGURE)
    (folder / "expected.json").write_text(json.dumps(EXPECTED))
    (folder / "README.md").write_text("# toy\n\nA loss that halves.\n")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(work)
    return name


def run(package, *arguments):
    return cli.main(["run", "toy", *arguments], package)


def lines(out):
    return sorted((out / "records.jsonl").read_text().splitlines())


def test_list_names_every_folder_that_runs(package, capsys):
    assert cli.main(["list"], package) == 0
    assert capsys.readouterr().out == "toy  A loss that halves.\n"


def test_run_writes_everything_and_judges(package, capsys):
    assert run(package, "--seeds", "2", "--commit-summary") == 0
    out = Path("results/toy/cpu")
    told = record.read_json(out / "run.json")
    assert told["status"] == "finished" and told["done"] == [0, 1] and told["minutes"] > 0
    assert told["config"] == {"steps": 4, "rate": 0.5} and told["started"] <= told["ended"]
    assert set(told["versions"]) == {"python", "jax", "jaxlib", "numpy", "optax", "flax"}
    assert str(Path.cwd()) not in (out / "run.json").read_text()
    first = record.read(out)[0]
    assert first == record.Record(0, "cg", 1, 10.0, {"loss": 0.5})
    assert (out / "figures/loss.png").stat().st_size > 5_000
    verdicts = record.read_json(out / "summary.json")["verdicts"]
    # Seeds 0 and 1 end at 1/16 and 2/16; TPE at 1 and 2.
    assert verdicts[0]["value"] == pytest.approx(0.0625, rel=1e-12)
    assert [verdict["met"] for verdict in verdicts] == [True, False, None]
    said = capsys.readouterr().out
    assert "cg beats TPE" in said and "met" in said and "not judged" in said
    committed = catalog.folder_of(package) / "toy/results/summary.json"
    assert record.read_json(committed) == record.read_json(out / "summary.json")


def test_check_turns_an_unmet_claim_into_an_exit_status(package):
    assert run(package, "--preset", "smoke") == 0
    assert run(package, "--preset", "smoke", "--resume", "--check") == 1


def test_default_seeds_depend_on_the_preset(package):
    assert run(package, "--preset", "smoke") == 0
    assert record.read_json(Path("results/toy/smoke/run.json"))["seeds"] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "toi"], "there is no experiment 'toi'; there are: toy"),
        (["run", "toy", "--preset", "paper"], "no preset 'paper'; it has: smoke, cpu"),
        (["run", "toy", "--resume"], "holds no run to resume; leave out --resume"),
        (["report"], "no finished run under results and no committed summary"),
    ],
)
def test_mistakes_are_told_with_what_there_is(package, capsys, arguments, message):
    assert cli.main(arguments, package) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "at least 1, or seeds such as 3-12 or 0,4,100-102"),
        (("--seeds", "3-x"), "got '3-x'"),
        (("--seeds", "5-3"), "got '5-3'"),
        (("--set", "rate"), "`--set` must be key=value, got 'rate'"),
        (("--set", "rats=1"), "there is no setting 'rats'; did you mean 'rate'? there are: steps"),
        (("--set", "rate=fast"), "'rate' must be float such as 0.5, got 'fast'"),
        (("--set", "steps=2.5"), "'steps' must be int such as 4, got '2.5'"),
        (("--methods", "cg"), "toy runs its methods together; its run() takes no `methods`"),
        (("--set", "steps=2", "--commit-summary"), "keeps a preset as it is"),
        (("--format", "png,gif"), "of png, pdf, svg, with commas between, got 'gif'"),
    ],
)
def test_options_are_checked_before_anything_runs(package, capsys, arguments, message):
    assert run(package, *arguments) == 2
    assert message in capsys.readouterr().err and not Path("results").exists()


def test_settings_have_the_types_of_the_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float = 0.5
        sizes: tuple[int, ...] = (1, 2)
        ends: tuple[float, float] = (0.0, 1.0)
        words: int | None = None
        kind: Literal["a", "b"] = "a"
        names: tuple[str, ...] = ()
        on: bool = True

    written = ["rate=2", "sizes=7", "ends=(1, 2)", "words=3", "kind=b", "names=x,y", "on=False"]
    found = settings.changed(Config(), written)
    assert found == Config(2.0, (7,), (1.0, 2.0), 3, "b", ("x", "y"), False)
    assert isinstance(found.rate, float) and isinstance(found.ends[0], float)
    assert settings.changed(found, ["words=None"]).words is None
    for wrong in ("kind=c", "ends=1,2,3", "on=1", "words=x", "names=1"):
        with pytest.raises(cli.RunnerError, match="must be"):
            settings.changed(Config(), [wrong])
    assert settings.seeds("0,4,100-102") == [0, 4, 100, 101, 102]
    assert settings.seeds("7-7") == [7] and settings.seeds("3") == [0, 1, 2]


def test_settings_and_seeds_of_ones_own_make_another_run(package):
    more = ("--preset", "smoke", "--set", "steps=3", "--seeds", "3-4", "--format", "svg,pdf")
    assert run(package, *more, "--out", "here") == 0
    told = record.read_json(Path("here/run.json"))
    assert told["config"]["steps"] == 3 and told["changed"] == ["steps=3"]
    assert told["seeds"] == told["done"] == [3, 4]
    assert {path.suffix for path in Path("here/figures").iterdir()} == {".png", ".svg", ".pdf"}
    values = record.read_json(Path("here/summary.json"))["statistics"]["tpe"]["loss"]["values"]
    assert values == {"3": 4.0, "4": 5.0}
    assert '"values": { "3": 4.0, "4": 5.0 }' in Path("here/summary.json").read_text()
    assert report.collect(Path("here"), package) == []  # a preset that was changed is not one


def test_a_new_experiment_runs_is_judged_and_knows_its_methods(package, capsys):
    assert cli.main(["new", "mine"], package) == 0
    folder = catalog.folder_of(package) / "mine"
    assert sum(len(path.read_text().splitlines()) for path in folder.iterdir()) <= 100
    assert cli.main(["new", "mine"], package) == 2
    assert cli.main(["new", "Mine"], package) == 2
    short = ["--preset", "smoke", "--set", "steps=2"]
    with jax.enable_x64(False):
        assert cli.main(["run", "mine", *short, "--methods", "tuned"], package) == 0
    assert {r.method for r in record.read(Path("results/mine/smoke"))} == {"tuned"}
    assert cli.main(["run", "mine", "--methods", "tuned,best", "--out", "x"], package) == 2
    said = capsys.readouterr().err
    assert "exists already" in said and "lower case" in said
    assert "mine has no method 'best'; it has: untuned, tuned" in said


def test_claims_are_met_not_met_or_within_noise_by_the_paired_interval():
    def table(*values):
        return {"loss": expected.statistics(dict(enumerate(values)))}

    # Far apart from seed to seed, but always in the same order: pairing tells.
    summary = {"a": table(1.0, 2.0, 3.0), "b": table(1.1, 2.1, 3.2), "c": table(1.1, 1.9, 3.1)}

    def verdict(expression, relation="<=", bound=0.0, told=summary):
        entry = {"name": "x", "expression": expression, "relation": relation, "bound": bound}
        return expected.judge([{**entry, "source": "ours"}], told, "cpu")[0]

    less = verdict("a.loss.mean - b.loss.mean")
    usual = expected.interval([-0.1, -0.1, -0.2])
    assert less.word == "met" and less.how == "paired over seeds"
    assert (less.low, less.high) == pytest.approx((usual["low"], usual["high"]), rel=1e-9)
    assert verdict("b.loss.mean - a.loss.mean").word == "not met"
    noisy = verdict("a.loss.mean - c.loss.mean")
    assert noisy.word == "within noise" and noisy.met
    assert verdict("a.loss.mean / c.loss.mean", bound=1).word == "within noise"
    # The worst seed is one number: nothing to pair.
    assert verdict("a.loss.max", ">", 2).word == "met" and verdict("a.loss.max", ">", 2).low is None
    ends = {"a": {"d": expected.interval([0.9, 1.0, 1.2])}}
    assert verdict("a.d.high", "<=", 1.0, ends).word == "within noise"
    assert verdict("a.d.high", "<=", 2.0, ends).word == "met"
    assert verdict("a.d.high", "<=", 0.5, ends).word == "not met"
    # Without the values of seeds the deviations are all there is, and the order is lost.
    for method in summary.values():
        del method["loss"]["values"]
    old = verdict("a.loss.mean - b.loss.mean")
    assert old.word == "within noise" and old.how.startswith("from deviations")


def test_a_folder_that_holds_another_run_is_refused(package, capsys):
    assert run(package, "--preset", "smoke", "--out", "here") == 0
    before = lines(Path("here"))
    capsys.readouterr()
    assert run(package, "--preset", "cpu", "--out", "here", "--resume") == 2
    said = capsys.readouterr().err
    assert "holds another run" in said and "config.steps: there 2, now 4" in said
    assert "preset: there 'smoke', now 'cpu'" in said and "--out" in said
    assert run(package, "--preset", "smoke", "--out", "here") == 2
    assert "Continue it with --resume" in capsys.readouterr().err
    for key, value in (("revision", "f00"), ("code", "f00"), ("versions", {"jax": "0.1"})):
        told = record.read_json(Path("here/run.json"))
        record.write_json(Path("here/run.json"), {**told, key: value})
        assert run(package, "--preset", "smoke", "--out", "here", "--resume") == 2
        assert key in capsys.readouterr().err
        record.write_json(Path("here/run.json"), told)
    assert lines(Path("here")) == before


def test_a_folder_with_other_files_is_refused(package, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    assert run(package, "--out", "mine") == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert run(package, "--out", "mine/thesis.txt") == 2
    assert "is a file" in capsys.readouterr().err


def test_an_edited_source_is_another_run(package, capsys):
    assert run(package, "--preset", "smoke", "--out", "here") == 0
    path = catalog.folder_of(package) / "toy/run.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert run(package, "--preset", "smoke", "--out", "here", "--resume") == 2
    assert "code: there" in capsys.readouterr().err


def test_an_interrupted_run_resumes_to_the_same_records(package, monkeypatch, capsys):
    assert run(package, "--seeds", "2", "--out", "whole") == 0
    monkeypatch.setenv("TOY_FAILS", "1")
    capsys.readouterr()
    assert run(package, "--seeds", "2", "--out", "broken") == 130
    command = "python -m experiments run toy --preset cpu --seeds 2 --out broken --resume"
    assert capsys.readouterr().err == f"\ninterrupted; continue with: {command}\n"
    monkeypatch.delenv("TOY_FAILS")
    told = record.read_json(Path("broken/run.json"))
    assert (told["status"], told["begun"], told["done"]) == ("running", [0, 1], [0])
    with Path("broken/records.jsonl").open("a") as file:
        file.write('{"seed": 1, "method": "cg", "st')  # what a kill in mid-line leaves
    assert run(package, "--seeds", "2", "--out", "broken", "--resume") == 0
    assert Path("broken/records.jsonl").read_bytes() == Path("whole/records.jsonl").read_bytes()


def test_a_folder_belongs_to_one_process(package, capsys):
    with locked("--out", Path("here"), Path(".here.lock")):
        assert run(package, "--preset", "smoke", "--out", "here") == 2
    assert "`--out` here is in use by another run: process" in capsys.readouterr().err
    assert not Path("here").exists()


def test_more_seeds_can_be_added_to_a_finished_run(package):
    assert run(package, "--seeds", "1", "--out", "here") == 0
    assert run(package, "--seeds", "3", "--out", "here", "--resume") == 0
    assert {entry.seed for entry in record.read(Path("here"))} == {0, 1, 2}
    assert len(record.read(Path("here"), seed=0)) == 5


def test_report_puts_the_published_figure_beside_ours(package):
    assert run(package, "--seeds", "2", "--commit-summary") == 0
    assert cli.main(["report", "--results", "beside"], package) == 0
    assert Path("beside/experiments.md").is_file() and not Path("docs").exists()
    assert cli.main(["report", "--results", "nowhere", "--commit"], package) == 0
    page = Path("docs/experiments.md").read_text()
    # Over TPE's 1 and 2, and by 1/16 on both seeds: the interval is that number.
    assert "| toy | A loss that halves. | 0.0938 ± 0.044 | 1.5 ± 0.71 | 0.8 | – | met: " in page
    assert "| toy | cpu | cg beats TPE | 0.8 | 0.0625 [0.0625, 0.0625] | <= 0.9 | 2 | met" in page
    assert "1 met, 1 not met, 0 within noise" in page and "not judged" in page
    assert Path("docs/figures/report.png").stat().st_size > 5_000


def test_the_command_line_runs_from_the_repository_root():
    command = [sys.executable, "-m", "experiments", "run", "no_such_experiment"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr.startswith("error: there is no experiment 'no_such_experiment'; there are:")


def test_records_keep_values_exactly_and_refuse_what_json_cannot_hold(tmp_path):
    records = record.Records(tmp_path, seed=3)
    exact = float(np.float32(0.1))
    records.append(
        "cg", 0, np.float32(2.5), loss=np.float32(0.1), decay=np.arange(3.0), bad=math.nan
    )
    (back,) = record.read(tmp_path)
    assert back[:4] == (3, "cg", 0, 2.5)
    assert back.metrics["loss"] == exact and back.metrics["decay"] == [0.0, 1.0, 2.0]
    assert math.isnan(back.metrics["bad"]) and "NaN" in (tmp_path / "records.jsonl").read_text()
    json.loads((tmp_path / "records.jsonl").read_text(), parse_constant=pytest.fail)
    with pytest.raises(ValueError, match="'random-search' cannot name a method"):
        records.append("random-search", 0, 1.0)
    with pytest.raises(TypeError, match="numbers, strings, lists"):
        records.append("cg", 0, 1.0, path=tmp_path)
    record.save_arrays(tmp_path, "decay", map=np.eye(2))
    np.testing.assert_array_equal(record.load_arrays(tmp_path, "decay")["map"], np.eye(2))


def test_expressions_are_arithmetic_and_nothing_else():
    summary = {"cg": {"loss": {"mean": 0.5, "max": 2.0}}}
    assert expected.evaluate("-cg.loss.mean * 4 + max(cg.loss.max, 1) ** 3", summary) == 6.0
    assert math.isnan(expected.evaluate("1 / (cg.loss.mean - 0.5)", summary))
    for text, message in (
        ("cg.los.mean", "asks for 'los', but there is only: loss"),
        ("cg.loss", "stops short of a number"),
        ("__import__('os').getcwd()", "may hold numbers"),
        ("cg.loss.mean <= 1", "may hold numbers"),
        ("cg.loss.mean +", "is not arithmetic"),
    ):
        with pytest.raises(ValueError, match=message):
            expected.evaluate(text, summary)


def test_what_cannot_be_evaluated_is_not_met():
    entries = [
        {"name": "typing error", "expression": "cg.los.mean", "bound": 1, "source": ""},
        {"name": "diverged", "expression": "cg.loss.mean", "bound": 1, "source": ""},
    ]
    verdicts = expected.judge(entries, {"cg": {"loss": {"mean": math.nan}}}, "cpu")
    assert [verdict.met for verdict in verdicts] == [False, False]
    assert "asks for 'los'" in verdicts[0].reason


def test_expected_json_is_checked(tmp_path):
    (tmp_path / "expected.json").write_text('[{"name": "x", "expression": "1", "bond": 1}]')
    with pytest.raises(ValueError, match=r"missing: \['bound', 'source'\], unknown: \['bond'\]"):
        expected.load(tmp_path / "expected.json")


def test_costs_follow_the_one_convention():
    step = budget.training(20).plus(budget.implicit_hypergradient(num_matvecs=10))
    assert step.total == 20 + 10 * 2.5 + 2.5 + 1
    assert step.times(3).total == 3 * step.total
    unroll = bilevel.Unroll(optax.sgd(0.1), steps=4)
    assert budget.hypergradient(unroll).total == 4 + 4 * 2.5 + 1
    # An outer gradient on four times the examples of a training step is four.
    assert budget.hypergradient(unroll, outer=budget.weight(64, 16)).total == 4 + 4 * 2.5 + 4


@pytest.mark.parametrize("sampler", baselines.SAMPLERS)
def test_search_spends_the_budget_and_resumes_to_the_same_trials(sampler):
    asked, logged = [], []

    def objective(hparams):
        asked.append(hparams)
        return math.nan if len(asked) == 3 else (hparams["log_decay"] - 1.0) ** 2

    settings = dict(budget=165.0, cost=10.0, sampler=sampler, seed=5)
    space = {"log_decay": (-5.0, 5.0)}
    trials = baselines.search(objective, space, log=logged.append, **settings)
    assert len(trials) == len(asked) == 16 and logged == trials
    assert trials[-1].cost == 160.0 and math.isnan(trials[2].value)
    smallest = min(trial.value for trial in trials if math.isfinite(trial.value))
    assert baselines.best(trials).value == trials[-1].best == smallest

    done = [trial.value for trial in trials[:12]]
    again = baselines.search(objective, space, done=done, **settings)
    assert [trial.hparams for trial in again] == [trial.hparams for trial in trials]
    assert len(asked) == 16 + 4
    other = baselines.search(objective, space, **{**settings, "seed": 6})
    assert other[0].hparams != trials[0].hparams


def test_search_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="does not pay for one trial"):
        baselines.search(sum, {}, budget=1.0, cost=2.0, sampler="tpe", seed=0)
    with pytest.raises(ValueError, match="random, tpe, got 'grid'"):
        baselines.search(sum, {}, budget=2.0, cost=1.0, sampler="grid", seed=0)
    with pytest.raises(ValueError, match="none of the 1 trials"):
        baselines.best([baselines.Trial(0, {}, math.inf, 1.0, math.inf)])


def test_curves_put_all_seeds_on_one_grid_of_costs():
    points = {0: [(1, 4.0), (3, 5.0), (6, 1.0)], 1: [(2, 8.0), (4, 2.0)]}
    records = [
        record.Record(seed, "cg", step, cost, {"loss": value})
        for seed, series in points.items()
        for step, (cost, value) in enumerate(series)
    ]
    cost, values = figures.curves(records, "cg", "loss")
    np.testing.assert_array_equal(cost, [2, 3, 4])
    np.testing.assert_array_equal(values, [[4, 5, 5], [8, 8, 2]])
    np.testing.assert_array_equal(
        figures.curves(records, "cg", "loss", best_so_far=True)[1], [[4, 4, 4], [8, 8, 2]]
    )
    with pytest.raises(ValueError, match="no record of method 'tpe'"):
        figures.curves(records, "tpe", "loss")


def test_a_method_keeps_its_colour_and_figures_are_reproducible(tmp_path):
    assert figures.colour("cg") == figures.colour("cg_per_weight") != figures.colour("neumann")
    assert figures.colour("something_new") == figures.colour("something_new")
    contents = []
    for name in ("a.png", "b.png"):
        with figures.figure(tmp_path / name, columns=2) as (_, axes):
            figures.heat_map(axes[0], np.arange(4.0).reshape(2, 2) - 1, "decay", centred=True)
            figures.trajectories(axes[1], [0, 1, 2], {"layer 1": [0, 1, 2]}, "log decay")
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_labels_at_the_end_of_lines_do_not_overprint():
    moved = figures.apart([3.0, 0.0, 0.1, 0.1], 0.5)
    assert np.all(np.diff(np.sort(moved)) > 0.499) and moved[0] == 3.0
    assert moved[1] < moved[2] < moved[3] and abs(np.mean(moved[1:]) - 0.2 / 3) < 1e-9


def test_every_experiment_of_the_project_is_complete():
    for name in catalog.discover():
        folder = catalog.folder_of("experiments") / name
        for preset in ("smoke", "cpu"):
            assert catalog.configuration("experiments", name, preset) is not None, (name, preset)
        assert callable(catalog.part("experiments", name, "figure").figures), name
        assert expected.load(folder / "expected.json"), name
        assert catalog.claim_of(folder), name


def test_report_reads_only_finished_runs(package):
    assert run(package, "--preset", "smoke", "--out", "results/a") == 0
    with pytest.raises(cli.RunnerError, match="no finished run"):  # smoke runs stay out of docs/
        report.write(Path("results"), Path("docs"), package, smoke=False)
    summary = record.read_json(Path("results/a/summary.json"))
    summary["run"]["status"] = "running"
    record.write_json(Path("results/a/summary.json"), summary)
    assert report.collect(Path("results"), package) == []
