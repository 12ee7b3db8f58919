"""The parameters that belong to the reported value, for every loop; schedules of every loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
from bilevel.inner.hypernetwork import Hypernetwork
from bilevel.inner.layers import TunedLinear, split_layers
from bilevel.outer.global_response import global_response

KEY = jax.random.key(0)
SPACE = bilevel.Space({"decay": bilevel.Interval(0.0, 2.0), "count": bilevel.Integer(0, 5)})
HPARAMS = {"decay": jnp.array(0.5), "count": jnp.array(2.0)}
INNER, OUTER = jnp.full((2, 8, 3), 2.0), jnp.ones((8, 3))


def train(w, lam, batch):
    strength = lam["decay"] + 0.1 * lam["count"]
    return jnp.mean((w[None] - batch) ** 2) + strength * jnp.sum(w**2)


def valid(w, lam, batch):
    return jnp.mean((w[None] - batch) ** 2) + 0.1 * (lam["decay"] + lam["count"])


def self_tuning(centred, constrain=SPACE, **settings):
    network = bilevel.StructuredResponse(centred=centred, gain_scale=0.3)
    return bilevel.self_tuning(
        valid, train, optax.sgd(0.1), optax.sgd(1.0), 2, groups=1, network=network, scale=0.1,
        tune_scales=False, constrain=constrain, **settings,
    )  # fmt: skip


def alternate(response, tx):
    return bilevel.alternate(valid, train, response, tx, optax.sgd(0.5), 2, constrain=SPACE)


TX = optax.sgd(0.1)
LOOPS = {
    "STN with bounds and whole numbers": self_tuning(False),
    "STN without bounds": self_tuning(False, constrain=None),
    "STN while it warms up": self_tuning(False, warm_up=2),
    "Delta-STN": self_tuning(True),
    "STN, two validation steps": self_tuning(False, outer_steps=2),
    "alternate, Implicit": alternate(bilevel.Implicit(bilevel.Dense()), TX),
    "alternate, Unroll": alternate(bilevel.Unroll(TX, 2), TX),
    "global_response": global_response(
        valid, train, Hypernetwork((4,)), lambda key, lam: lam, TX, optax.sgd(0.5), 2, draws=2
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_value_belongs_to_what_is_deployed_with_the_hparams_before(name):
    alg = LOOPS[name]
    inner = jnp.full((4, 8, 3), 2.0) if "Unroll" in name else INNER
    outer = jnp.stack([OUTER, 3 * OUTER]) if "two" in name else OUTER
    step, deploy = jax.jit(alg.step), jax.jit(alg.deploy)
    state = alg.init(jnp.array([0.3, -0.2, 0.1]), HPARAMS)
    for i in range(3):
        new, info = step(state, inner_batches=inner, outer_batch=outer, key=jax.random.key(i))
        before = state.hparams
        again = valid(deploy(new, before), before, OUTER)
        # The same operations on the same numbers, compiled apart: rounding of float64.
        np.testing.assert_allclose(again, info.value, rtol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, info.hparams, before)
        state = new
    moved = abs(float(state.hparams["decay"] - HPARAMS["decay"]))
    assert (moved > 1e-3) or "warms" in name
    if "whole" in name:  # the network reads what was not yet rounded: no inverse of T finds it
        assert float(state.hparams["count"]) == round(float(state.hparams["count"]))
        rounded = SPACE.unconstrain(before)
        outer = new.moved.outer._replace(raw=rounded)
        guess = LOOPS[name].deploy(
            new._replace(measured=rounded, moved=new.moved._replace(outer=outer)), before
        )
        assert abs(float(valid(guess, before, OUTER) - info.value)) > 1e-6
    now = alg.deploy(state)
    np.testing.assert_array_equal(now, alg.deploy(state, state.hparams))


def test_what_is_deployed_for_layers_is_what_their_losses_read():
    network, params = split_layers(TunedLinear(3, 1, 1, rngs=nnx.Rngs(0)), gain_scale=0.3)

    def loss(params, h, batch):
        model, d = network.merge(params)
        return jnp.mean(model(batch, d) ** 2) + 0 * jnp.sum(h)

    def read(params, h, batch):
        return loss(params, h, batch) * jnp.exp(jnp.mean(h))

    alg = bilevel.self_tuning(
        loss, read, optax.sgd(0.1), optax.sgd(0.1), 1, network=network, tune_scales=False
    )
    state = alg.init(params, jnp.float32(0.2))
    x = jax.random.normal(KEY, (4, 3), jnp.float32)
    new, info = jax.jit(alg.step)(state, inner_batches=x[None], outer_batch=x, key=KEY)
    again = loss(alg.deploy(new, state.hparams), state.hparams, x)
    np.testing.assert_allclose(again, info.value, rtol=1e-5)  # float32, sums in another order


@pytest.mark.parametrize("by_loss", [True, False])
def test_the_best_pair_of_fit_is_what_its_value_measured(by_loss):
    alg = LOOPS["STN with bounds and whole numbers"]

    def evaluate(point):
        return float(valid(point.params, point.hparams, OUTER))

    out = bilevel.fit(
        alg, alg.init(jnp.zeros(3), HPARAMS), INNER, OUTER, steps=6, key=KEY, progress=False,
        evaluate=None if by_loss else evaluate,
    )  # fmt: skip
    again = valid(out.best_params, out.best_hparams, OUTER)
    np.testing.assert_allclose(again, out.best_value, rtol=1e-12)
    assert float(jnp.max(jnp.abs(out.best_params - out.state.params))) > 1e-3


@pytest.mark.parametrize("name", ["alternate, Implicit", "global_response", "STN without bounds"])
def test_every_loop_leaves_a_schedule(name):
    alg = LOOPS[name]
    state = alg.init(jnp.zeros(3), HPARAMS)
    run = jax.jit(
        lambda state: bilevel.scan_run(alg, state, lambda key: (INNER, OUTER), 3, key=KEY)
    )(state)
    schedule = bilevel.HyperSchedule.from_infos(run.infos, steps_each=2)
    assert float(schedule(0)["decay"]) == float(HPARAMS["decay"])
    for t in range(6):
        assert float(schedule(t)["decay"]) == float(run.infos.hparams["decay"][t // 2])
    assert len(set(np.asarray(run.infos.hparams["decay"]))) == 3


def test_an_entry_of_a_schedule_comes_in_force_at_its_step_and_not_after_it():
    schedule = bilevel.HyperSchedule(jnp.array([2, 5, 6]), jnp.array([10.0, 20.0, 30.0]))
    expected = {0: 10, 2: 10, 4: 10, 5: 20, 6: 30, 7: 30, 100: 30}
    assert {t: int(schedule(t)) for t in expected} == expected
    run = jax.vmap(schedule)(jnp.array(list(expected)))
    np.testing.assert_array_equal(run, list(expected.values()))
