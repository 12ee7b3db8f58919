"""`cleaning` in miniature: who is wrong is known, and costs are those of the loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cleaning import config, figure, problem, run
from experiments.common import record

SETTINGS = config.smoke()


def test_a_known_share_of_labels_is_wrong_and_no_other_part_is_touched():
    settings = dataclasses.replace(SETTINGS, train=700, valid=300)
    parts = problem.load("digits", settings, 0)
    right = problem.load("digits", dataclasses.replace(settings, flipped=0.0), 0)
    # Four standard deviations of the mean of 700 draws.
    assert abs(parts.wrong.mean() - 0.5) < 4 * 0.5 / np.sqrt(700)
    differs = np.asarray(parts.train[1]) != np.asarray(right.train[1])
    np.testing.assert_array_equal(differs, parts.wrong)
    for one, other in ((parts.valid, right.valid), (parts.test, right.test)):
        np.testing.assert_array_equal(one[1], other[1])
    assert len(parts.clean[1]) == (~parts.wrong).sum()
    np.testing.assert_array_equal(parts.clean[1], np.asarray(right.train[1])[~parts.wrong])


def test_auroc_counts_pairs():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert problem.auroc(scores, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


@pytest.mark.parametrize("method", run.TUNED)
def test_a_step_costs_what_the_loop_counts(method):
    parts = problem.load("digits", SETTINGS, 0)
    loop = run.algorithm(method, SETTINGS)
    steps = 1 if method == "pbgd" else SETTINGS.inner_steps
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), parts.train)
    state = loop.init(problem.start(parts), jnp.zeros(len(parts.wrong), jnp.float32))
    total = 0.0
    for _ in range(SETTINGS.subspace):
        state, info = jax.jit(loop.step)(state, inner_batches=stacked, outer_batch=parts.valid)
        cost = info.cost
        # By examples; the loop counts an outer gradient as one.
        weight = SETTINGS.valid / SETTINGS.train
        total += float(cost.inner_gradients + 2.5 * cost.products + weight * cost.outer_gradients)
    paid = SETTINGS.subspace * run.step_cost(method, SETTINGS)
    assert total == pytest.approx(paid, rel=1e-5) if method != "cg" else total <= paid


def test_weights_tell_who_is_wrong_and_a_run_is_not_repeated(tmp_path):
    settings = dataclasses.replace(SETTINGS, train=500, budget=1500)
    for _ in range(2):
        run.run(settings, 0, tmp_path, resume=True)
    records = record.read(tmp_path)
    ends = [r for r in records if "test_error" in r.metrics]
    assert len(ends) == len(run.PLAIN) + len(run.TUNED)
    found = {r.method: r.metrics for r in ends}
    assert found["digits_cg"]["auroc"] > 0.75 and found["digits_f2sa"]["auroc"] > 0.75
    assert found["digits_f2sa"]["test_error"] < found["digits_all"]["test_error"]
    assert all(path.exists() for path in figure.figures(tmp_path))
