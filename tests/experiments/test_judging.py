"""What claims are judged by, and the black-box searches that methods are compared with."""

import math

import numpy as np
import pytest

pytest.importorskip("optuna", reason="needs bilevel[experiments]")
pytest.importorskip("matplotlib", reason="needs bilevel[experiments]")

from experiments.common import baselines, expected, record


def test_claims_are_met_not_met_or_within_noise_by_the_paired_interval():
    def table(*values):
        return {"loss": expected.statistics(dict(enumerate(values)))}

    # Far apart from seed to seed, but always in the same order: pairing tells.
    summary = {"a": table(1.0, 2.0, 3.0), "b": table(1.1, 2.1, 3.12), "c": table(1.1, 1.9, 3.1)}

    def verdict(expression, relation="<=", bound=0.0, told=summary):
        entry = {"name": "x", "expression": expression, "relation": relation, "bound": bound}
        return expected.judge([{**entry, "source": "ours"}], told, "cpu")[0]

    less = verdict("a.loss.mean - b.loss.mean")
    usual = expected.interval([-0.1, -0.1, -0.12])
    assert less.word == "met" and less.how == "paired over seeds"
    assert (less.low, less.high) == pytest.approx((usual["low"], usual["high"]), rel=1e-9)
    assert verdict("b.loss.mean - a.loss.mean").word == "not met"
    noisy = verdict("a.loss.mean - c.loss.mean")
    assert noisy.word == "within noise" and noisy.met
    assert verdict("a.loss.mean / c.loss.mean", bound=1).word == "within noise"
    # A ratio is positive, also where its divisor is small and differs much from seed to seed.
    small = {"a": table(1.0, 1.1, 1.2), "b": table(0.01, 0.05, 0.09)}
    ratio = verdict("a.loss.mean / b.loss.mean", ">=", 2, small)
    assert ratio.word == "met" and 2 < ratio.low < 22 < ratio.high
    # Of methods that ran on different seeds, those that both have count, in the value as well.
    longer = {**summary, "a": table(1.0, 2.0, 3.0, 90.0)}
    shared = verdict("a.loss.mean - b.loss.mean", told=longer)
    assert (shared.value, shared.low, shared.word) == (less.value, less.low, "met")
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


def test_a_recorded_search_measures_winners_alone_and_goes_on_where_it_stopped(tmp_path):
    measured = []

    def objective(setting, number):
        loss = (setting["x"] - 1.0) ** 2 if number != 1 else math.nan
        return baselines.Tried(loss, lambda: measured.append(number) or {"test_loss": 7.0 + loss})

    settings = dict(method="tpe", cost=5.0, sampler="tpe", startup=2, prefix="h_")
    whole, parts = (record.Records(tmp_path / name, seed=3) for name in ("whole", "parts"))
    baselines.recorded(objective, {"x": (-4.0, 4.0)}, records=whole, trials=8, **settings)
    ends = record.read(tmp_path / "whole")
    losses = [r.metrics["trial_loss"] for r in ends]
    lowest = np.fmin.accumulate(losses)
    assert [r.cost for r in ends] == [5.0 * (i + 1) for i in range(8)]
    assert [r.metrics["test_loss"] - 7.0 for r in ends] == pytest.approx(lowest)
    assert ends[-1].metrics["h_x"] == pytest.approx(1.0, abs=math.sqrt(min(lowest)) * 1.001)
    assert measured == [i for i in range(8) if losses[i] == lowest[i] and i != 1]
    for trials in (3, 8):
        baselines.recorded(objective, {"x": (-4.0, 4.0)}, records=parts, trials=trials, **settings)
    a, b = ((tmp_path / name / record.FILE).read_bytes() for name in ("whole", "parts"))
    assert a == b


def test_search_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="does not pay for one trial"):
        baselines.search(sum, {}, budget=1.0, cost=2.0, sampler="tpe", seed=0)
    with pytest.raises(ValueError, match="random, tpe, got 'grid'"):
        baselines.search(sum, {}, budget=2.0, cost=1.0, sampler="grid", seed=0)
    with pytest.raises(ValueError, match="none of the 1 trials"):
        baselines.best([baselines.Trial(0, {}, math.inf, 1.0, math.inf)])
