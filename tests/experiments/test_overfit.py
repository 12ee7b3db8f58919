"""`overfit` in miniature: a decay per weight fits the validation set, one in all does not."""

import dataclasses

import jax
import pytest

from experiments.common import record
from experiments.overfit import config, figure, problem, run


def test_coarse_decays_are_fine_ones_that_agree():
    params = problem.initial("cnn", 8, seed=0)
    penalties = {
        g: float(problem.penalty(params, problem.decays(params, -2.0, g)))
        for g in problem.GRANULARITY
    }
    assert penalties["per_layer"] == pytest.approx(penalties["one"], rel=1e-6)
    assert penalties["per_weight"] == pytest.approx(penalties["one"], rel=1e-6)
    weights = sum(x.size for x in jax.tree.leaves(params))
    fine = problem.decays(params, -2.0, "per_weight")
    assert sum(x.size for x in jax.tree.leaves(fine)) == weights


def test_the_full_networks_have_the_weights_that_the_page_says():
    sizes = {}
    for model in config.cpu().models:
        width = config.cpu().width[model == "cnn"]
        shapes = jax.eval_shape(lambda m=model, w=width: problem.initial(m, w, seed=0))
        sizes[model] = sum(x.size for x in jax.tree.leaves(shapes))
    assert sizes == {"linear": 7_850, "mlp": 101_770, "cnn": 1_021_034}


def test_a_decay_per_weight_fits_the_validation_set_and_nothing_runs_twice(tmp_path):
    settings = dataclasses.replace(
        config.smoke(), models=("linear",), outer_steps=(200,), points=2, rounds=2
    )
    run.run(settings, 0, tmp_path, resume=False)
    first = (tmp_path / record.FILE).read_bytes()
    tuned = {
        g: record.read(tmp_path, method=f"digits_linear_{g}")[-1].metrics
        for g in problem.GRANULARITY
    }
    per_weight = tuned["per_weight"]
    assert per_weight["validation_accuracy"] >= 0.98
    assert per_weight["validation_loss"] < 0.5 * tuned["one"]["best_validation_loss"]
    # What was learned is the validation set, not the task.
    assert per_weight["test_accuracy"] < per_weight["validation_accuracy"] - 0.05
    (cost,) = record.read(tmp_path, method="cost_linear")
    assert cost.metrics["time_ratio"] > 0 and cost.metrics["memory_ratio"] > 1
    run.run(settings, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == first
    assert all(path.exists() for path in figure.figures(tmp_path))
