"""`evidence` in miniature: transforms of images, and that it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.evidence import config, figure, problem, run

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")


@pytest.fixture(scope="module", autouse=True)
def _single():
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def test_it_runs(tmp_path):
    run.run(config.smoke(), 0, tmp_path, resume=False)
    last = record.final(record.read(tmp_path))
    budget = config.smoke().budget
    for arm in ("evidence", "holdout", "cross_validation", "oracle"):
        assert last[f"digits_{arm}", 0].cost <= budget
    assert last["digits_bounds", 0].metrics["least_gap"] > 0
    assert last["digits_rotated_ranges", 0].metrics["rotation"] > 0
    told = run.summary(record.read(tmp_path))
    assert told["digits_evidence_over_oracle"]["test_loss"]["seeds"] == 1
    assert all(path.exists() for path in figure.figures(tmp_path))


def test_images_turn_and_move_as_numpy_does():
    image = np.random.default_rng(0).uniform(size=(1, 6, 6)).astype(np.float32)
    angle, none = jnp.full(1, np.pi / 2, jnp.float32), jnp.zeros((1, 2))
    turned = problem.transformed(image, angle, none)[0]
    moved = problem.transformed(image, jnp.zeros(1), jnp.asarray([[2.0, -1.0]]))[0]
    quarter = [np.rot90(image[0], k) for k in (1, 3)]
    assert min(np.abs(turned - q).max() for q in quarter) < 1e-5
    np.testing.assert_allclose(moved[2:, :5], image[0][:4, 1:], atol=1e-6)
    assert jnp.sum(jnp.abs(moved[:2])) == 0 == jnp.sum(jnp.abs(moved[:, 5]))


def test_draws_stay_within_the_ranges():
    """At the narrowest range the averaged model is the model."""
    settings = config.smoke()
    x = jax.random.uniform(jax.random.key(0), (3, 8, 8))
    w = problem.initial(jax.random.key(1), 64, settings)
    narrow = {"rotation": jnp.asarray(-30.0), "shift": jnp.asarray(-30.0)}
    batch = (x, jnp.zeros(3, int))
    plain = problem.model(4)(w, narrow, batch)
    drawn = problem.model(4)(w, narrow, (*batch, jax.random.key(2)))
    np.testing.assert_allclose(plain, drawn, atol=1e-4)
