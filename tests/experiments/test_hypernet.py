"""The exact best response `hypernet` is judged by, and that its networks learn it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.hypernet import config, decays, figure, problem, run

CURVE = config.DIGITS


def test_exact_solutions_are_stationary_and_zero_where_zero_is_best():
    (x, t), _ = problem.images(CURVE, 0)
    lam = np.array([-2.0, 0.0, 2.0, 3.5])
    features = np.concatenate([x, np.ones((10, 1))], axis=1).astype(np.float64)
    for w, decay in zip(problem.solutions((x, t), lam), np.exp(lam), strict=True):
        slope = features.T @ (features @ w - t) / (problem.DEVIATION**2 * t.size)
        norm = np.linalg.norm(w)
        if norm:
            assert np.linalg.norm(slope + decay * w / norm) < 1e-9 * decay
        else:  # the subgradients of the decay reach as far as decay
            assert np.linalg.norm(slope) < decay
    assert not problem.solutions((x, t), lam)[-1].any()


def test_the_loss_of_the_solution_is_the_least_by_the_loss_that_is_trained():
    train, _ = problem.images(CURVE, 1)
    w = problem.solutions(train, [0.5])[0]
    tree = {"kernel": jnp.asarray(w[:-1], jnp.float32), "bias": jnp.asarray(w[-1], jnp.float32)}
    loss = jax.jit(lambda w: problem.inner(w, jnp.float32(0.5), train))
    draw = np.random.default_rng(0)
    for _ in range(5):
        near = jax.tree.map(lambda a: a + 0.01 * draw.normal(size=a.shape), tree)
        assert loss(near) > loss(tree)


def test_the_lowest_point_of_a_parabola_lies_between_grid_points():
    lam = np.linspace(-2, 4, 61)
    assert problem.lowest(lam, (lam - 0.537) ** 2) == pytest.approx(0.537)
    assert problem.lowest(lam, -lam) == 4.0


def test_a_decay_a_weight_adds_its_squares():
    w = {"kernel": jnp.full((3, 10), 2.0), "bias": jnp.zeros(10)}
    lam = jax.tree.map(lambda a: jnp.full_like(a, np.log(0.1)), w)
    batch = (jnp.ones((4, 3)), jnp.arange(4))
    extra = decays.inner(w, lam, batch) - decays.outer(w, lam, batch)
    assert float(extra) == pytest.approx(0.5 * 0.1 * 30 * 4, rel=1e-5)
    shared = decays.inner(w, jnp.float32(np.log(0.1)), batch)
    assert float(shared) == pytest.approx(float(decays.inner(w, lam, batch)), rel=1e-5)


def test_a_short_run_learns_the_curve_and_is_not_repeated(tmp_path):
    smoke = config.smoke()
    curve = dataclasses.replace(smoke.curves[0], steps=3_000, search_steps=200)
    settings = dataclasses.replace(smoke, curves=(curve,))
    for _ in range(2):
        run.run(settings, 0, tmp_path, resume=True)
    last = {method: r.metrics for (method, _), r in record.final(record.read(tmp_path)).items()}
    assert len(record.read(tmp_path, method="digits_global")) == run.POINTS
    assert last["digits_global"]["error"] < 0.5  # 0.3 after the 20 000 steps of the experiment
    assert (
        last["digits_global"]["near_gap"]
        < 0.2
        < np.ptp(record.load_arrays(tmp_path, "digits_0")["exact"])
    )
    assert all(np.isfinite(last[m]["validation_loss"]) for m in (*run.LOCAL, *run.SEARCHES))
    assert all(path.stat().st_size > 0 for path in figure.figures(tmp_path))
