"""`games` in miniature: the update's matrix is what the optimizer does."""

import dataclasses

import numpy as np
import pytest

from experiments.common import record
from experiments.games import config, figure, problem, run


@pytest.mark.parametrize("method", problem.METHODS)
def test_runs_follow_the_powers_of_the_update(method):
    momentum, rate, steps = problem.METHODS[method], 0.06, 20
    distances = run.play(problem.ROTATION, momentum, rate, steps, seed=3)
    start = np.random.default_rng(3).standard_normal(2)
    values, vectors = np.linalg.eig(problem.ROTATION)
    parts = np.linalg.solve(vectors, start.astype(complex))
    point = vectors @ np.array(
        [
            (np.linalg.matrix_power(problem.update(momentum, rate, v), steps) @ [0, 0, p])[2]
            for v, p in zip(values, parts, strict=True)
        ]
    )
    assert distances[-1] == pytest.approx(np.linalg.norm(point), rel=1e-4)


def test_the_mixed_game_has_the_eigenvalues_it_says():
    values = np.linalg.eigvals(problem.mixed())
    wanted = [0.3, 1.0, 0.3j, -0.3j, 1j, -1j]
    assert all(np.min(np.abs(values - v)) < 1e-12 for v in wanted)


def test_a_short_run_is_drawn_and_not_repeated(tmp_path):
    settings = dataclasses.replace(config.smoke(), steps=60)
    for _ in range(2):
        run.run(settings, 0, tmp_path, resume=True)
    records = record.read(tmp_path)
    assert len(records) == 2 * len(problem.METHODS) * settings.points
    assert all(path.exists() for path in figure.figures(tmp_path))
