"""BO-REP: steps of one length, stability where a gradient step diverges, its phases, odd inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Status, bo_rep


def run(algorithm, params, hparams, steps, inner, outer, model_state=None):
    arguments = (params, hparams) if model_state is None else (params, hparams, model_state)
    state, step = algorithm.init(*arguments), jax.jit(algorithm.step)
    states, infos = [state], []
    for _ in range(steps):
        state, info = step(state, inner_batches=inner, outer_batch=outer)
        states.append(state)
        infos.append(info)
    return states, infos


def quartic(w, lam, batch):
    return lam**4 / 4


def idle(w, lam, batch):
    return 0.5 * (w - lam) ** 2


NOTHING = jnp.zeros((2, 1))


def test_on_a_quartic_it_walks_where_gradient_descent_diverges():
    """|x'| = ||x| - eta| exactly; a plain step diverges if eta x^2 > 2."""
    eta, x = 0.3, 5.0
    algorithm = bo_rep(quartic, idle, optax.sgd(0.5), eta, 1, momentum=0.0)
    states, _ = run(algorithm, jnp.array(0.0), jnp.array(x), 30, NOTHING, NOTHING[0])
    for state in states[1:]:
        x = abs(x - eta)
        np.testing.assert_allclose(abs(float(state.hparams)), x, atol=1e-12)
    assert x <= eta
    plain = jnp.array(5.0)
    for _ in range(5):
        plain = plain - eta * plain**3
    assert not abs(float(plain)) < 1e6


K = jax.random.split(jax.random.key(2), 4)
X, V = jax.random.normal(K[0], (50, 4)), jax.random.normal(K[1], (50, 4))
TRUTH = 3 * jax.random.normal(K[2], (4,))
Y, Z = X @ TRUTH, V @ TRUTH + jax.random.normal(K[3], (50,))
STACK = (jnp.broadcast_to(X, (3, 50, 4)), jnp.broadcast_to(Y, (3, 50)))


