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


SMALL_CONV = config.smoke().tasks[-1]


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


def test_scaled_heads_predict_the_sizes_of_he():
    task, lam = config.DEEP, jnp.float32(1.0)
    network = networks.hypernetwork("he", task)
    weights = tasks.initial(task, 64, jax.random.key(0))
    response = network.init(jax.random.key(1), weights, jnp.float32(0))
    predicted = network.apply(response, weights, lam)
    for name, layer in weights.items():
        # Standard deviations of hundreds of numbers, to the sampling error of both.
        ratio = float(jnp.std(predicted[name]["kernel"]) / jnp.std(layer["kernel"]))
        assert 0.8 < ratio < 1.25, name


@pytest.mark.parametrize("task", [config.DEEP, config.LINEAR, SMALL_CONV], ids=lambda t: t.name)
def test_zero_weights_cost_what_is_counted_as_not_learnt(task):
    x, y = tasks.images(task, 0)
    shapes = jax.eval_shape(lambda: tasks.initial(task, 64, jax.random.key(0)))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    middle = sum(tasks.input_range(task)) / 2  # a weighted loss of zero weights falls with g
    both = jax.jit(jax.value_and_grad(lambda w: tasks.training_loss(task, w, middle, (x, y))))
    loss, gradient = both(zero)
    assert float(loss) == pytest.approx(tasks.loss_of_zero(task), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_products_with_windows_are_convolutions():
    task, key = config.CONV, jax.random.key(0)
    images = jax.random.uniform(jax.random.key(1), (3, 784))

    @jax.jit
    def both(images):
        w = tasks.initial(task, 784, key)
        w = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(key, a.shape), w)  # biases too
        x = images.reshape(3, 28, 28, 1)
        for i, channels in enumerate(task.channels):
            kernel = w[f"layer{i}"]["kernel"].reshape(5, 5, x.shape[-1], channels)
            kernel = kernel.swapaxes(0, 1)  # in a window columns go before rows
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + w[f"layer{i}"]["bias"][None, None, None])
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = x.transpose(0, 3, 1, 2).reshape(3, -1)  # channels first
        x = jax.nn.relu(x @ w["layer2"]["kernel"] + w["layer2"]["bias"][None])
        x = x @ w["layer3"]["kernel"] + w["layer3"]["bias"][None]
        return tasks.forward(task, w, images), x

    np.testing.assert_allclose(*both(images), rtol=1e-4, atol=1e-4)  # float32


def test_a_weighted_loss_is_the_data_loss_at_zero_and_the_prior_at_one():
    batch = tuple(a[:8] for a in tasks.images(SMALL_CONV, 0))
    w = tasks.initial(SMALL_CONV, 64, jax.random.key(0))
    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(w))
    loss = [float(tasks.training_loss(SMALL_CONV, w, jnp.float32(g), batch)) for g in (0, 1)]
    assert loss[0] == pytest.approx(float(tasks.data_loss(SMALL_CONV, w, batch)), rel=1e-6)
    assert loss[1] == pytest.approx(squares / (2 * SMALL_CONV.train), rel=1e-5)


def test_what_is_measured_is_the_first_images():
    data = tasks.images(SMALL_CONV, 0)
    x, y = networks.seen(SMALL_CONV, data)
    assert x.shape == (2, 64, 64)
    np.testing.assert_array_equal(x.reshape(128, -1), data[0][:128])
    np.testing.assert_array_equal(y.ravel(), data[1][:128])


def test_a_convolutional_network_is_trained_through_a_hypernetwork():
    runner = networks.train("mip", "adam", SMALL_CONV, config.smoke())
    losses = runner(jnp.array([3e-3]), jax.random.key(0), tasks.images(SMALL_CONV, 0))
    assert losses.shape == (1, SMALL_CONV.points)
    assert float(losses[0, -1]) < 0.8 * tasks.loss_of_zero(SMALL_CONV)


def test_a_short_run_is_recorded_once_and_mip_is_ahead_of_plain(tmp_path):
    task = dataclasses.replace(config.smoke().tasks[0], steps=200, sgd_rates=(3e-2,), adam_rates=())
    settings = config.Config(tasks=(task,))
    for _ in range(2):
        run.run(settings, 0, tmp_path, resume=True)
    records = record.read(tmp_path)
    assert len(records) == len(task.variants) * task.points
    found = run.summary(records)
    assert (
        found["deep_mip_sgd"]["final_loss"]["mean"] < found["deep_plain_sgd"]["final_loss"]["mean"]
    )
    assert found["deep_mip_sgd"]["part_to_plain"]["median"] < 1
    assert all(path.stat().st_size > 0 for path in figure.figures(tmp_path))
