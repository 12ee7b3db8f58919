"""`fedhyper` in miniature: every image has one client, and FedAvg is what it should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import record
from experiments.fedhyper import config, figure, problem, run

SETTINGS = config.smoke()


def test_every_image_has_one_client_and_no_client_has_none():
    labels = np.random.default_rng(0).integers(0, 10, 203)  # which seven do not divide
    settings = dataclasses.replace(SETTINGS, concentration=0.05)
    rows, sizes = map(np.asarray, problem.split(labels, settings, np.random.default_rng(1)))
    owned = [rows[i, :n] for i, n in enumerate(sizes)]
    assert sizes.min() >= 1 and sizes.sum() == 203
    np.testing.assert_array_equal(np.sort(np.concatenate(owned)), np.arange(203))
    # Uneven: some client has far more of a class than its share.
    counts = np.array([np.bincount(labels[o], minlength=10) for o in owned])
    assert (counts / counts.sum(0)).max() > 0.5


def test_one_round_of_fedavg_is_the_weighted_mean_of_local_runs():
    settings = dataclasses.replace(SETTINGS, rounds=1, selected=SETTINGS.clients, local_steps=1)
    parts = problem.load(settings, 0)
    first, _ = run.measure("fedavg", settings, parts, 0.0, 0)  # a rate of zero: where it starts
    moved, _ = run.measure("fedavg", settings, parts, 0.5, 0)
    twice, _ = run.measure("fedavg", settings, parts, 1.0, 0)
    change, double = (jax.tree.map(jnp.subtract, w, first) for w in (moved, twice))
    for a, b in zip(jax.tree.leaves(change), jax.tree.leaves(double), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(2 * a, b, rtol=1e-3, atol=1e-6)


def test_a_run_keeps_its_bounds_is_drawn_and_not_repeated(tmp_path):
    for _ in range(2):
        run.run(SETTINGS, 0, tmp_path, resume=True)
    records = record.read(tmp_path)
    ends = [r for r in records if "test_accuracy" in r.metrics]
    assert len(ends) == 2 * len(problem.METHODS)
    for r in ends:
        low = {"global": 0.2, "momentum": 0.8, "full": 0.8}.get(r.method.split("_")[0], 1.0)
        assert low - 1e-6 <= r.metrics["factor_min"] <= r.metrics["factor_max"] <= 5 + 1e-6
    assert all(path.exists() for path in figure.figures(tmp_path))


def test_rounds_are_counted_to_the_first_that_meets_the_target():
    assert run.rounds_to(np.array([0.1, 0.5, 0.4, 0.6]), 0.5) == 2
    assert run.rounds_to(np.array([0.1, 0.2]), 0.5) == 3
