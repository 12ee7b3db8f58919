"""`stn_fashion` in miniature: its network, its fifteen hyperparameters, and a run end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record, stn, stn_cnn
from experiments.stn_fashion import config, figure, problem, run, train

SETTINGS = dataclasses.replace(
    config.smoke(),
    channels=(4,),
    dense=(8,),
    train=64,
    valid=64,
    test=64,
    batch=8,
    valid_batch=16,
    response_lr=0.05,
    budget=64,
    points=2,
    trials=2,
    starts=(),  # a program of its own for each method compared: traced below
)


def test_a_pool_passes_its_gradient_to_one_of_four_even_where_all_are_equal():
    # A reduction would divide by a count of equals, which XLA can make 0 where it rounds anew.
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    theirs = np.asarray(x)[:, :4, :6].reshape(2, 2, 2, 3, 2, 3).max(axis=(2, 4))
    np.testing.assert_array_equal(stn.pool(x), theirs)
    for image in (x, jnp.zeros_like(x)):
        grads = np.asarray(jax.grad(lambda x: jnp.sum(stn.pool(x)))(image))
        assert set(np.unique(grads)) == {0.0, 1.0}
        np.testing.assert_array_equal(
            grads[:, :4, :6].reshape(2, 2, 2, 3, 2, 3).sum(axis=(2, 4)), np.ones((2, 2, 3, 3))
        )


def test_an_occluder_is_one_square_and_hue_does_nothing_to_gray():
    x = np.ones((5, 28, 28), np.float32)
    hidden = problem._occlude(x, 6, 0.0, np.random.default_rng(0))
    assert np.all((hidden == 0).sum(axis=(1, 2)) == 36)
    assert np.all((hidden == 0).any(axis=2).sum(axis=1) == 6)
    images = jax.random.uniform(jax.random.key(0), (4, 28, 28), jnp.float32)
    none = {name: jnp.float32(0) for name in stn.names(SETTINGS)}
    augment = jax.jit(
        lambda h: problem.task(SETTINGS).augment(jax.random.key(1), stn_cnn.coloured(images), h)
    )
    plain = augment(none)
    for name, changes in (("hue", False), ("saturation", False), ("brightness", True)):
        changed = augment({**none, name: jnp.float32(0.4)})
        assert (float(jnp.max(jnp.abs(changed - plain))) > 1e-3) == changes, name


def test_every_method_is_recorded_once_and_holes_move_through_the_response_alone(tmp_path):
    run.run(SETTINGS, 0, tmp_path, resume=False)
    records = record.read(tmp_path)
    run.run(SETTINGS, 0, tmp_path, resume=True)
    assert record.read(tmp_path) == records
    last = {r.method: r.metrics for r in records}
    assert {*run.TUNED, *run.SEARCHES, "fixed"} == set(last)
    assert all(np.isfinite(r.metrics["validation_loss"]) for r in records)
    assert max(r.cost for r in records) <= SETTINGS.budget
    for name in ("moved_cutout_holes", "moved_cutout_length", "moved_dropout"):
        # Rounding of the logistic function and back: lengths span 17.
        assert last["no_response"][name] < 1e-5
        assert last["delta_stn"][name] > 1e-4
        assert last["small_scale"][name] < 0.1 * last["delta_stn"][name]
    for path in figure.figures(tmp_path):
        assert path.stat().st_size > 10_000


def test_starts_are_summed_up_by_means_and_spreads(tmp_path):
    settings = dataclasses.replace(SETTINGS, starts=(0.05, 0.2, 0.4), points=1)
    records = record.Records(tmp_path, 0)
    for i, loss in enumerate((0.5, 0.4, 0.9)):
        rates = dict.fromkeys(stn.dropouts(settings), 0.1) | {"input_dropout": 0.1 * i}
        measured = {"validation_loss": loss, "validation_error": 0.2, "test_loss": 2 * loss}
        records.append(run.from_start("stn", i), 0, 7.0, test_error=0.3, **measured, **rates)
    run._starts("stn", settings, records)
    (mean,) = record.read(tmp_path, method="stn_starts")
    assert mean.cost == 7
    found = [mean.metrics[name] for name in ("validation_loss", "test_loss", "loss_spread")]
    np.testing.assert_allclose(found, [0.6, 1.2, 0.5])
    # One of three rates ends 0.2 apart, from starts 0.35 apart.
    assert len(stn.dropouts(settings)) == 3
    np.testing.assert_allclose(mean.metrics["rate_spread"], 0.2 / 0.35 / 3)


@pytest.mark.slow  # the preset `paper` alone is traced here
def test_the_papers_run_can_be_traced_and_tunes_fifteen_hyperparameters():
    settings = config.paper()
    params = jax.eval_shape(lambda: problem.task(settings).initial(0))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def part(size):
        return {
            "x": jax.ShapeDtypeStruct((size, 28, 28), jnp.float32),
            "y": jax.ShapeDtypeStruct((size,), jnp.int32),
        }

    held_out = {"validation": part(settings.valid), "test": part(settings.test)}
    for centred, normalized in ((True, False), (True, True), (False, True)):
        spent = train.cycles(settings, centred) * train.cycle_cost(settings, centred)
        assert 0.98 * settings.budget < spent <= settings.budget
        hparams, _, _, measured = jax.eval_shape(
            train.tuned(settings, centred, normalized),
            params,
            problem.start(settings, 0.4),
            train.Mode(1.0),
            key,
            part(settings.train),
            held_out,
        )
        assert len(hparams) == 15
        assert {leaf.shape for leaf in jax.tree.leaves((hparams, measured))} == {(settings.points,)}
