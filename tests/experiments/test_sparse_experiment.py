"""`sparse` in miniature: its losses, its hypergradients, its moves, and that it runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

import bilevel
from experiments.common import expected, record
from experiments.sparse import config, figure, problem, run, tasks, tune

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")

SETTINGS = dataclasses.replace(config.smoke(), points=9, trials=3, outer_steps=3, many_steps=3)


@pytest.fixture(scope="module")
def net():
    return tasks.make("elastic_net", SETTINGS, 0)


def test_every_fold_trains_on_the_rows_that_do_not_judge_it(net):
    trains, judges = np.asarray(net.fit["weights"]), np.asarray(net.held["weights"])
    assert not np.any((trains > 0) & (judges > 0)) and np.all((trains > 0) | (judges > 0))
    np.testing.assert_allclose(trains.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(judges.sum(), 1, rtol=1e-5)


def test_the_target_tells_the_loss():
    x, w = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[[0.3], [0.1]]])
    real, truth = ({"x": x, "y": y} for y in (jnp.asarray([1.0]), jnp.asarray([True])))
    np.testing.assert_allclose(problem.row_losses(w, real), [[0.5 * 0.5**2]], rtol=1e-6)
    np.testing.assert_allclose(
        problem.row_losses(w, truth), [[math.log1p(math.exp(-0.5))]], rtol=1e-6
    )
    two = {"x": x, "y": jnp.asarray([1])}
    both = jnp.concatenate([jnp.zeros_like(w), w], -1)
    np.testing.assert_allclose(
        problem.row_losses(both, two), [[math.log1p(math.exp(-0.5))]], rtol=1e-6
    )


def test_above_the_top_every_weight_is_zero_and_just_below_it_one_is_not(net):
    sides = []
    for value in (0.01, -0.05):
        hparams = tasks.hparams_at(net, {"l1": value, "l2": -20.0})
        found, _ = tune.evaluate(
            jnp.zeros(net.shape), hparams, net.fit, net.held, tasks.tolerance(net, 1e-4), 5000
        )
        sides.append(int(jnp.sum(found.params != 0)))
    assert sides[0] == 0 and 0 < sides[1] <= 5


def test_its_solution_is_that_of_scikit_learn(net):
    from sklearn.linear_model import ElasticNet

    x, y, folds = net.rows
    train = folds[0][0]
    l1, l2 = math.exp(net.top - 2.5), math.exp(net.top - 4.0)
    peer = ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), fit_intercept=False, tol=1e-8)
    peer.fit(x[train].astype(np.float64), y[train].astype(np.float64))
    found, _ = tune.evaluate(
        jnp.zeros(net.shape), tasks.hparams_at(net, {"l1": -2.5, "l2": -4.0}), net.fit, net.held,
        tasks.tolerance(net, 1e-5), 20_000,
    )  # fmt: skip
    np.testing.assert_allclose(found.params[0, :, 0], peer.coef_, atol=2e-4)


def test_its_hypergradient_is_the_slope_of_the_criterion(net):
    def at(l1, l2):
        hparams = tasks.hparams_at(net, {"l1": l1, "l2": l2})
        tol = tasks.tolerance(net, 1e-5)
        zeros = jnp.zeros(net.shape)
        return hparams, *tune.evaluate(zeros, hparams, net.fit, net.held, tol, 20_000)

    hparams, found, _ = at(-2.5, -4.0)
    solution = bilevel.hypergrad_solve(
        problem.outer, problem.training(net.fit["step_size"]),
        bilevel.Implicit(bilevel.CG(max_steps=200, rtol=1e-5)), found.params, hparams,
        inner_batch=net.fit, outer_batch=net.held,
    )  # fmt: skip
    for leaf, sides in (("l1", (0.05, 0.0)), ("l2", (0.0, 0.05))):
        up = at(-2.5 + sides[0], -4.0 + sides[1])[2]
        down = at(-2.5 - sides[0], -4.0 - sides[1])[2]
        assert float(solution.grads[leaf]) == pytest.approx(float(up - down) / 0.1, rel=0.1)


def test_a_length_grows_while_the_sign_stays_and_shrinks_where_it_turns():
    box = jnp.asarray([-10.0, 1.0])
    state = tune.Rprop({"a": jnp.asarray([1.0, 1.0, 0.0])}, {"a": jnp.asarray([1.0, 1.0, 1.0])})
    hparams, slopes = {"a": jnp.asarray([0.0, 0.0, 1.0])}, {"a": jnp.asarray([2.0, -0.25, -1.0])}
    moved, state, longest = tune.rprop(slopes, hparams, state, box, 1.2)
    # The third is at its bound and pushes outward.
    np.testing.assert_allclose(moved["a"], [-1.2, 0.2, 1.0], rtol=1e-6)
    np.testing.assert_allclose(state.lengths["a"], [1.2, 0.2, 0.5], rtol=1e-6)
    assert float(longest) == pytest.approx(1.2)


def test_a_padded_design_is_the_matrix():
    from scipy.sparse import csr_matrix

    matrix = csr_matrix(np.asarray([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]], np.float32))
    padded = tasks._padded(matrix, 7)
    assert isinstance(padded, BCOO) and padded.nse == 7
    np.testing.assert_array_equal(padded.todense(), matrix.toarray())
    with pytest.raises(ValueError, match="3 entries do not fit into 2"):
        tasks._padded(matrix, 2)


def test_solves_from_the_nearest_solution_cost_less(net):
    warm = tune.Warm(net, SETTINGS, lambda *args, **metrics: None)
    warm({"l1": -3.0, "l2": -4.0})
    first = warm.cost
    warm({"l1": -3.01, "l2": -4.0})
    assert warm.cost - first < first / 2


def test_it_runs_resumes_and_is_drawn(tmp_path):
    run.run(SETTINGS, 0, tmp_path, resume=False)
    written = (tmp_path / record.FILE).read_bytes()
    run.run(SETTINGS, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == written
    records = record.read(tmp_path)
    last = {m: r for (m, _), r in record.final(records).items()}
    told = run.summary(records)
    for task in SETTINGS.tasks:
        mine, grid = last[f"{task}_hypergradient"], last[f"{task}_grid"]
        ratio = told[f"{task}_hypergradient_over_grid"]["criterion"]
        assert ratio["mean"] == pytest.approx(mine.metrics["criterion"] / grid.metrics["criterion"])
        # A run pays for what its points paid, and the start of all.
        path = [r for r in records if r.method == f"{task}_grid_path"]
        assert len(path) == SETTINGS.points and path[-1].cost == grid.cost
    assert "elastic_net_scikit_learn_over_grid" in told
    assert all(path.exists() for path in figure.figures(tmp_path))


def test_an_interval_is_that_of_student():
    told = expected.interval([1.0, 2.0, 3.0])
    assert told["high"] == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert told["low"] == pytest.approx(4 - told["high"])


def test_one_compilation_serves_all_seeds():
    first, second = (tasks.make("elastic_net", SETTINGS, seed) for seed in (0, 1))
    assert jax.tree.map(jnp.shape, (first.fit, first.held, first.full)) == jax.tree.map(
        jnp.shape, (second.fit, second.held, second.full)
    )