def ridge(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def growing(w, lam, batch):
    """Its curvature grows with its gradient, exponentially, but its slope is bounded nowhere."""
    x, y = batch
    return jnp.mean(jnp.exp(jnp.abs(x @ w - y)) + jnp.exp(y - x @ w))


MIX, GOAL = jax.random.normal(K[3], (10, 4)), jax.random.normal(K[2], (10,))


def follow(w, lam, batch):
    """Ridge regression on what the hyperparameters mix: w* = MIX lam / 1.01."""
    return 0.5 * jnp.sum((w - batch @ lam) ** 2) + 0.005 * jnp.sum(w**2)


def steep(w, lam, batch):
    """Of relaxed smoothness: its curvature grows with its gradient."""
    return jnp.sum(jnp.cosh(w - batch))


def hypergradient(lam):
    return jax.grad(lambda lam: steep(MIX @ lam / 1.01, lam, GOAL))(lam)


def soba(lam, steps, rho, eta, nu):
    """Single-loop SOBA by hand: all three variables move along their directions at once."""
    w, q = MIX @ lam / 1.01, jnp.zeros(10)
    for _ in range(steps):
        residual = 1.01 * q - jnp.sinh(w - GOAL)  # H q - g
        moved = w - rho * (1.01 * w - MIX @ lam), q - nu * residual, lam - eta * MIX.T @ q
        w, q, lam = moved
    return lam


def test_it_is_stable_at_a_rate_where_a_single_loop_diverges():
    start, rho, nu, eta = jnp.full(4, 3.0), 0.5, 0.5, 0.05
    assert not np.all(np.isfinite(soba(start, 60, rho, eta, nu)))
    rate = optax.exponential_decay(eta, 150, 0.5)
    algorithm = bo_rep(steep, follow, optax.sgd(rho), rate, 2, every=1, solve_rate=nu, warm_up=20)
    stack = jnp.broadcast_to(MIX, (3, *MIX.shape))
    states, infos = run(algorithm, jnp.zeros(10), start, 500, stack, GOAL)
    lengths = [float(jnp.linalg.norm(hypergradient(s.hparams))) for s in (states[0], states[-1])]
    assert lengths[1] <= 1e-2 * lengths[0]
    assert all(np.isfinite(float(info.value)) for info in infos)


def test_every_step_is_as_long_as_the_rate_and_the_warm_up_only_trains():
    tuned = {"a": jnp.array([1.0, 2.0, 0.0, -1.0]), "b": jnp.array(0.5)}

    def inner(w, lam, batch):
        return ridge(w, lam["b"], batch) + 0.5 * jnp.sum(jnp.exp(lam["a"]) * w**2)

    rate = optax.exponential_decay(0.3, 1, 0.9)
    algorithm = bo_rep(growing, inner, optax.sgd(0.05), rate, 2, every=3, warm_up=2)
    states, infos = run(algorithm, jnp.zeros(4), tuned, 9, STACK, (V, Z))
    moved = [
        float(optax.tree.norm(jax.tree.map(jnp.subtract, new.hparams, old.hparams)))
        for old, new in zip(states, states[1:], strict=False)
    ]
    # q is zero in the first step after the warm-up, and with it the hypergradient.
    np.testing.assert_allclose(moved[:3], 0, atol=0)
    np.testing.assert_allclose(moved[3:], 0.3 * 0.9 ** np.arange(1, 7), rtol=1e-6)
    trained = [float(info.cost.inner_gradients) for info in infos]
    assert trained == [2, 2, 2, 0, 0, 2, 0, 0, 2]
    assert [float(info.cost.products) for info in infos] == [0, 0] + 7 * [1]
    for k, (old, new) in enumerate(zip(states, states[1:], strict=False)):
        assert bool(jnp.any(old.params != new.params)) == (trained[k] > 0)


def test_the_momentum_is_the_mean_of_hypergradients_and_q_solves_its_system():
    """A tiny rate holds the hyperparameters, so that q and m have limits."""
    lam = jnp.array(0.0)
    algorithm = bo_rep(growing, ridge, optax.sgd(0.5), 1e-9, 2, every=1, solve_rate=0.5, warm_up=60)
    states, infos = run(algorithm, jnp.zeros(4), lam, 160, STACK, (V, Z))
    w = states[-1].params
    h = X.T @ X / 50 + jnp.eye(4)
    q = jnp.linalg.solve(h, jax.grad(growing)(w, lam, (V, Z)))
    np.testing.assert_allclose(states[-1].response, q, rtol=1e-6)
    np.testing.assert_allclose(infos[-1].hypergrad_norm, abs(w @ q), rtol=1e-6)
    np.testing.assert_allclose(states[-1].outer.opt_state[0].ema, -(w @ q), rtol=1e-3)
    assert int(infos[-1].result) == Status.ok


def test_a_solve_that_diverges_is_said():
    algorithm = bo_rep(growing, ridge, optax.sgd(0.1), 1e-6, 2, solve_rate=5.0)
    _, infos = run(algorithm, jnp.zeros(4), jnp.array(1.0), 10, STACK, (V, Z))
    assert int(infos[-1].result) == Status.worse_than_zero


def test_statistics_advance_in_training_steps_only():
    def inner(w, lam, batch, seen):
        return ridge(w, lam, batch), seen + 1

    def outer(w, lam, batch, seen):
        return growing(w, lam, batch), (seen, {"seen": seen})

    algorithm = bo_rep(outer, inner, optax.sgd(0.05), 0.1, 2, every=2, has_state=True, has_aux=True)
    states, infos = run(algorithm, jnp.zeros(4), jnp.array(0.0), 4, STACK, (V, Z), jnp.array(0.0))
    assert [float(s.model_state) for s in states] == [0, 2, 2, 4, 4]
    assert [float(info.aux["seen"]) for info in infos] == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(momentum=1.0), ValueError, "`momentum` must be less than 1"),
        (dict(momentum=-0.1), ValueError, "`momentum` must be at least 0"),
        (dict(rate=0.0), ValueError, "`rate` must be greater than 0"),
        (dict(solve_rate=-1), ValueError, "`solve_rate` must be greater than 0"),
        (dict(inner_steps=0), ValueError, "`inner_steps` must be at least 1"),
        (dict(every=0), ValueError, "`every` must be at least 1"),
        (dict(warm_up=-1), ValueError, "`warm_up` must be at least 0"),
        (dict(inner_tx=lambda lam: optax.sgd(lam)), TypeError, "`inner_tx` must be an optax"),
    ],
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        bo_rep(growing, ridge, **{"inner_tx": optax.sgd(0.1), "rate": 0.1, **settings})


def test_a_hyperparameter_that_nothing_reads_is_refused():
    algorithm = bo_rep(growing, lambda w, lam, batch: ridge(w, 0.0, batch), optax.sgd(0.1), 0.1, 2)
    state = algorithm.init(jnp.zeros(4), jnp.array(0.0))
    with pytest.raises(ValueError, match="hparams"):
        algorithm.step(state, inner_batches=STACK, outer_batch=(V, Z))
    with pytest.raises(TypeError, match="a BoRepState"):
        bilevel.bo_rep(growing, ridge, optax.sgd(0.1), 0.1, 2).step(
            None, inner_batches=STACK, outer_batch=(V, Z)
        )
