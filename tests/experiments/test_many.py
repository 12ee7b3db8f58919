"""`many` in miniature: it runs, falls back to one penalty exactly, and solves what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.many import config, figure, problem, run, sets

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")

SETTINGS = config.smoke()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("many")
    run.run(dataclasses.replace(SETTINGS, errors=1e9), 0, out, resume=False)
    return out


def test_it_runs_and_falls_back_to_the_searched_penalty(out):
    last = record.final(record.read(out))
    for name, _ in SETTINGS.sets:
        chosen, one = (last[f"{name}_{arm}", 0] for arm in ("chosen", "one"))
        assert chosen.metrics["spread"] == 0 and chosen.cost > one.cost
        assert chosen.metrics["test_loss"] == one.metrics["test_loss"]
        assert one.metrics["spread"] < 1e-12
        many = last[f"{name}_spread_1", 0].metrics
        assert many["spread"] > 1e-3 and many["test_loss"] != one.metrics["test_loss"]


def test_the_picture_and_the_summary_compare_draw_by_draw(out):
    records = record.read(out)
    told = run.summary(records + [r._replace(seed=1) for r in records])
    assert told["diabetes_chosen_over_one"]["test_loss"]["high"] == 1
    assert told["chosen_against_one"]["worse"]["mean"] == 0
    none = told["diabetes_none_over_one"]["test_loss"]["mean"]
    last = record.final(records)
    losses = [last[f"diabetes_{arm}", 0].metrics["test_loss"] for arm in ("none", "one")]
    assert none == pytest.approx(losses[0] / losses[1])
    assert all(path.exists() for path in figure.figures(out))


@pytest.mark.parametrize("kind", [problem.RIDGE, problem.LOGISTIC])
def test_fits_are_minima_and_the_derivative_is_that_of_the_refitted(kind):
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(20, 3)), np.sign(draw.normal(size=20))
    cv = problem.cross_validation(kind, 20, SETTINGS)
    lam, start = jnp.array([0.3, 1.0, -0.5]), cv.init(jnp.zeros(4))
    with jax.numpy_rank_promotion("allow"):
        loss = jax.jit(jax.value_and_grad(problem.value(cv, kind, rows), has_aux=True))
        (_, w), slope = loss(lam, start)
        told = kind.read(jax.tree.map(lambda x: x[0], cv.inner_batch(rows)[0]))
        assert jnp.linalg.norm(jax.grad(kind.penalized)(w[0], lam, told)) < 1e-7
        up, down = (loss(lam.at[1].add(e), start)[0][0] for e in (1e-4, -1e-4))
    np.testing.assert_allclose(slope[1], (up - down) / 2e-4, rtol=1e-5)


def test_rows_are_standardized_by_what_is_fitted():
    fitted, test = sets.rows("diabetes", 60, 100, 0)
    assert fitted.x.shape == (60, 64) and test.x.shape == (100, 64)  # sex squared is sex
    np.testing.assert_allclose(fitted.x[:, :10].mean(0), 0, atol=0.05)  # but for what is cut
    np.testing.assert_allclose(fitted.y.std(), 1, rtol=1e-12)
    assert np.abs(test.x).max() <= 6
