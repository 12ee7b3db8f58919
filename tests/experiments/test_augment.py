"""`augment` in miniature: its two networks start where they should, and are tuned end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.augment import config, figure, networks, problem, run
from experiments.common import data, record


def test_a_warp_by_whole_pixels_is_a_shift_and_by_half_a_mean():
    images = jax.random.uniform(jax.random.key(0), (2, 5, 6, 3), jnp.float32)
    move = jnp.zeros((2, 5, 6, 2), jnp.float32).at[..., 1].set(1.0)
    moved = networks.warp(images, move)
    np.testing.assert_array_equal(moved[:, :, :-1], images[:, :, 1:])
    np.testing.assert_array_equal(moved[:, :, -1], images[:, :, -1])  # the edge is continued
    half = networks.warp(images, jnp.zeros((2, 5, 6, 2), jnp.float32).at[..., 0].set(0.5))
    # Two roundings of float32 numbers below one.
    np.testing.assert_allclose(half[:, :-1], (images[:, :-1] + images[:, 1:]) / 2, atol=2e-7)


def test_without_a_last_layer_nothing_changes_and_noise_matters_with_one():
    settings = config.cpu()
    x = jax.random.uniform(jax.random.key(0), (4, 28, 28, 1), jnp.float32)
    noise = jax.random.normal(jax.random.key(1), (4, settings.noise), jnp.float32)
    unet, weights = problem.augmenter(settings, 1, 0)
    made = [networks.call(unet, weights, x, n) for n in (noise, -noise)]
    assert float(jnp.abs(made[0] - made[1]).max()) > 1e-2
    exact = networks.UNet(1, settings.width, settings.noise, 3.0, 0.2, 0.0, nnx.Rngs(0))
    np.testing.assert_array_equal(exact(x, noise), x)
    # Examples weigh the same at first, whatever their losses.
    weigher, weights = problem.reweighter(settings, 0)
    np.testing.assert_array_equal(
        networks.call(weigher, weights, jnp.array([0.1, 5.0], jnp.float32)), jnp.ones(2)
    )


def test_hand_made_augmentation_shifts_whole_images_and_cuts_one_square():
    settings = dataclasses.replace(config.smoke(), shift=1, hole=2)
    x = jnp.broadcast_to(jnp.arange(8, dtype=jnp.float32)[None, :, None, None] / 16, (50, 8, 8, 1))
    made = np.asarray(problem.by_hand(jax.random.key(0), x, settings, mirror=True))
    cut = (made == 0.5).sum((1, 2, 3))
    assert set(cut) <= {1, 2, 4} and 4 in cut  # a square at the edge is clipped
    first = made[:, 0, :, 0]
    assert {0.0, 1 / 16} <= set(np.unique(first)) <= {0.0, 1 / 16, 0.5}


def test_a_known_share_of_labels_is_wrong_and_no_validation_image_trains():
    settings = dataclasses.replace(config.smoke(), train=100, valid=400, noisy_train=500)
    parts = problem.load("digits", settings, 0)
    assert [len(p["y"]) for p in (parts.train, parts.valid, parts.noisy)] == [100, 400, 500]
    # Four standard deviations of the mean of 500 draws.
    assert abs(np.asarray(parts.noisy["wrong"]).mean() - settings.flipped) < 0.09
    differs = np.asarray(parts.noisy["y"])[:100] != np.asarray(parts.train["y"])
    np.testing.assert_array_equal(differs, np.asarray(parts.noisy["wrong"])[:100])
    seen = {np.asarray(x).tobytes() for x in parts.noisy["x"]}
    assert not any(np.asarray(x).tobytes() in seen for x in parts.valid["x"])


@pytest.mark.slow  # the preset `paper` alone is traced here
def test_the_full_networks_can_be_traced():
    settings = config.paper()
    built = problem.build(settings, 32, 3)
    params = jax.eval_shape(lambda: problem.classifier(settings, 32, 3, 0)[1])
    weights = jax.eval_shape(lambda: problem.augmenter(settings, 3, 0)[1])
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(11.17e6, rel=0.01)
    batch = {
        "x": jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32),
        "y": jax.ShapeDtypeStruct((8,), jnp.int32),
        "noise": jax.ShapeDtypeStruct((8, settings.noise), jnp.float32),
    }
    grads = jax.eval_shape(jax.grad(built.operator.loss, 1), params, {"augment": weights}, batch)
    assert jax.tree.structure(grads["augment"]) == jax.tree.structure(weights)


def test_a_run_tunes_both_networks_and_a_finished_one_is_not_run_again(tmp_path):
    settings = dataclasses.replace(config.smoke(), noisy_steps=200, points=2)
    run.run(settings, 0, tmp_path, resume=False)
    ends = {m: record.read(tmp_path, method=f"digits_{m}")[-1].metrics for m in run.METHODS}
    assert all(np.isfinite(list(metrics.values())).all() for metrics in ends.values())
    start = _start_change(settings)
    assert abs(ends["learned"]["change"] - start) > 0.01 * start  # it has moved
    assert ends["replayed"]["change"] == ends["learned"]["change"]
    # 40 hypergradients are enough to see which labels are wrong.
    assert ends["noisy_learned"]["weight_wrong"] < 0.9 * ends["noisy_learned"]["weight_right"]
    before = (tmp_path / record.FILE).read_bytes()
    run.run(settings, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == before
    assert all(path.exists() for path in figure.figures(tmp_path))


def _start_change(settings: config.Config) -> float:
    parts = problem.load("digits", settings, 0)
    unet, weights = problem.augmenter(settings, 1, 0)
    x = parts.train["x"][:100]
    noise = jax.random.normal(jax.random.key(0), (len(x), settings.noise), jnp.float32)
    return float(jnp.sqrt(jnp.mean((networks.call(unet, weights, x, noise) - x) ** 2)))


def test_human_mistakes_belong_to_the_images():
    try:
        people = data.load_npz("cifar10/cifar10n_human_labels.npz")
    except data.DataMissing as error:
        pytest.skip(str(error))
    # CIFAR-10N's own figure for the worst of three annotators: 40.21 % wrong.
    assert (people["worse_label"] != people["clean_label"]).mean() == pytest.approx(
        0.4021, abs=1e-4
    )
