"""Options of the command line: settings, seeds, methods, formats, and new experiments."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import pytest

pytest.importorskip("optuna", reason="needs bilevel[experiments]")
pytest.importorskip("matplotlib", reason="needs bilevel[experiments]")

from experiments.common import catalog, cli, record, report, settings


def run(package, *arguments):
    return cli.main(["run", "toy", *arguments], package)


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
        (("--seeds", "99-100", "--commit-summary"), "seeds of 100 and more are for choosing"),
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
