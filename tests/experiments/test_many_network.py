"""`many_network` in miniature: it runs, falls back to one decay exactly, and leaks nothing."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.many_network import config, figure, problem, run

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")

SETTINGS = config.smoke()
INPUTS, HIDDEN = 6, 3
WEIGHTS = INPUTS * HIDDEN + HIDDEN + HIDDEN * problem.CLASSES + problem.CLASSES


@pytest.mark.wide
def test_it_runs_and_falls_back_to_one_decay(tmp_path):
    run.run(dataclasses.replace(SETTINGS, errors=1e9), 0, tmp_path, resume=False)
    records = record.read(tmp_path)
    last = {method: r.metrics for (method, _), r in record.final(records).items()}
    assert last["digits_tensor"]["deviation"] > 1e-3
    for granularity in problem.GRANULARITY:
        assert last[f"digits_{granularity}_chosen"]["spread"] == 0
        for metric in ("test_loss", "test_error"):
            assert last[f"digits_{granularity}_chosen"][metric] == last["digits_first"][metric]
        assert last[f"digits_{granularity}_none"]["deviation"] > 1e-3
    told = run.summary(records + [r._replace(seed=1) for r in records])
    ratio = told["digits_weight_none_over_one"]["test_loss"]["mean"]
    none, one = (last[f"digits_{arm}"]["test_loss"] for arm in ("weight_none", "one"))
    assert ratio == pytest.approx(none / one)
    assert all(path.exists() for path in figure.figures(tmp_path))


def test_the_one_decay_is_searched_at_the_cost_of_all_the_rest():
    c = config.cpu()
    draw = run.Draw(
        "digits", (np.zeros((50, 4)), np.zeros(50)), ((), ()), c, record.Records(Path(), 0)
    )
    assert draw.searches(c.repeats * c.points_beside) >= draw.choosing()


@pytest.mark.parametrize(
    ("granularity", "count"),
    [("tensor", 4), ("feature", INPUTS + 3), ("unit", 2 * HIDDEN + 2), ("weight", WEIGHTS)],
)
def test_each_weight_has_the_decay_of_its_group(granularity, count):
    place = problem.places(granularity, INPUTS, HIDDEN)
    numbers = np.unique(np.concatenate([p.ravel() for p in place.values()]))
    np.testing.assert_array_equal(numbers, np.arange(count))
    along = {"feature": 1, "unit": 0}.get(granularity)
    if along is not None:  # one number along that axis, and others along the other
        assert np.all(np.ptp(place["w1"], axis=along) == 0)
        assert len(np.unique(place["w1"])) == place["w1"].shape[1 - along]


def test_splits_hold_their_parts_apart():
    splits = run.Splits(23, SETTINGS, 0)  # of four parts and two folds
    assert splits.guard.shape == (4, 4)
    assert splits.train.shape == splits.valid.shape == (4, 2, 6)
    for k in range(4):
        assert len({*splits.guard[k], *splits.others[k]}) == 16
        assert set(splits.valid[k].ravel()) == set(splits.others[k])
        for train, valid in zip(splits.train[k], splits.valid[k], strict=True):
            assert {*train, *valid} == set(splits.others[k]) and not {*train} & {*valid}
    assert len(np.unique(splits.guard)) == 16


def test_the_penalty_is_that_of_every_weight():
    params = problem.initial(jax.random.key(0), INPUTS, HIDDEN)
    lam = jnp.linspace(-1.0, 1.0, WEIGHTS)
    place = problem.places("weight", INPUTS, HIDDEN)
    flat = np.concatenate([np.asarray(w).ravel() for w in params.values()])
    found = problem.penalty(params, problem.spread_out(lam, place))
    # Sums of some sixty numbers, in float32.
    np.testing.assert_allclose(found, 0.5 * np.sum(np.exp(lam) * flat**2), rtol=1e-5)
