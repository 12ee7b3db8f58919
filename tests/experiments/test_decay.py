"""`decay` in miniature: what its decays mean, that it keeps to its budget, and that it runs."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.common import record
from experiments.decay import config, figure, problem, run

SETTINGS = dataclasses.replace(config.smoke(), test=300, budget=900.0, points=3)


def test_coarse_decays_are_fine_ones_that_agree():
    params = problem.initial(inputs=6, hidden=4, seed=0)
    one, *finer = (
        float(problem.penalty(params, problem.decays(params, -2.0, g))) for g in problem.GRANULARITY
    )
    np.testing.assert_allclose(finer, one, rtol=1e-6)


def test_a_decay_of_a_unit_belongs_to_the_weights_that_leave_it():
    params = problem.initial(inputs=6, hidden=4, seed=0)
    decays = problem.decays(params, -2.0, "per_unit")
    decays["hidden"]["kernel"] = decays["hidden"]["kernel"].at[3].set(5.0)
    gradient = jax.grad(problem.penalty)(params, decays)["hidden"]["kernel"]
    ratio = gradient / params["hidden"]["kernel"]
    np.testing.assert_allclose(ratio[3], np.exp(5.0), rtol=1e-5)
    np.testing.assert_allclose(ratio[2], np.exp(-2.0), rtol=1e-5)


def test_no_method_spends_more_than_the_budget():
    for settings in (config.smoke(), config.cpu(), config.paper()):
        spent = run.outer_steps(settings) * run.step_cost(settings) + 2 * settings.trial_steps
        assert settings.budget - run.step_cost(settings) < spent <= settings.budget


def test_it_runs_and_decays_per_weight_fit_the_validation_images_best(tmp_path):
    run.run(SETTINGS, 0, tmp_path, resume=False)
    written = (tmp_path / record.FILE).read_bytes()
    run.run(SETTINGS, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == written
    results = {m: r.metrics for (m, _), r in record.final(record.read(tmp_path)).items()}
    per_weight = results["tuned_per_weight"]
    assert per_weight["validation_loss"] < results["tuned_one"]["validation_loss"]
    assert per_weight["validation_loss"] < results["random_search"]["validation_loss"]
    # The validation images are what was fitted: the test images are not fitted as well.
    gap = per_weight["test_loss"] - per_weight["validation_loss"]
    assert gap > results["no_tuning"]["test_loss"] - results["no_tuning"]["validation_loss"]
    assert all(path.exists() for path in figure.figures(tmp_path))


def test_what_is_searched_is_what_is_trained():
    # One trial at the starting decay gives the network that is not tuned.
    batches = run._batches(SETTINGS, 0)
    params = problem.initial(64, SETTINGS.hidden, 0)
    train = run._train(SETTINGS)
    per_layer, one = (problem.decays(params, SETTINGS.start, g) for g in ("per_layer", "one"))
    losses = [
        run._measured(train(params, h, batches["train"]), batches, "validation")["validation_loss"]
        for h in (per_layer, one)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
