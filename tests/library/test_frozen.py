"""Leaves that the inner optimizer freezes do not respond: against the solve of the others alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.inner.hypernetwork import Hypernetwork
from bilevel.outer.frozen import trained_leaves

K = jax.random.split(jax.random.key(0), 4)
X, Y = jax.random.normal(K[0], (30, 4)), jax.random.normal(K[1], (30,))
XV, YV = jax.random.normal(K[2], (20, 4)), jax.random.normal(K[3], (20,))
LAM = jnp.array(-1.0)
LABELS = {"frozen": True, "head": False}


def whole(p):
    return jnp.concatenate([p["frozen"], p["head"]])


def model(p, lam, batch):
    return batch[0] @ whole(p)


def error(z, lam, batch):
    return 0.5 * jnp.mean((z - batch[1]) ** 2)


def penalty(p, lam):
    return 0.5 * jnp.exp(lam) * jnp.sum(whole(p) ** 2)


SPLIT = bilevel.GaussNewton(model, error, penalty=penalty)


def valid(p, lam, batch):
    return error(model(p, lam, batch), lam, batch)


def solved(lam, frozen):
    z = X[:, 2:]
    rest = (Y - X[:, :2] @ frozen) / 30
    return {"frozen": frozen, "head": jnp.linalg.solve(z.T @ z / 30 + jnp.exp(lam) * jnp.eye(2),
                                                       z.T @ rest)}  # fmt: skip


FROZEN = jnp.array([1.0, -1.0])
TRUTH = jax.grad(lambda lam: valid(solved(lam, FROZEN), lam, (XV, YV)))
OPTIMIZERS = {
    "multi_transform": optax.multi_transform(
        {"t": optax.sgd(0.3), "f": optax.set_to_zero()}, {"frozen": "f", "head": "t"}
    ),
    "freeze": optax.chain(optax.sgd(0.3, 0.9), optax.transforms.freeze(LABELS)),
    "masked": optax.chain(optax.masked(optax.set_to_zero(), LABELS), optax.sgd(0.3)),
    "times zero": optax.chain(optax.sgd(0.3), optax.masked(optax.scale(0.0), LABELS)),
    "of hparams": lambda lam: OPTIMIZERS["multi_transform"],
}
STEPS = 2
BATCHES = jax.tree.map(lambda a: jnp.broadcast_to(a, (STEPS, *a.shape)), (X, Y))


def alternate(tx, response=None, inner=SPLIT.loss):
    response = bilevel.Implicit(bilevel.CG()) if response is None else response
    return bilevel.alternate(valid, inner, response, tx, optax.sgd(1.0), STEPS)


def one_step(alg, state, key=None):
    return jax.jit(alg.step)(state, inner_batches=BATCHES, outer_batch=(XV, YV), key=key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_implicit_response_is_that_of_the_trained_leaves(name):
    alg = alternate(OPTIMIZERS[name])
    state = alg.init(solved(LAM, FROZEN), LAM)
    new, info = one_step(alg, state)
    # A system of two unknowns at its exact solution, float64: rounding.
    np.testing.assert_allclose(LAM - new.hparams, TRUTH(LAM), rtol=1e-8)
    assert int(info.result) == bilevel.Status.ok
    assert float(info.stats["stationarity"]) < 1e-10  # 1.6 where the frozen leaf counts too
    np.testing.assert_array_equal(new.params["frozen"], FROZEN)
    assert [jnp.shape(x) for x in jax.tree.leaves(new.response)] == [(2,)]


def test_the_frozen_values_are_those_of_the_state_and_not_of_an_earlier_trace():
    alg = alternate(OPTIMIZERS["multi_transform"])
    step = jax.jit(alg.step)
    for frozen in (FROZEN, jnp.array([0.2, 0.7])):
        state = alg.init(solved(LAM, frozen), LAM)
        new, _ = step(state, inner_batches=BATCHES, outer_batch=(XV, YV))
        truth = jax.grad(lambda lam, f=frozen: valid(solved(lam, f), lam, (XV, YV)))(LAM)
        np.testing.assert_allclose(LAM - new.hparams, truth, rtol=1e-8)
    assert step._cache_size() == 1


def test_operators_that_hold_the_model_and_unrolled_responses_agree():
    tx = OPTIMIZERS["multi_transform"]
    gauss_newton = alternate(tx, bilevel.Implicit(bilevel.CG(), SPLIT))
    new, _ = one_step(gauss_newton, gauss_newton.init(solved(LAM, FROZEN), LAM))
    np.testing.assert_allclose(LAM - new.hparams, TRUTH(LAM), rtol=1e-8)
    # 0.3 times the smallest curvature (0.9) contracts by 0.73 a step: 100 steps leave 1e-14.
    unrolled = bilevel.alternate(
        valid, SPLIT.loss, bilevel.Unroll(tx, 100), tx, optax.sgd(1.0), inner_steps=0
    )
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (100, *a.shape)), (X, Y))
    new, _ = jax.jit(unrolled.step)(
        unrolled.init(solved(LAM, FROZEN), LAM), inner_batches=many, outer_batch=(XV, YV)
    )
    np.testing.assert_allclose(LAM - new.hparams, TRUTH(LAM), rtol=1e-8)


def test_networks_of_best_responses_move_the_trained_leaves_only():
    tx = OPTIMIZERS["multi_transform"]
    response = bilevel.BestResponse(tx=optax.sgd(1.0), steps=2, linearize=SPLIT)
    alg = alternate(tx, response)
    new, info = one_step(alg, alg.init(solved(LAM, FROZEN), LAM), key=K[0])
    assert list(new.response.network_params.gains) == ["['head']"]
    assert int(info.result) == bilevel.Status.ok

    for network in (
        bilevel.StructuredResponse(),
        bilevel.StructuredResponse(centred=False, gain_scale=0.1),
        Hypernetwork((3,)),
    ):
        alg = bilevel.self_tuning(
            valid, SPLIT.loss, tx, optax.sgd(1.0), STEPS, groups=1, network=network,
            response_tx=optax.sgd(1.0), tune_scales=False,
            linearize=SPLIT if network.centred else None,
        )  # fmt: skip
        state = alg.init({"frozen": FROZEN, "head": jnp.zeros(2)}, LAM)
        new, info = one_step(alg, state, key=K[0])
        deployed = alg.deploy(new, state.hparams)
        np.testing.assert_array_equal(deployed["frozen"], FROZEN)
        np.testing.assert_allclose(valid(deployed, LAM, (XV, YV)), info.value, rtol=1e-12)
        assert bool(jnp.all(deployed["head"] != state.params["head"]))


def test_an_optimizer_that_tells_leaves_apart_needs_a_second_one_for_the_response():
    alg = bilevel.self_tuning(valid, SPLIT.loss, OPTIMIZERS["multi_transform"], optax.sgd(1.0))
    with pytest.raises(ValueError, match="`inner_tx` does not fit.*`response_tx`"):
        alg.init(solved(LAM, FROZEN), LAM)


def test_a_hyperparameter_of_frozen_leaves_only_is_refused():
    def inner(p, lam, batch):
        return valid(p, lam, batch) + sum(jnp.exp(lam[k]) * jnp.sum(p[k] ** 2) for k in p)

    alg = alternate(OPTIMIZERS["freeze"], inner=inner)
    state = alg.init(solved(LAM, FROZEN), {"frozen": LAM, "head": LAM})
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['frozen'\]"):
        jax.eval_shape(lambda s: alg.step(s, inner_batches=BATCHES, outer_batch=(XV, YV)), state)


def delayed():
    """Moves along the gradient of the step before."""
    return optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, p=None: (state, g)
    )


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adam(0.1), None),
        (optax.adamw(0.1), None),
        (optax.lbfgs(), None),
        (delayed(), None),
        (optax.chain(delayed(), OPTIMIZERS["masked"]), (False, True)),
        (optax.set_to_zero(), None),  # trains nothing: it is not the optimizer that trains
        (optax.masked(optax.adam(0.1), {"frozen": False, "head": True}), None),  # others: + g
        (optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS["masked"]), (False, True)),
        (optax.inject_hyperparams(optax.sgd)(0.1), None),
    ],
)
def test_which_leaves_an_optimizer_trains(tx, expected):
    assert trained_leaves(tx, {"frozen": FROZEN, "head": FROZEN}) == expected
