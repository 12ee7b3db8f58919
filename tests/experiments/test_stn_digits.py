"""The claims of `stn_digits` in miniature, and that its records are complete."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from experiments.common import record
from experiments.stn_digits import config, figure, problem, run, train

SETTINGS = dataclasses.replace(
    config.smoke(),
    starts=(0.05, 0.7),
    train=64,
    valid=64,
    hidden=16,
    batch=16,
    budget=204,
    points=2,
    trials=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("stn_digits")
    run.run(SETTINGS, 0, out, resume=False)
    return out


def test_every_method_is_recorded_once_and_drawn(finished):
    before = record.read(finished)
    run.run(SETTINGS, 0, finished, resume=True)
    assert record.read(finished) == before
    methods = {r.method for r in before}
    assert {*run.TUNED, *run.LOW, "stn_replay", "grid", "tpe", "no_response"} <= methods
    assert all(np.isfinite(r.metrics["validation_loss"]) for r in before)
    assert max(r.cost for r in before if r.method != "grid") <= SETTINGS.budget
    for path in figure.figures(finished):
        assert path.stat().st_size > 10_000


def test_rates_move_through_the_response_alone(finished):
    last = {r.method: r.metrics for r in record.read(finished)}
    assert last["no_response"]["moved"] < 1e-6  # rounding of the logistic function and back
    assert last["small_scale"]["moved"] < 0.3 * last["sgd"]["moved"]


def test_delta_stn_trains_the_plain_network_of_its_schedule():
    # Its weights never see a perturbation: a replay with the same batches and masks is the run.
    params, sets = problem.initial(16, 0), problem.batches(SETTINGS, 0)
    count = train.cycles("delta_stn", SETTINGS)
    keys = jax.random.split(jax.random.key(0), 2)
    modes = train.Mode(jnp.full((2,), 1.0), jnp.ones(2), jnp.ones(2))
    infos, measured = train.tuned("delta_stn", SETTINGS)(
        params, jnp.full((2,), 0.3), modes, keys, sets
    )
    rates = {p: np.asarray(infos[0][p])[0].reshape(count) for p in problem.PLACES}
    network, (_, inner) = problem.network(16), problem.losses(16)
    tx = train.optimizer(SETTINGS, train.TRAINING * count)
    schedule = bilevel.HyperSchedule(train.TRAINING * jnp.arange(count), rates)

    @jax.jit
    def replay(params):
        def cycle(carry, c):
            sample_key, _ = jax.random.split(jax.random.fold_in(keys[0], c))
            batches, _ = train.sample(SETTINGS, sets, sample_key)

            def step(carry, k):
                params, opt_state = carry
                batch = jax.tree.map(lambda a: a[k], batches)
                h = schedule(train.TRAINING * c + k)
                grads = jax.grad(lambda p: inner(network.plain(None, p), h, batch))(params)
                updates, opt_state = tx.update(grads, opt_state, params)
                return (jax.tree.map(jnp.add, params, updates), opt_state), None

            return jax.lax.scan(step, carry, jnp.arange(train.TRAINING))[0], None

        (params, _), _ = jax.lax.scan(cycle, (params, tx.init(params)), jnp.arange(count))
        return train.evaluated(SETTINGS, network.plain(None, params), sets)

    expected = measured["validation_loss"][0, -1]
    # The order of sums in float32 differs between a mapped run and this one.
    assert float(replay(params)["validation_loss"]) == pytest.approx(float(expected), rel=1e-4)
