"""The self-tuning language model: its noise, its cost accounting, and that it runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from experiments.common import record
from experiments.stn_ptb import config, figure, problem, run

SMALL = dataclasses.replace(
    config.smoke(),
    sizes=(1_000, 600, 600),
    units=8,
    steps=8,
    context=2,
    budget=90.0,
    points=3,
    grid=(0.1,),
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
    assert all(path.exists() for path in figure.figures(tmp_path))
