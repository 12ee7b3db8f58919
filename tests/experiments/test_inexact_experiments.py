"""`hoag` and `maid`: their problems are what they say, and their budgets are kept."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import random as random_sparse

from experiments.common import data, record
from experiments.hoag import config as hoag_config
from experiments.hoag import methods
from experiments.hoag import problem as hoag_problem
from experiments.hoag import run as hoag_run
from experiments.hoag import truth as hoag_truth
from experiments.maid import config as maid_config
from experiments.maid import images
from experiments.maid import problem as maid_problem
from experiments.maid import run as maid_run


def test_sparse_rows_have_unit_length_and_give_the_outputs_of_dense_ones():
    x = random_sparse(12, 80, 0.3, format="csr", random_state=0, dtype=np.float32)
    labels = np.arange(12, dtype=np.int32)
    batch = hoag_problem._sparse(data.Split(x, labels))
    dense = x.toarray() / np.maximum(np.linalg.norm(x.toarray(), axis=1, keepdims=True), 1e-12)
    assert np.bincount(batch["rows"]["major"]).max() > 1  # some rows take several pieces
    w, z = jax.random.normal(jax.random.key(0), (80,)), jnp.linspace(-1.0, 1.0, 12)
    found, pull = jax.vjp(lambda w: hoag_problem.outputs(w, None, batch), w)
    np.testing.assert_allclose(found, dense @ w, atol=1e-5)
    np.testing.assert_allclose(pull(z)[0], z @ dense, atol=1e-5)
    np.testing.assert_allclose(hoag_truth._matrix(batch).toarray(), dense, atol=1e-7)
    np.testing.assert_array_equal(batch["y"], np.where(labels < 10, 1, -1))


def test_any_first_part_of_the_grid_covers_the_range():
    points = methods.grid(hoag_config.cpu())
    assert len(points) == len(set(points.tolist())) == 31
    np.testing.assert_allclose(np.sort(points), np.linspace(-6, 6, 33)[1:-1])
    np.testing.assert_allclose(np.sort(points[:7]), np.linspace(-6, 6, 9)[1:-1])


def test_the_truth_of_hoag_has_the_derivative_of_its_value_and_a_bound_that_holds():
    x = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    y = np.where(x[:, 0] > 0, 1, -1).astype(np.float32)
    part = {"x": jnp.asarray(x[:30]), "y": jnp.asarray(y[:30])}
    other = {"x": jnp.asarray(x[30:]), "y": jnp.asarray(y[30:])}
    exact = hoag_truth.of(hoag_problem.Task(part, other, other, (4,)))
    np.testing.assert_allclose(
        exact.outer_smoothness, np.linalg.norm(x[30:], 2) ** 2 / 4, rtol=2e-3
    )
    zero, h = jnp.zeros(4), 1e-3
    middle, low, high = (hoag_truth.at(exact, zero, zero, lam) for lam in (0.5, 0.5 - h, 0.5 + h))
    slope = (high["value"] - low["value"]) / (2 * h)
    assert middle["derivative"] == pytest.approx(slope, rel=1e-4)
    # No step was made: the hypergradient of zeros is zero.
    assert 0 < abs(middle["derivative"]) <= middle["bound"]


def test_costs_until_near_are_compared_seed_by_seed():
    def run(method, seed, *losses, spent=None):
        return [
            record.Record(seed, f"a9a_{method}", k, 100.0 * (k + 1), {
                "validation_loss": loss, "products": 10.0 * k,
                "spent": spent or 100.0 * (k + 1)})
            for k, loss in enumerate(losses)
        ]  # fmt: skip

    told = hoag_run.summary(
        [
            *run("exact", 0, 0.5, 0.4, 0.3), *run("exponential", 0, 0.3001),
            *run("exact", 1, 0.5, 0.2), *run("exponential", 1, 0.4, 0.3, spent=2000.0),
        ]
    )  # fmt: skip
    ratios = told["near_a9a_exponential"]
    # The second seed was not near after two steps: it was stopped by its budget.
    assert ratios["over_rival"]["values"] == {"0": pytest.approx(1 / 3), "1": 2000 / 200}
    assert ratios["missed"]["mean"] == 0.5


def test_a_run_of_hoag_keeps_its_budget_and_reads_the_test_part_once(tmp_path):
    settings = dataclasses.replace(hoag_config.smoke(), single=())
    hoag_run.run(settings, 0, tmp_path, False)
    found = record.read(tmp_path)
    (cold,) = (r for r in found if r.method == "digits_cold")
    for method in methods.ACCURACIES:
        mine = [r for r in found if r.method == f"digits_{method}"]
        costs, losses = zip(*((r.cost, r.metrics["validation_loss"]) for r in mine), strict=True)
        assert costs[0] > 0 and all(b > a for a, b in zip(costs, costs[1:], strict=False))
        assert all(cost <= cold.cost for cost in costs[1:])
        goal = cold.metrics["validation_loss"]
        assert all(loss > goal for loss in losses[:-1])  # the run ends where it is reached
        assert list(losses) == sorted(losses, reverse=True)
        assert ["test_loss" in r.metrics for r in mine] == (len(mine) - 1) * [False] + [True]
    hoag_run.run(settings, 0, tmp_path, True)
    assert record.read(tmp_path) == found
    near = hoag_run.summary(found)
    assert near["near_digits_cold"]["missed"]["mean"] == 0


@pytest.fixture(scope="module")
def settings():
    return maid_config.smoke()


def test_the_quadratic_problem_knows_its_optimum(settings):
    task = maid_problem.quadratic(settings, 3)
    a2, a3, b2 = task.train
    at = task.certificate.at(task.params, task.hparams)
    hessian = jax.hessian(task.inner)(task.params, task.hparams, task.train)
    np.testing.assert_allclose(at.convexity, np.linalg.eigvalsh(hessian)[0], rtol=1e-9)
    np.testing.assert_allclose(at.mixed_norm, np.linalg.norm(a2.T @ a3, 2), rtol=1e-9)
    a1, b1 = task.valid

    def value(t):
        return task.outer(jnp.linalg.lstsq(a2, b2 - a3 @ t)[0], t, task.valid)

    d = a1 @ jnp.linalg.lstsq(a2, a3)[0]
    best = jnp.linalg.lstsq(d, a1 @ jnp.linalg.lstsq(a2, b2)[0] - b1)[0]
    assert float(task.test(None, best)["above_optimum"]) == pytest.approx(0, abs=1e-9)
    t = best + 0.1
    expected = float(value(t) - value(best))
    assert float(task.test(None, t)["above_optimum"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["variation", "experts"])
def test_a_denoising_problem_knows_its_constants(settings, name):
    small = dataclasses.replace(
        settings, side=2, tested=1, tested_side=2, weight=-1.5, smoothing=-1.5
    )
    try:
        task = maid_problem.load(name, small, 0)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    x, theta = task.params, task.hparams
    flat, back = jax.flatten_util.ravel_pytree(theta)

    def slope(v, t):
        return jax.grad(task.inner)(v.reshape(x.shape), back(t), task.train).ravel()

    b = jax.jacobian(slope, 1)(x.ravel(), flat)
    norm = float(task.certificate.at(x, theta).mixed_norm)
    assert np.linalg.norm(b, 2) <= norm * (1 + 1e-9)
    if name == "variation":
        assert norm == pytest.approx(float(np.linalg.norm(b)), rel=1e-9)
    for at in (x.ravel(), jnp.zeros(x.size)):  # a flat image bends the penalty most
        bends = jnp.linalg.eigvalsh(jax.jacobian(slope)(at, flat))
        assert float(bends[0]) >= 1 - 1e-9
        largest = float(task.smoothness(x, theta))
        assert float(bends[-1]) <= largest * (1 + 1e-9)
    assert float(bends[-1]) >= 0.4 * largest  # and the bound is of its order


def test_decibels():
    clean = jnp.zeros((2, 12, 12))
    np.testing.assert_allclose(images.decibels(clean + 0.1, clean), [20.0, 20.0])
    edge = clean.at[:, :4].set(1.0)
    np.testing.assert_allclose(images.decibels(clean + 0.1 + edge, clean), [20.0, 20.0])


def test_a_promise_that_is_broken_is_counted(settings):
    task = maid_problem.quadratic(settings, 0)
    old, (_, slope) = jnp.ones(10), task.truth(np.ones(10))
    norm = np.linalg.norm(slope)

    def told(length, bound, error):
        found = slope + error
        known = maid_run.Guarantees(task)
        stats = {"accepted": True, "step_size": length, "error_bound": bound * norm}
        info = SimpleNamespace(stats=stats, hypergrad_norm=np.linalg.norm(found))
        known.check(old, old - length * found, info)
        return known.told["broken_decreases"], known.told["broken_bounds"]

    assert told(1e-6, 1e-3, 0.0) == (0, 0)
    assert told(1.0, 1e-3, 0.0) == (1, 0)  # far beyond the minimum
    assert told(1e-6, 1e-3, 1e-2 * slope) == (0, 1)
    assert told(1e-6, 1.1, 0.0) == (0, 1)  # a bound that certifies nothing


@pytest.mark.slow
def test_a_run_of_maid_ends_where_its_budget_does(settings, tmp_path):
    chosen = dataclasses.replace(settings, tasks=("quadratic",))
    maid_run.run(chosen, 0, tmp_path, False)
    found = record.read(tmp_path)
    assert {r.method for r in found} == {f"quadratic_{m}" for _, m in maid_run.tasks(chosen)}
    for last in record.final(found).values():
        assert last.metrics["end"] == 1.0 and last.metrics["above_optimum"] >= -1e-9
    maid_run.run(chosen, 0, tmp_path, True)
    assert record.read(tmp_path) == found
