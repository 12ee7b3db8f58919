"""The self-tuning language model: its noise, its cost accounting, and that it runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from experiments.common import record
from experiments.stn_ptb import (
    config,
    figure,
    problem,
    run,
    starts,
    starts_problem,
    starts_summary,
)

SMALL = dataclasses.replace(
    config.smoke(),
    sizes=(1_000, 600, 600),
    units=8,
    steps=8,
    context=2,
    budget=90.0,
    points=3,
    grid=(0.1,),
    starts=dataclasses.replace(
        config.smoke().starts,
        sizes=(600, 600, 600),
        units=8,
        batch=8,
        steps=8,
        context=2,
        valid_batch=8,
        budget=150.0,
    ),
)


def _batch(key):
    tokens = jax.random.randint(key, (8, 11), 0, 50)
    return {"x": tokens[:, :-1], "y": tokens[:, 3:], "key": key}


@pytest.fixture(autouse=True)
def defaults():
    """What those who run the experiment have: float32 and broadcasting."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def test_perturbed_sequences_are_the_plain_model_at_their_own_displacement():
    # With no rate above zero nothing is random: every row must be its own network's.
    network, params = problem.build(SMALL, 50, jax.random.key(0))
    quiet = problem.hparams(0.1, 0.1)
    lam = problem.space(SMALL).unconstrain(quiet)
    response = network.init(jax.random.key(1), params, lam)
    response = jax.tree.map(lambda x: 3 * x, response)  # gains start small
    draws = jax.random.normal(jax.random.key(2), (8, problem.COUNT))
    each = {name: lam[name] + draws[:, i] for i, name in enumerate(sorted(lam))}
    batch = _batch(jax.random.key(3))
    outer, _ = problem.losses(network)
    together = jax.jit(outer)(network.apply(response, params, each), None, batch)
    alone = jax.jit(
        jax.vmap(
            lambda d, x, y: outer(
                network.everywhere(response, params, d), None, {"x": x[None], "y": y[None]}
            )
        )
    )(each, batch["x"], batch["y"])
    np.testing.assert_allclose(together, alone.mean(), rtol=1e-5)
    assert float(jnp.ptp(alone)) > 0


def test_only_the_training_loss_reads_the_hyperparameters():
    network, params = problem.build(SMALL, 50, jax.random.key(0))
    weights = network.plain(
        network.init(jax.random.key(1), params, problem.hparams(0.1, 0.1)), params
    )
    _, inner = problem.losses(network)
    batch = _batch(jax.random.key(4))
    at = jax.jit(lambda h: inner(weights, h, batch))
    base = problem.hparams(0.1, 0.1)
    first = float(at(base))
    for name in (*problem.RATES, *problem.PENALTIES):
        changed = float(at(base | {name: jnp.float32(0.7)}))
        assert changed != first, name


def test_a_small_run_moves_what_it_tunes_replays_it_and_is_not_repeated(tmp_path):
    run.run(SMALL, 0, tmp_path, resume=False)
    before = (tmp_path / record.FILE).read_bytes()
    run.run(SMALL, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == before
    records = record.read(tmp_path)
    last = {method: r.metrics for (method, _), r in record.final(records).items()}
    second = {method: last.pop(method) for method in list(last) if method.startswith("starts_")}
    assert last.keys() == {
        "stn", "replay", "final_value", "grid_10", "trial_0", "trial_1", "random_search"
    }  # fmt: skip
    for metrics in last.values():
        assert math.isfinite(metrics["test_perplexity"]) and metrics["best_perplexity"] < 52
    costs = {method: max(r.cost for r in records if r.method == method) for method in last}
    assert costs["stn"] <= SMALL.budget and costs["random_search"] <= SMALL.budget
    assert costs["replay"] == costs["grid_10"] == SMALL.budget
    like = problem.hparams(SMALL.start, SMALL.penalty)
    schedule = bilevel.HyperSchedule.load(tmp_path / "arrays" / "schedule_0.npz", like)
    for name, first in like.items():
        moved = schedule(10_000)[name]
        assert float(schedule(0)[name]) == pytest.approx(float(first), rel=1e-5)
        assert abs(float(moved) - float(first)) > 1e-4 * float(first), name
    chosen = run.summary(records)["best_grid"]
    assert chosen["validation_perplexity"]["mean"] == last["grid_10"]["validation_perplexity"]
    _check_second_part(second, records, tmp_path)
    assert all(path.exists() for path in figure.figures(tmp_path))


def _check_second_part(last, records, out):
    """The part about starting points, of the same small run."""
    small = SMALL.starts
    assert last.keys() == {
        f"starts_{name}" for name in (
            "stn", "stn_replay", "delta_stn", "delta_stn_replay", "grid_00", "grid_40",
            "random_search", "tpe",
        )
    }  # fmt: skip
    for name, metrics in last.items():
        assert math.isfinite(metrics["test_loss"]) and metrics["validation_loss"] < math.log(52)
        cost = max(r.cost for r in records if r.method == name)
        assert 0 < cost <= small.budget
    for method in starts.TUNED:
        found = record.load_arrays(out, f"starts_{method}_0")["rates"]
        np.testing.assert_allclose(found[:, 0], small.starts, rtol=1e-4)
        # Both leave where they started, and what is recorded is where they are.
        assert np.all(np.abs(found[:, -1] - found[:, 0]) > 1e-4)
        metrics = last[f"starts_{method}"]
        np.testing.assert_allclose(metrics["rates"], found[:, -1], rtol=1e-6)
        assert metrics["spread"] == pytest.approx(np.ptp(found[:, -1]) / np.ptp(small.starts))
    grid = starts_summary.summary(records)["starts_grid"]["validation_loss"]["mean"]
    assert grid == min(last[f"starts_grid_{rate}"]["validation_loss"] for rate in ("00", "40"))


def test_a_plain_network_follows_its_schedule(tmp_path):
    # The same draws: runs agree until their rates do not.
    part = starts.Part(SMALL.starts, 0, record.Records(tmp_path, 0))
    keys = jnp.stack([part._keys("grid", 1)[0]] * 2)
    every = 10 * SMALL.starts.inner_steps
    rates = np.full((2, 20), 0.1)
    rates[1, 10:] = 0.9  # after the first measurement
    losses, test = part._train(rates, every, keys)
    assert losses.shape == (2, SMALL.starts.points) == (2, 2)
    np.testing.assert_allclose(losses[0, 0], losses[1, 0], rtol=1e-6)
    assert abs(float(losses[0, 1] - losses[1, 1])) > 1e-3 and np.all(np.isfinite(test))


def test_costs_are_those_of_the_convention():
    # A layer, by hand: 6/3, 5/3 and 4/3 of a gradient; validation reads two batches.
    small = dataclasses.replace(SMALL.starts, inner_steps=2, batch=8, valid_batch=16)
    assert starts_problem.cycle_cost(small, "stn") == pytest.approx(2 * 2 + 2 * 4 / 3)
    assert starts_problem.cycle_cost(small, "delta_stn") == pytest.approx(2 * 8 / 3 + 2 * 4 / 3)
    assert run.cycle_cost(dataclasses.replace(SMALL, inner_steps=3)) == pytest.approx(6 + 4 / 3)
