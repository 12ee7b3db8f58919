"""What `mip` counts, and what it claims exactly: constant norm with, proportionality without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.mip import config, figure, networks, run, tasks


def test_part_of_a_run_until_its_running_mean_is_below():
    losses = np.array([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert run.part_until(losses, 4.0) == 0.1
    assert run.part_until(losses, 2.0) == 0.5  # (4 + 3 + 2 + 1 + 0) / 5
    assert run.part_until(losses, -1.0) == float("inf")
    losses[1] = np.nan  # in the windows of the second to the sixth point
    assert run.part_until(losses, 3.9) == 0.7


def test_the_best_rate_is_that_of_the_median_seed_and_never_one_that_blew_up():
    flat = lambda *finals: np.stack([np.full(10, final) for final in finals])  # noqa: E731
    losses = np.stack([flat(2.0, 0.5, np.nan), flat(2.0, 3.0, 0.1), flat(2.0, 0.5, np.inf)])
    assert run.best_rate(losses) == 1
    assert np.isinf(run.final_losses(losses)[0, 2])


@pytest.mark.parametrize("task", [config.DEEP, config.LINEAR], ids=lambda t: t.name)
@pytest.mark.parametrize("variant", ["plain", "mip"])
def test_sizes_before_training(task, variant):
    lam = jnp.linspace(0.0, tasks.input_range(task)[1], 5)
    measured = networks.sizes(variant, task, 64, jax.random.key(0), lam)
    norm, predicted = (np.asarray(x, np.float64) for x in measured)
    if variant == "plain":  # nothing but the size of the input differs
        assert run.residual(norm, predicted) < 1e-6  # float32 rounding of sums of thousands
        np.testing.assert_allclose(predicted / predicted[-1], lam / lam[-1], rtol=1e-5)
    else:
        np.testing.assert_allclose(norm, 1.0, rtol=1e-6)
        assert predicted.max() < 2 * predicted.min()


@pytest.mark.parametrize("task", [config.DEEP, config.LINEAR], ids=lambda t: t.name)
def test_zero_weights_cost_what_is_counted_as_not_learnt(task):
    x, y = tasks.images(config.cpu(), task, 0)
    zero = jax.tree.map(jnp.zeros_like, tasks.initial(task, 64, jax.random.key(0)))
    loss, gradient = jax.value_and_grad(lambda w: tasks.training_loss(task, w, 1.0, (x, y)))(zero)
    assert float(loss) == pytest.approx(tasks.loss_of_zero(task), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_short_run_is_recorded_once_and_mip_is_ahead_of_plain(tmp_path):
    task = dataclasses.replace(
        config.smoke().tasks[0], steps=200, sgd_rates=(3e-2,), adam_rates=(3e-3,)
    )
    settings = dataclasses.replace(config.smoke(), tasks=(task,))
    for _ in range(2):
        run.run(settings, 0, tmp_path, resume=True)
    records = record.read(tmp_path)
    assert len(records) == 4 * settings.points
    found = run.summary(records)
    assert (
        found["deep_mip_sgd"]["final_loss"]["mean"] < found["deep_plain_sgd"]["final_loss"]["mean"]
    )
    assert found["deep_mip_sgd"]["part_to_plain"]["median"] < 1
    assert all(path.stat().st_size > 0 for path in figure.figures(tmp_path))
