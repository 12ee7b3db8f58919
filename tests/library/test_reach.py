"""Dependence in traced programs, and the hyperparameters that a response cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Evolution, FiniteDifference, Implicit, Unroll
from bilevel.ground.traced import depends, is_costly, reaches, reaching
from bilevel.regularizers import dropout

ONE = jnp.ones(())


def masks(function, *args, **kwargs):
    return tuple(jax.tree.leaves(depends(function, *args, **kwargs)))


def scanned(x, y, z):
    """Carries: the first never sees x, the second does from the second step on."""

    def body(carry, z):
        a, b, c = carry
        return (a + z, b + c, x * y), (a, b)

    return jax.lax.scan(body, (y, y, y), jnp.stack([z, z]))


def test_scans_until_their_carries_are_stable():
    assert masks(scanned, ONE, ONE, ONE) == (False, True, True, False, True)
    assert masks(lambda z, x, y: scanned(x, y, z), ONE, ONE, ONE) == (
        True, False, False, True, False,
    )  # fmt: skip
    assert masks(lambda y, x, z: scanned(x, y, z), ONE, ONE, ONE) == (True,) * 5
    nested = lambda x, y: jax.lax.scan(lambda c, _: scanned(x, c, y)[0][:2], y, None, 3)[0]  # noqa: E731
    assert masks(lambda x, y: nested(x, y), ONE, ONE) == (False,)


def test_while_loops_branches_and_calls():
    def loop(x, y, n):
        return jax.lax.while_loop(
            lambda c: c[1] < n, lambda c: (c[0] + x, c[1] + 1, -c[2]), (y, 0, y)
        )

    assert masks(loop, ONE, ONE, 3) == (True, False, False)
    # how often it runs reaches everything that it carries
    assert masks(lambda n, x: loop(x, x, n), 3, ONE) == (True,) * 3

    def branch(x, y, index):
        return jax.lax.cond(index > 0, lambda: (x, y, y), lambda: (-y, -y, 2 * y))

    assert masks(branch, ONE, ONE, 1) == (True, False, False)
    assert masks(lambda index, x: branch(x, x, index), 1, ONE) == (True,) * 3

    @jax.custom_vjp
    def own(x, y):
        return x * 2, y

    own.defvjp(lambda x, y: (own(x, y), None), lambda _, c: c)
    pair = lambda x, y: (x + 1, y)  # noqa: E731
    for call in (jax.jit(pair), jax.checkpoint(pair), own):
        assert masks(call, ONE, ONE) == (True, False)
        assert masks(jax.vmap(call), jnp.ones(2), jnp.ones(2)) == (True, False)
    assert masks(lambda x: jnp.linalg.solve(jnp.eye(2) * x, jnp.ones(2)), ONE) == (True,)


def test_blocked_operations_pass_nothing_on_wherever_they_stand():
    cut = lambda eqn: eqn.primitive.name == "stop_gradient"  # noqa: E731

    def body(x, y):
        return y + jax.lax.stop_gradient(x)

    programs = [
        lambda x, y: jax.lax.scan(lambda c, _: (body(x, c), None), y, None, 2)[0],
        lambda x, y: jax.lax.while_loop(lambda c: c < 3, lambda c: body(x, c), y),
        lambda x, y: jax.lax.cond(y > 0, lambda: body(x, y), lambda: y),
        lambda x, y: jax.jit(body)(x, y),
        lambda x, y: jax.checkpoint(body)(x, y),
    ]
    for program in programs:
        assert masks(program, ONE, ONE) == (True,)
        assert masks(program, ONE, ONE, blocked=cut) == (False,)


def test_reaching_asks_for_each_leaf():
    found = reaching(lambda t, y: scanned(t["x"], y, t["z"])[0][1], {"x": ONE, "z": ONE}, ONE)
    assert found == {"x": True, "z": False}


def test_reaches_finds_matrix_products_and_loops_on_the_way():
    x, w = jnp.ones((3, 2)), jnp.ones(2)
    scan = lambda lam: jax.lax.scan(lambda c, _: (c + lam, None), lam, None, 2)[0]  # noqa: E731
    programs = {
        lambda lam: jnp.sum(x @ w) + jnp.exp(lam) * jnp.sum(w**2): False,
        lambda lam: jnp.sum(lam * (x @ w)): False,  # a weight of the examples
        lambda lam: jnp.sum(jax.nn.softplus(lam) * w) + 0 * scan(1.0): False,
        lambda lam: jnp.sum(x @ (lam * w)): True,
        lambda lam: jnp.sum(jax.jit(jnp.matmul)(x * lam, w)): True,
        lambda lam: scan(lam): True,
        lambda lam: jax.lax.cond(lam > 0, lambda: lam, lambda: 2 * lam): True,
    }
    for program, found in programs.items():
        assert reaches(program, ONE, where=is_costly) == found
    assert not reaches(lambda w, lam: jnp.exp(lam) * jnp.sum(w), ONE, x, where=is_costly)


KEYS = jax.random.split(jax.random.key(0), 4)
X, Y = jax.random.normal(KEYS[0], (3, 6, 4)), jax.random.normal(KEYS[1], (3, 6))
BATCH = (X, Y, jax.random.split(KEYS[2], 3))
ONE_BATCH = jax.tree.map(lambda x: x[0], BATCH)
LAM = {"decay": jnp.asarray(-2.0), "dead": jnp.asarray(0.4)}


def data(w, lam, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(lam["decay"]) * jnp.sum(w**2)


def dropped(w, lam, batch):
    x = dropout(batch[2], batch[0], lam["dead"])
    return data(w, lam, (x, batch[1]))


DEAD = {  # what the inner loss makes of `dead`: no derivative comes through
    "stop_gradient": lambda w, lam, b: data(w, lam, b)
    + jax.lax.stop_gradient(lam["dead"]) * jnp.sum(w**2),
    "round": lambda w, lam, b: data(w, lam, b) + jnp.round(lam["dead"]) * jnp.sum(w**2),
    "comparison": lambda w, lam, b: data(w, lam, b)
    + jnp.sum(jnp.where(lam["dead"] > 0.5, w, 2 * w)),
    "sign": lambda w, lam, b: data(w, lam, b) + jnp.sign(lam["dead"]) * jnp.sum(w**2),
    "index": lambda w, lam, b: data(w, lam, b)
    + w[jnp.clip(lam["dead"] * 4, 0, 3).astype(jnp.int32)],
    "dropout": dropped,
    "additive": lambda w, lam, b: data(w, lam, b) + jnp.exp(lam["dead"]),
    "recurrent": lambda w, lam, b: data(w, lam, b)
    + jax.lax.scan(
        lambda c, x: (c + jnp.round(lam["dead"]) * x @ w, None), jnp.zeros(()), b[0]
    )[0],
}  # fmt: skip
SGD = optax.sgd(0.1)
RESPONSES = {
    "mixed": (Unroll(SGD, 3), BATCH),
    "reverse": (Unroll(SGD, 3, mode="reverse", truncate=2), BATCH),
    "forward": (Unroll(SGD, 3, mode="forward"), BATCH),
    "lion": (Unroll(optax.lion(0.1), 3), BATCH),
    "one step": (FiniteDifference(SGD), ONE_BATCH),
    "implicit": (Implicit(), ONE_BATCH),
}


def ask(response, inner, batch, lam=LAM, **kwargs):
    """Traced only: nothing is computed."""
    return jax.eval_shape(
        lambda lam: bilevel.hypergrad_solve(
            lambda w, lam, b: jnp.mean((b[0] @ w - b[1]) ** 2), inner, response, jnp.ones(4), lam,
            inner_batch=batch, outer_batch=ONE_BATCH, **kwargs,
        ),
        lam,
    )  # fmt: skip


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("how", DEAD)
def test_a_silent_zero_is_an_error_that_names_the_leaf_and_the_response(how, response):
    given, batch = RESPONSES[response]
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['dead'\]:.*BestResponse"):
        ask(given, DEAD[how], batch)


@pytest.mark.parametrize("how", DEAD)
def test_evolution_sees_every_dependence_in_value(how):
    response = Evolution(SGD, 3, 2, 0.1)
    key = jax.random.key(0)
    if how != "additive":
        ask(response, DEAD[how], BATCH, key=key)
        return
    with pytest.raises(ValueError, match=r"reaches hparams\['dead'\]: neither.*moves nothing"):
        ask(response, DEAD[how], BATCH, key=key)


def test_model_state_that_is_not_differentiated_does_not_count():
    """`FiniteDifference` advances the statistics and does not differentiate them; `Unroll` does."""

    def loss(w, lam, batch, seen):
        return data(w, lam, batch), seen + lam["dead"]

    def solve(response, batch):
        return jax.eval_shape(
            lambda lam: bilevel.hypergrad_solve(
                loss, loss, response, jnp.ones(4), lam, inner_batch=batch, outer_batch=ONE_BATCH,
                has_state=True, model_state=ONE,
            ), LAM,
        )  # fmt: skip

    solve(Unroll(SGD, 3), BATCH)
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['dead'\]"):
        solve(FiniteDifference(SGD), ONE_BATCH)


PASSES = {
    "lion's b1": (lambda lam: optax.lion(0.1, b1=lam["dead"]), data, {}),
    "lion behind a decay in the loss": (
        lambda lam: optax.lion(0.1),
        lambda w, lam, b: data(w, lam, b) + lam["dead"] * jnp.sum(w**2),
        {},
    ),
    "injected": (lambda lam: optax.inject_hyperparams(optax.sgd)(lam["dead"]), data, {}),
    "schedule": (lambda lam: optax.sgd(lambda count: lam["dead"] / (1 + count)), data, {}),
    "accumulated": (lambda lam: optax.MultiSteps(optax.sgd(lam["dead"]), 2), data, {}),
    "initial": (SGD, data, {"initial": lambda w, lam: w * lam["dead"]}),
    "clipped": (
        lambda lam: optax.chain(optax.clip(lam["dead"]), SGD),
        data,
        {"mode": "forward", "real_time": True},
    ),
    "truncated": (lambda lam: optax.sgd(lam["dead"], momentum=0.9), data, {"truncate": 1}),
    "a recurrent loss": (
        SGD,
        lambda w, lam, b: jax.lax.scan(
            lambda c, x: (jnp.tanh(c * lam["dead"] + x @ w), None), jnp.zeros(()), b[0]
        )[0]
        + data(w, lam, b),
        {},
    ),
    "straight through": (
        SGD,
        lambda w, lam, b: data(w, lam, b)
        + (lam["dead"] + jax.lax.stop_gradient(jnp.round(lam["dead"]) - lam["dead"])) * jnp.sum(w),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_what_has_a_derivative_passes(name):
    inner_tx, inner, settings = PASSES[name]
    ask(Unroll(inner_tx, 3, **settings), inner, BATCH)


def test_a_frozen_optimizer_reaches_nothing():
    with pytest.raises(ValueError, match=r"reaches hparams\['dead'\], hparams\['decay'\]"):
        ask(Unroll(optax.set_to_zero(), 3), data, BATCH)
    frozen_start = lambda w, lam: w * lam["dead"]  # noqa: E731
    with pytest.raises(ValueError, match=r"reaches hparams\['dead'\]"):  # cut by the truncation
        ask(Unroll(SGD, 3, truncate=2, initial=frozen_start), data, BATCH)


def test_what_only_the_outer_loss_reads_passes():
    def outer(w, lam, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2) * lam["dead"]

    for response, batch in RESPONSES.values():
        if response is RESPONSES["lion"][0]:
            continue
        sol = jax.jit(
            lambda w, lam, response=response, batch=batch: bilevel.hypergrad_solve(
                outer, data, response, w, lam, inner_batch=batch, outer_batch=ONE_BATCH
            )
        )(jnp.ones(4), LAM)
        np.testing.assert_allclose(sol.grads["dead"], sol.value / LAM["dead"], rtol=1e-12)
