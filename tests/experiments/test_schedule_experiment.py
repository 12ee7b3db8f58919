"""`schedule` in miniature: a grid, metagradients of short runs, and fresh runs that judge."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import record
from experiments.schedule import config, figure, problem, run


def test_a_flat_curve_is_a_cosine():
    part = jnp.linspace(0, 1, 5)
    got = problem.rate(jnp.full(6, jnp.log(0.3)), part)
    np.testing.assert_allclose(got, 0.15 * (1 + np.cos(np.pi * part)), rtol=1e-6, atol=1e-9)


def test_rates_move_towards_a_lower_loss_within_the_budget(tmp_path):
    settings = config.smoke()
    with jax.enable_x64(False):
        run.run(settings, 0, tmp_path, resume=False)
    rows = record.read(tmp_path)
    learned = record.final(rows)["learned", 0]
    grads = next(r.metrics["grads"] for r in rows if r.method == "tuning")
    assert np.sum(grads) < 0 and np.mean(learned.metrics["log_rates"]) > np.log(settings.start)
    assert learned.metrics["runs"] <= 5
    assert run.summary(rows)["over_best"]["test_loss"]["seeds"] == 1
    assert all(path.exists() for path in figure.figures(tmp_path))
