"""`sure` in miniature: its penalties, and that it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.sure import config, figure, problem, run

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("sure")
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        run.run(config.smoke(), 0, out, resume=False)
    return out


def test_it_runs_and_denoises(out):
    last = record.final(record.read(out))
    noisy = last["noisy", 0].metrics["mse"]
    for model in config.smoke().models:
        for arm in run.ARMS:
            assert last[f"{model}_{arm}", 0].metrics["mse"] < noisy
    assert set(run.summary(record.read(out))) == {
        f"{model}_{arm}_over_oracle" for model in config.smoke().models for arm in run.ARMS[:-1]
    }
    assert all(path.exists() for path in figure.figures(out))


def test_filters_are_orthonormal_and_see_no_constant():
    kernels = problem.filters().reshape(24, 25)
    np.testing.assert_allclose(kernels @ kernels.T, np.eye(24), atol=1e-6)
    np.testing.assert_allclose(kernels.sum(1), 0, atol=1e-6)


def test_penalties_of_a_constant_image_vanish():
    u = jnp.full((1, 8, 8), 0.3)
    for model in ("quadratic", "tv", "filters"):
        lam = problem.hparams(model, config.smoke())
        np.testing.assert_allclose(problem.loss(model)(u, lam, u), 0, atol=1e-6)
