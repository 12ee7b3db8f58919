"""The closed forms that `stn_ridge` is judged by, and that it runs."""

import dataclasses

import numpy as np
import pytest

from experiments.common import record
from experiments.stn_ridge import config, problem, run

SETTINGS = config.cpu()


def _solution(train, lam):
    x, y = (np.asarray(a, np.float64) for a in train)
    return np.linalg.solve(x.T @ x / len(y) + np.exp(lam) * np.eye(x.shape[1]), x.T @ y / len(y))


def test_the_jacobian_is_the_derivative_of_the_solution():
    train, _ = problem.data(SETTINGS, 0)
    difference = (_solution(train, -1 + 1e-4) - _solution(train, -1 - 1e-4)) / 2e-4
    np.testing.assert_allclose(problem.jacobian(train, -1.0), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("centred", [True, False])
def test_the_fitted_slopes_minimise_the_perturbed_loss(centred):
    # By Gauss-Hermite quadrature: the gradient of E h(w + theta d, lam + d) is zero there.
    train, _ = problem.data(SETTINGS, 1)
    x, y = (np.asarray(a, np.float64) for a in train)
    h, b, sigma, lam = x.T @ x / len(y), x.T @ y / len(y), 0.5, -0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    d, weights = sigma * nodes, weights / weights.sum()
    decays = np.exp(lam + d)
    if centred:
        theta, w = problem.jacobian(train, lam, sigma), _solution(train, lam)
    else:
        theta = problem.joint(train, lam, sigma)
        mean_decay = np.sum(weights * decays)
        right = b - np.sum(weights * d * decays) * theta
        w = np.linalg.solve(h + mean_decay * np.eye(len(b)), right)
    points = w + d[:, None] * theta
    gradients = points @ h - b + decays[:, None] * points
    assert np.linalg.norm((weights * d) @ gradients) < 1e-12 * np.linalg.norm(b)


def test_the_optimum_is_where_the_curve_is_lowest():
    train, valid = problem.data(SETTINGS, 2)
    best, loss = problem.optimum(train, valid)
    around = problem.curve(train, valid, [best - 0.01, best, best + 0.01])
    assert around[1] < min(around[0], around[2])
    assert loss == pytest.approx(around[1], rel=1e-7)


def test_a_short_run_moves_towards_the_optimum_and_is_not_repeated(tmp_path):
    settings = dataclasses.replace(config.smoke(), cycles=600, slower=1, response_steps=500)
    for _ in range(2):
        run.run(settings, 0, tmp_path, resume=True)
    done = record.read(tmp_path, method="delta_stn")
    assert [r.step for r in done] == list(range(run.KEPT))
    assert done[-1].metrics["worst_error"] < 0.5 * done[0].metrics["worst_error"]
