"""Seeds and splits are held apart: settings are chosen without test data, on seeds not reported."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("optuna", reason="needs bilevel[experiments]")
pytest.importorskip("matplotlib", reason="needs bilevel[experiments]")

from experiments.common import data, protocol, record
from experiments.protocol import config, figure, run

ROOT = Path(__file__).resolve().parents[2] / "experiments"
# Functions that choose: of their code no name may speak of the test part.
CHOOSING = {"objective", "validate", "score"}


# A choice against ourselves: the strongest opponent, by its own result in test.
EXCUSED = {"bo_rep/run.py": 1}
MEASURES = ("loss", "error", "accuracy", "perplexity", "score")


def chosen_by_test(source: str) -> list[str]:
    """Places where a setting or a stopping point is chosen by what is called test.

    Looked at: what functions named in `CHOOSING` return, and what is passed as `score=`, as the
    `key=` of min, max or sorted, and to argmin and argmax.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        looked: list[ast.AST] = []
        match node:
            case ast.FunctionDef(name=name) if name in CHOOSING:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        value = inner.value
                        # Of what `baselines.Tried` holds the second is read for the winner alone.
                        tried = isinstance(value, ast.Call) and "Tried" in ast.unparse(value.func)
                        looked.append(value.args[0] if tried else value)
            case ast.Call(func=func, args=args, keywords=keywords):
                looked += [k.value for k in keywords if k.arg in ("score", "key")]
                name = func.attr if isinstance(func, ast.Attribute) else ast.unparse(func)
                if name in ("argmin", "argmax", "nanargmin"):
                    # Of logits it is a prediction and no choice.
                    whole = ast.unparse(node).lower()
                    looked += [*args, func] if any(m in whole for m in MEASURES) else []
        for each in looked:
            text = ast.unparse(each)
            if "test" in text.lower().replace("latest", ""):
                found.append(f"line {node.lineno}: {text}")
    return found


def test_no_experiment_chooses_by_test_data():
    looked = 0
    for path in sorted(ROOT.glob("*/*.py")):
        source = path.read_text("utf-8")
        excused = EXCUSED.get(path.relative_to(ROOT).as_posix(), 0)
        assert len(found := chosen_by_test(source)) == excused, (path, found)
        looked += any(word in source for word in ("def objective", "score=", "argmin"))
    assert looked > 15


@pytest.mark.parametrize(
    "planted",
    [
        "def objective(setting):\n    return measured['test_loss']",
        "def objective(s, i):\n    return baselines.Tried(test_loss, lambda: measured)",
        "loop = scan_run(step, score=lambda s: loss(s, parts['test']))",
        "best = min(trials, key=lambda t: t.test_error)",
        "best = np.argmin(test_losses)",
        "best = test_losses.argmin()",
    ],
)
def test_a_choice_by_test_data_is_found(planted):
    assert len(chosen_by_test(planted)) == 1


def test_what_is_read_for_winners_alone_is_not_a_choice():
    fine = "def objective(s, i):\n    return baselines.Tried(loss, lambda: {'test': latest})"
    assert chosen_by_test(fine) == []


def test_reported_seeds_are_not_those_on_which_settings_are_chosen():
    for path in sorted(ROOT.glob("*/results/summary.json")):
        seeds = json.loads(path.read_text("utf-8"))["run"]["seeds"]
        assert seeds and max(seeds) < protocol.FIRST_TUNING, path


def test_a_winner_is_chosen_by_validation_and_judged_elsewhere():
    trained, tested = [], []

    def train(setting, seed):
        trained.append((setting, seed))
        return setting, seed

    def test(model, seed):
        assert model[1] == seed
        tested.append((model[0], seed))
        return 10.0 * model[0] + seed

    losses = {(1, 100): 3.0, (1, 101): 1.0, (2, 100): 2.0, (2, 101): 1.5, (3, 100): math.nan}
    found = protocol.tune_and_judge(
        [1, 2, 3],
        train,
        lambda model, seed: losses.get(model, 0.0),
        test,
        tuning=[100, 101],
        judging=[0, 7],
    )
    assert found == (1, 1.75, [120.0, 121.0], [20.0, 27.0])
    assert tested == [(2, 100), (2, 101), (2, 0), (2, 7)]  # the winner alone
    assert [pair for pair in trained if pair[1] < 100] == [(2, 0), (2, 7)]


@pytest.mark.parametrize(
    ("tuning", "judging", "message"),
    [
        ([3], [0], r"chosen on seeds of at least 100, got \[3\]"),
        ([], [0], "at least 100"),
        ([100], [100], "judged on seeds below 100"),
        ([100], [], "judged on seeds below 100"),
    ],
)
def test_seeds_of_the_two_kinds_do_not_mix(tuning, judging, message):
    with pytest.raises(ValueError, match=message):
        protocol.tune_and_judge([1], max, max, max, tuning=tuning, judging=judging)
    with pytest.raises(ValueError, match="none of the 1 settings"):
        protocol.tune_and_judge(
            [1], lambda s, at: s, lambda m, at: math.nan, max, tuning=[100], judging=[0]
        )


TINY = dataclasses.replace(
    config.smoke(), hidden=4, steps=8, measured=2, trials=2, rounds=2, inner_steps=2
)


@pytest.fixture
def defaults():
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def test_other_test_labels_change_what_is_reported_and_nothing_that_is_chosen(
    defaults, tmp_path, monkeypatch
):
    """The same run on a test part with wrong labels: only test losses move."""
    run.run(TINY, 0, tmp_path / "true", resume=False)
    original = data.digits

    def scrambled(**settings):
        whole = original(**settings)
        return whole._replace(test=whole.test._replace(y=(whole.test.y + 1) % 10))

    monkeypatch.setattr(data, "digits", scrambled)
    run.parts.cache_clear()
    run.run(TINY, 0, tmp_path / "wrong", resume=False)
    run.parts.cache_clear()
    true, wrong = (record.final(record.read(tmp_path / name)) for name in ("true", "wrong"))
    assert {method for method, _ in true} == set(run.METHODS)
    for key, entry in true.items():
        assert entry.metrics["validation_loss"] == wrong[key].metrics["validation_loss"]
        for look in ("same_seed_test", "other_seed_test"):
            assert not np.isclose(entry.metrics[look], wrong[key].metrics[look])
    assert all(path.exists() for path in figure.figures(tmp_path / "true"))
