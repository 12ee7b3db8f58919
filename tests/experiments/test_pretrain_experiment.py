"""`pretrain` in miniature: it runs, and its losses weigh what they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.pretrain import config, figure, problem, run

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")


@pytest.fixture(scope="module", autouse=True)
def _single():
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def test_it_runs_and_moves_the_weights(tmp_path):
    run.run(config.smoke(), 0, tmp_path, resume=False)
    last = record.final(record.read(tmp_path))
    assert last["learned", 0].metrics["useful"] > last["learned", 0].metrics["useless"]
    assert last["uniform", 0].metrics["useful"] == pytest.approx(1)
    assert last["useful_only", 0].metrics["useless"] < 1e-6
    assert last["learned", 0].cost > last["uniform", 0].cost
    assert "weight" in run.summary(record.read(tmp_path))["useful_over_useless"]
    assert all(path.exists() for path in figure.figures(tmp_path))


def test_weights_are_one_on_average_and_heads_are_fresh():
    np.testing.assert_allclose(jnp.mean(problem.weights(jnp.arange(6.0))), 1, rtol=1e-6)
    task = problem.task(config.smoke(), seed=0)
    assert np.bincount(np.asarray(task.fine[1])).tolist() == [10] * 5
    w = problem.initial(jax.random.key(0), 64, config.smoke())
    start = problem.copied(5)(w, None)
    np.testing.assert_allclose(problem.fine_loss(start, (), task.fine), np.log(5), rtol=1e-5)
