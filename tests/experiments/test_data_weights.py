"""`data_weights` in miniature: windows of text, weights of one at the start, and both curves."""

import os

import jax
import numpy as np
import pytest

from experiments.common import record
from experiments.data_weights import config, figure, problem, run

needs_data = pytest.mark.skipif(not os.environ.get("BILEVEL_DATA"), reason="needs WikiText-2")


def test_the_scorer_begins_with_equal_weights():
    settings = config.smoke()
    windows = jax.random.randint(jax.random.key(0), (5, 32), 0, settings.symbols)
    lam = problem.scorer(settings, jax.random.key(1))
    np.testing.assert_allclose(problem.weights(lam, windows), 1.0, rtol=1e-6)


@pytest.mark.slow
@needs_data
def test_it_runs_and_is_drawn(tmp_path):
    with jax.enable_x64(False):
        run.run(config.smoke(), 0, tmp_path, resume=False)
    last = record.final(record.read(tmp_path))
    assert {name for name, _ in last} == {"scorer", *run.ARMS}
    assert len(last["uniform", 0].metrics["curve"]) == 4
    assert all(path.exists() for path in figure.figures(tmp_path))
