"""`elbo` in miniature: it runs, costs are counted, frozen features are the network's."""

import jax
import numpy as np
import pytest

from experiments.common import record
from experiments.elbo import config, figure, problem, run

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")


@pytest.fixture(scope="module", autouse=True)
def _single():
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def test_it_runs_and_costs_are_counted(tmp_path):
    settings = config.smoke()
    run.run(settings, 0, tmp_path, resume=False)
    last = record.final(record.read(tmp_path))
    steps, d = settings.steps, len(settings.decays)
    costs = {name: got.cost for (name, _), got in last.items()}
    assert costs["digits_head_grid"] == steps * (d * settings.folds + 1)
    assert costs["digits_whole_grid"] == steps * (d * d + 1)
    assert costs["digits_head_elbo"] == costs["digits_whole_elbo"] == steps
    for (name, _), got in last.items():
        chance = 0.8
        assert got.metrics["test_error"] < chance or name.endswith("plain")
    assert run.summary(record.read(tmp_path))["digits_head_over_grid"]["test_loss"]["seeds"] == 1
    assert all(path.exists() for path in figure.figures(tmp_path))


def test_features_are_those_below_the_head():
    settings = config.smoke()
    w = problem.initial(jax.random.key(0), (64, *settings.hidden, problem.CLASSES))
    x = jax.random.normal(jax.random.key(1), (3, 64))
    below = problem.features({k: v for k, v in w.items() if k != "head"}, x)
    np.testing.assert_allclose(
        problem.outputs({"head": w["head"]}, below), problem.outputs(w, x), rtol=1e-5
    )
