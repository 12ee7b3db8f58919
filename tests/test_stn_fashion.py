"""The parts of `stn_fashion`, and a small run of all of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.stn_fashion import config, figure, problem, run

SETTINGS = dataclasses.replace(
    config.smoke(),
    train=64,
    valid=64,
    test=64,
    batch=8,
    valid_batch=8,
    budget=64,
    points=2,
    trials=2,
)


def test_neighbourhoods_and_a_dense_layer_are_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    for stride in (1, 2):
        ours = problem.patches(x, stride) @ kernel.reshape(27, 4)
        theirs = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # 27 products of float32


def test_an_occluder_is_one_square_and_hue_does_nothing_to_gray():
    x = np.ones((5, 28, 28), np.float32)
    hidden = problem._occlude(x, 6, 0.0, np.random.default_rng(0))
    assert np.all((hidden == 0).sum(axis=(1, 2)) == 36)
    assert np.all((hidden == 0).any(axis=2).sum(axis=1) == 6)
    images = jax.random.uniform(jax.random.key(0), (4, 28, 28))
    none = {name: jnp.float32(0) for name in problem.NAMES}
    key = jax.random.key(1)
    plain = problem.augment(SETTINGS, key, images, none)
    for name, changes in (("hue", False), ("saturation", False), ("brightness", True)):
        changed = problem.augment(SETTINGS, key, images, {**none, name: jnp.float32(0.4)})
        assert (float(jnp.max(jnp.abs(changed - plain))) > 1e-3) == changes, name


def test_every_method_is_recorded_once_and_holes_move_through_the_response_alone(tmp_path):
    run.run(SETTINGS, 0, tmp_path, resume=False)
    records = record.read(tmp_path)
    run.run(SETTINGS, 0, tmp_path, resume=True)
    assert record.read(tmp_path) == records
    last = {r.method: r.metrics for r in records}
    assert {*run.TUNED, "fixed", "random_search"} == set(last)
    assert all(np.isfinite(r.metrics["validation_loss"]) for r in records)
    assert max(r.cost for r in records) <= SETTINGS.budget
    # Rounding of the logistic function and back: holes span 5, lengths 17.
    for name, rounding in (("cutout_holes", 1e-5), ("cutout_length", 1e-5)):
        moved = f"moved_{name}"
        assert last["no_response"][moved] < rounding
        assert last["small_scale"][moved] < 0.3 * last["sgd"][moved]
    for path in figure.figures(tmp_path):
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize("preset", [config.cpu, config.paper])
def test_the_large_networks_have_a_place_for_every_hyperparameter(preset):
    settings = preset()
    network = problem.network(settings)
    shapes = {leaf.shape for leaf in jax.tree.leaves(network.template) if leaf.ndim == 2}
    assert (15, settings.dense) in shapes and len(problem.NAMES) == 15
    problem.space(settings).unconstrain(problem.start())
