"""The runner of the experiments, on toy experiments written into a temporary folder."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

pytest.importorskip("optuna", reason="needs bilevel[experiments]")
pytest.importorskip("matplotlib", reason="needs bilevel[experiments]")

import bilevel
from bilevel.run.lock import locked
from experiments.common import budget, catalog, cli, expected, figures, record, report

ROOT = Path(__file__).resolve().parents[2]


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


def test_processes_that_share_the_seeds_give_the_records_of_one(package, monkeypatch, capsys):
    assert run(package, "--seeds", "3", "--out", "one") == 0
    monkeypatch.setenv("TOY_FAILS", "1")  # seed 1 stops in the middle, in its own process
    assert run(package, "--seeds", "3", "--out", "two", "--jobs", "2") == 2
    assert "continue with --resume" in capsys.readouterr().err
    assert run(package, "--seeds", "3", "--out", "two", "--jobs", "1", "--resume") == 2
    assert "started with 2" in capsys.readouterr().err
    monkeypatch.delenv("TOY_FAILS")
    assert run(package, "--seeds", "3", "--out", "two", "--jobs", "2", "--resume") == 0
    one, two = Path("one"), Path("two")
    assert (one / record.FILE).read_bytes() == (two / record.FILE).read_bytes()
    told = record.read_json(two / "run.json")
    assert told["status"] == "finished" and told["done"] == [0, 1, 2]
    assert told["minutes"] > 0 and told["cpu_minutes"] > 0
    assert sorted(path.name for path in two.iterdir()) == sorted(
        path.name for path in one.iterdir()
    )
    assert run(package, "--jobs", "0") == 2
    assert "`--jobs`: at least 1" in capsys.readouterr().err


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
    assert "| toy | A loss that halves. | 0.094 ± 0.044 | 1.50 ± 0.71 | 0.8 | – | met: " in page
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


def test_costs_follow_the_one_convention():
    step = budget.training(20).plus(budget.implicit_hypergradient(num_matvecs=10))
    assert step.total == 20 + 10 * 2.5 + 2.5 + 1
    assert step.times(3).total == 3 * step.total
    unroll = bilevel.Unroll(optax.sgd(0.1), steps=4)
    assert budget.hypergradient(unroll).total == 4 + 4 * 2.5 + 1
    # An outer gradient on four times the examples of a training step is four.
    assert budget.hypergradient(unroll, outer=budget.weight(64, 16)).total == 4 + 4 * 2.5 + 4


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
