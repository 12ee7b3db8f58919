"""Hypergradient descent, FedHyper's schedulers and complex momentum as optax transformations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import (
    complex_momentum,
    fedhyper_client,
    fedhyper_global,
    fedhyper_server,
    hypergradient_descent,
)

CURVATURES = jnp.array([1.0, 3.0, 0.2])


def loss(w):
    return jnp.sum(CURVATURES * w**2) / 2 + jnp.sum(jnp.cos(w))


grad = jax.grad(loss)
W = jnp.array([1.0, -0.5, 2.0])


def steps(tx, count, w=W):
    """Parameters and states of a run."""
    state, run = tx.init(w), [(w, tx.init(w))]
    for _ in range(count):
        updates, state = tx.update(grad(w), state, w)
        w = optax.apply_updates(w, updates)
        run.append((w, state))
    return run


@pytest.mark.parametrize("form", ["sgd", "adam"])
def test_the_rate_follows_the_derivative_of_the_loss_one_step_ahead(form):
    beta, direction = 0.01, optax.scale_by_adam() if form == "adam" else None
    run = steps(hypergradient_descent(0.1, beta, direction, normalized=False), 5)
    base = optax.identity() if direction is None else direction
    inner = base.init(W)
    for (w, _), (_, state), (_, following) in zip(run, run[1:], run[2:], strict=False):
        d, inner = base.update(grad(w), inner, w)
        slope = jax.grad(lambda a, w=w, d=d: loss(w - a * d))(state.rate)
        np.testing.assert_allclose(following.rate, state.rate - beta * slope, rtol=1e-12)
        np.testing.assert_allclose(state.direction, d)
    w, state = run[1]
    d, _ = base.update(grad(w), base.update(grad(W), base.init(W))[1], w)
    np.testing.assert_allclose(run[2][0], w - run[2][1].rate * d, rtol=1e-12)
    np.testing.assert_allclose(run[1][0], W - 0.1 * run[1][1].direction)  # nothing known yet


@pytest.mark.parametrize("form", ["sgd", "adam"])
def test_the_normalized_rate_is_multiplied_by_a_cosine(form):
    direction = optax.scale_by_adam() if form == "adam" else None
    run = steps(hypergradient_descent(0.1, 0.05, direction), 5)
    for (w, state), (_, following) in zip(run[1:], run[2:], strict=False):
        g, d = np.asarray(grad(w)), np.asarray(state.direction)
        cosine = g @ d / np.linalg.norm(g) / np.linalg.norm(d)
        np.testing.assert_allclose(following.rate, state.rate * (1 + 0.05 * cosine), rtol=1e-12)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("rate, rises", [(0.4, True), (0.6, False)])
def test_the_rate_rises_below_the_inverse_curvature_and_falls_above(normalized, rate, rises):
    """In one dimension g_t g_(t-1) = L^2 x^2 (1 - a L), here with L = 2."""
    tx = hypergradient_descent(rate, 0.01, normalized=normalized)
    x, state = jnp.asarray(0.3), tx.init(jnp.asarray(0.3))
    for _ in range(2):
        updates, state = tx.update(2 * x, state)
        x = x + updates
    assert (float(state.rate) > rate) == rises
    if not normalized:
        expected = rate + 0.01 * 4 * 0.3**2 * (1 - 2 * rate)
        np.testing.assert_allclose(state.rate, expected, rtol=1e-12)


def test_a_poor_rate_is_mended_and_the_highest_stable_one_is_the_callers_to_say():
    """Where gradients fall along flat directions the rate climbs past what steep ones allow."""

    def losses(tx):
        def step(c, _):
            updates, state = tx.update(grad(c[0]), c[1], c[0])
            return (optax.apply_updates(c[0], updates), state), loss(c[0])

        return np.asarray(jax.lax.scan(step, (W, tx.init(W)), length=600)[1])

    best, plain = losses(optax.sgd(0.3))[-1], losses(optax.sgd(1e-5))[-1]
    for beta in (0.02, 0.05, 0.1):
        ours = losses(hypergradient_descent(1e-5, beta, max_rate=0.4))
        assert ours[-1] - best < 0.01 * (plain - best)
        assert ours.max() <= ours[0]
    assert losses(hypergradient_descent(1e-5, 0.05)).max() > 1e6  # as the docstring warns


def test_bounds_of_the_rate_hold():
    """The additive form would turn negative; at zero the weights stand, and the rate can grow."""
    tx = hypergradient_descent(0.5, 10.0, normalized=False, max_rate=0.7)
    state, rates = tx.init(jnp.asarray(1.0)), []
    for sign in (1.0, -1.0, -1.0, 1.0, 1.0, 1.0):
        updates, state = tx.update(jnp.asarray(sign), state)
        rates.append(float(state.rate))
        assert float(updates) == -rates[-1] * sign
    assert rates == [0.5, 0.0, 0.7, 0.0, 0.7, 0.7]


# --- FedHyper


def changes(count, scale, seed=0):
    return scale * np.random.default_rng(seed).standard_normal((count, 4))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_bounds_hold_in_every_round(normalized, scale):
    rounds = np.cumsum(changes(60, scale), axis=0)  # directions that agree, then turn
    rounds[30:] *= np.array([1, -1] * 15)[:, None]
    w = jnp.zeros(4)
    settings: dict[str, Any] = {"normalized": normalized}
    globally = fedhyper_global(**settings)
    momentum = fedhyper_global(momentum=0.9, min_rate=0.8, **settings)
    server, client = fedhyper_server(0.01, **settings), fedhyper_client(0.01, **settings)
    states = [tx.init(w) for tx in (globally, momentum, server, client)]
    seen: list[list[float]] = [[], [], [], []]
    for d in map(jnp.asarray, rounds):
        for i, tx in enumerate((globally, momentum, server, client)):
            _, states[i] = tx.update(-d, states[i], w)
            seen[i].append(float(getattr(states[i], "factor" if i == 3 else "rate")))
    slack = 1 + 1e-12
    for values, (low, high) in zip(seen, [(0.2, 5), (0.8, 5), (1e-3, 0.1), (0.1, 10)],
                                   strict=True):  # fmt: skip
        assert low / slack <= min(values) and max(values) <= high * slack
        assert max(values) > min(values)  # and the rule is at work
    assert max(seen[0]) == pytest.approx(5) if scale >= 1 else True


def test_the_global_scheduler_written_out():
    for momentum in (0.0, 0.9):
        tx = fedhyper_global(0.3, momentum=momentum, normalized=False)
        state, s, previous = tx.init(jnp.zeros(4)), 0.0, np.zeros(4)
        for d in changes(6, 0.7):
            updates, state = tx.update(jnp.asarray(-d), state)
            s = np.clip(s + 0.3 * d @ previous, -0.8, 4)
            np.testing.assert_allclose(updates, (1 + s) * d + momentum * s * previous, rtol=1e-12)
            previous = d + momentum * previous
            np.testing.assert_allclose([state.score, state.rate], [s, 1 + s])


def test_the_first_round_is_that_of_federated_averaging():
    d = jnp.asarray(changes(1, 1.0)[0])
    for tx in (fedhyper_global(), fedhyper_global(momentum=0.9), fedhyper_server(0.01)):
        np.testing.assert_allclose(tx.update(-d, tx.init(d))[0], d)


def test_the_server_sends_a_rate_that_follows_its_rounds():
    tx = fedhyper_server(0.01, 0.5, normalized=False)
    state, s, previous = tx.init(jnp.zeros(4)), 0.0, np.zeros(4)
    assert float(state.rate) == pytest.approx(0.01)
    for d in changes(8, 1.0):
        updates, state = tx.update(jnp.asarray(-d), state)
        np.testing.assert_allclose(updates, d)  # the clients' rate changes, not the server's
        s += 0.5 * d @ previous
        previous = d
        np.testing.assert_allclose(state.rate, np.clip(0.01 * (1 + s), 1e-3, 0.1))


@pytest.mark.parametrize("normalized", [True, False])
def test_a_client_written_out(normalized):
    def agree(a, b):
        if not normalized:
            return a @ b
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    tx = fedhyper_client(0.1, 0.5, clients=4, global_weight=0.2, normalized=normalized)
    moved = changes(1, 0.5, seed=9)[0]
    state, factor, previous = tx.init(jnp.zeros(4)), 1.0, None
    for g in changes(8, 2.0):
        updates, state = tx.update(jnp.asarray(g), state, global_update=jnp.asarray(moved))
        u = -0.1 * factor * g
        if previous is not None:
            seen = agree(u, previous) + 0.2 / 4 * agree(u, moved)
            factor = np.clip(factor * np.clip(1 + 0.5 * seen, 0, 1.1), 0.1, 10)
        np.testing.assert_allclose(state.factor, factor, rtol=1e-12)
        np.testing.assert_allclose(updates, -0.1 * factor * g, rtol=1e-12)
        previous = -0.1 * factor * g


def test_clients_are_mapped_each_with_a_factor_of_its_own():
    """Seven clients, of whom one turns back and forth: any count will do."""
    tx = fedhyper_client(0.1, clients=7)
    grads = jnp.ones((7, 3)).at[2].set(-1.0)
    state = jax.vmap(tx.init)(jnp.zeros((7, 3)))
    for k in range(4):
        turned = grads.at[4].multiply((-1.0) ** k)
        updates, state = jax.vmap(lambda g, s: tx.update(g, s, global_update=-jnp.ones(3)))(
            turned, state
        )
    straight = np.asarray(state.factor)
    assert straight[0] == pytest.approx(1.1**3)
    assert straight[4] == pytest.approx(0.1)
    assert updates.shape == (7, 3)


# --- complex momentum


def game(jacobian):
    """Two players' gradients in a linear game."""
    return lambda point: jnp.asarray(jacobian) @ point


def radius(beta, angle, alpha, eigenvalue):
    b = beta * np.exp(1j * np.pi * angle)
    matrix = np.array(
        [[b.real, -b.imag, -eigenvalue], [b.imag, b.real, 0],
         [alpha * b.real, -alpha * b.imag, 1 - alpha * eigenvalue]], complex,
    )  # fmt: skip
    return np.max(np.abs(np.linalg.eigvals(matrix)))


def one_update(tx, jacobian, size):
    """The linear map of one update in (parameters, two buffers), as a matrix."""
    play = game(jacobian)

    def update(flat):
        w, p, q = jnp.split(flat, 3)
        state = tx.init(w)._replace(real=p, imag=q)
        updates, state = tx.update(play(w), state, w)
        return jnp.concatenate([w + updates, state.real, state.imag])

    return np.asarray(jax.jacobian(update)(jnp.zeros(3 * size)))


ROTATION, COOPERATION = np.array([[0.0, 1.0], [-1.0, 0.0]]), np.eye(2)
POLAR = (abs(0.8 + 0.3j), np.angle(0.8 + 0.3j) / np.pi)
TABLE = [  # beta, angle, radius for +-i, for 1, for 0.1, distance after 500 steps over the first
    (0.0, 0.0, 1.0018, 0.9400, 0.9940, 2.46),
    (0.9, 0.0, 1.1383, 0.9487, 0.9487, 8e27),
    (0.9, 1.0, 1.00003, 0.9689, 0.9968, 1.014),
    (0.9, 1 / 8, 0.9791, 0.9493, 0.9933, 3.2e-5),
    (0.9, 1 / 4, 0.9969, 0.9631, 0.9960, 0.208),
    (0.9, 1 / 2, 0.9996, 0.9678, 0.9967, 0.805),
    (*POLAR, 0.9732, 0.9315, 0.9910, 1.6e-6),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]:.2f}@{row[1]:.3f}")
def test_spectral_radii_and_distances(row):
    beta, angle, rotating, cooperating, slow, ratio = row
    tx = complex_momentum(0.06, beta, angle)
    for jacobian, expected, eigenvalue in (
        (ROTATION, rotating, 1j), (COOPERATION, cooperating, 1.0), (0.1 * COOPERATION, slow, 0.1),
    ):  # fmt: skip
        got = np.max(np.abs(np.linalg.eigvals(one_update(tx, jacobian, 2))))
        assert got == pytest.approx(expected, abs=6e-5)
        assert got == pytest.approx(radius(beta, angle, 0.06, eigenvalue), rel=1e-9)
    play = game(ROTATION)

    def step(carry, _):
        updates, state = tx.update(play(carry[0]), carry[1])
        return (carry[0] + updates, state), None

    end = jax.lax.scan(step, (jnp.ones(2), tx.init(jnp.ones(2))), length=500)[0][0]
    assert np.linalg.norm(end) / np.sqrt(2) == pytest.approx(ratio, rel=0.06)


@pytest.mark.parametrize(
    "beta, angle, alpha, expected", [(0.5, 1.0, 0.865, 0.886), (0.9, 0.0, 0.06, None)]
)
def test_players_that_move_in_turn(beta, angle, alpha, expected):
    """Negative momentum converges on a rotation when w and the hyperparameters alternate."""
    tx = complex_momentum(alpha, beta, angle)

    def update(flat):
        w, lam, *buffers = flat
        states = [tx.init(w)._replace(real=buffers[2 * i], imag=buffers[2 * i + 1])
                  for i in range(2)]  # fmt: skip
        moved, states[0] = tx.update(lam, states[0])
        w = w + moved
        moved, states[1] = tx.update(-w, states[1])  # at the new w
        parts = [x for s in states for x in (s.real, s.imag)]
        return jnp.stack([w, lam + moved, *parts])

    got = np.max(np.abs(np.linalg.eigvals(np.asarray(jax.jacobian(update)(jnp.zeros(6))))))
    if expected is None:
        assert got >= 1
    else:
        assert got == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow  # the same recursion is held in closed form by default tests
def test_an_adversarial_outer_problem_in_a_loop():
    """w lowers w lam, lam raises it: `alternate` moves them in turn, by two such optimizers."""

    def train(w, lam, batch):
        return jnp.sum(w * lam)

    def valid(w, lam, batch):
        return -jnp.sum(w * lam)

    def end(tx):
        w, lam = jnp.ones(1), jnp.ones(1)
        inner, outer = tx.init(w), tx.init(lam)
        for _ in range(300):
            moved, inner = tx.update(jax.grad(train)(w, lam, ()), inner)
            w = w + moved
            moved, outer = tx.update(jax.grad(valid, 1)(w, lam, ()), outer)
            lam = lam + moved
        return float(jnp.hypot(w, lam)[0])

    assert end(complex_momentum(0.3, 0.5, 1.0)) < 0.05
    assert end(complex_momentum(0.06, 0.9, 0.0)) > 2


# --- conventions of optax

ALL: dict[str, Any] = {
    "descent": lambda: hypergradient_descent(0.1),
    "descent_adam": lambda: hypergradient_descent(0.1, direction=optax.scale_by_adam()),
    "global": lambda: fedhyper_global(momentum=0.9),
    "server": lambda: fedhyper_server(0.01),
    "client": lambda: fedhyper_client(0.01, clients=3),
    "complex": lambda: complex_momentum(0.1),
    "complex_schedule": lambda: complex_momentum(optax.linear_schedule(0.1, 0.0, 10)),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ALL)
def test_trees_dtypes_jit_scan_and_vmap(name, dtype):
    tx = ALL[name]()
    params = {"a": jnp.ones((2, 3), dtype), "b": (jnp.asarray(0.5, dtype),)}
    state = tx.init(params)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(w, state, w)
        return (optax.apply_updates(w, updates), state), jax.tree.map(lambda x: x.dtype, updates)

    (_, first), dtypes = step((params, state), None)
    assert set(jax.tree.leaves(dtypes)) == {jnp.dtype(dtype)}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )

    def scanned(w):
        return jax.lax.scan(lambda c, x: (step(c, x)[0], None), (w, tx.init(w)), length=4)[0]

    end, last = jax.jit(scanned)(params)
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(last))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    both, _ = jax.jit(jax.vmap(scanned))(stacked)
    tolerance = 0.02 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        np.asarray(both["a"][0], np.float64), np.asarray(end["a"], np.float64), rtol=tolerance
    )


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_of_zero_moves_nothing_and_a_nan_is_passed_on(name):
    tx = ALL[name]()
    w = jnp.ones(3)
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(jnp.zeros(3), state, w)
        assert not np.any(updates)
    updates, state = tx.update(jnp.full(3, jnp.nan), state, w)
    assert np.isnan(updates).all()
    assert np.isnan(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])).any()


def test_a_loop_takes_them():
    def train(w, lam, batch):
        return jnp.sum((w - lam) ** 2)

    def valid(w, lam, batch):
        return jnp.sum((w - 1) ** 2)

    for inner_tx, outer_tx in (
        (hypergradient_descent(0.01), optax.sgd(0.1)),
        (optax.sgd(0.3), hypergradient_descent(0.01, 0.1)),
        (complex_momentum(0.3), complex_momentum(0.3)),
    ):
        loop = bilevel.alternate(
            valid, train, bilevel.Implicit(bilevel.CG()), inner_tx, outer_tx, 10
        )
        state = loop.init(jnp.zeros(2), jnp.full(2, 3.0))

        def step(s, _, loop=loop):
            return loop.step(s, inner_batches=jnp.zeros((10, 1)), outer_batch=())

        _, infos = jax.jit(functools.partial(jax.lax.scan, step, length=100))(state)
        assert float(infos.value[-1]) < 1e-3 * float(infos.value[0])


WRONG: list[tuple[Any, str]] = [
    (lambda: hypergradient_descent(0.0), "`learning_rate` must be greater than 0"),
    (lambda: hypergradient_descent(-0.1), "`learning_rate` must be greater than 0"),
    (lambda: hypergradient_descent(jnp.nan), "`learning_rate` must be"),
    (lambda: hypergradient_descent(0.1, -1.0), "`hyper_rate` must be at least 0"),
    (lambda: hypergradient_descent(0.1, 1.0), "`hyper_rate` must be below 1 in the normalized"),
    (lambda: hypergradient_descent(0.1, direction=0.9), "`direction` must be an optax"),
    (lambda: hypergradient_descent(0.1, normalized=1), "`normalized` must be True or False"),
    (lambda: hypergradient_descent(0.1, min_rate=1.0, max_rate=0.5), "`min_rate` must be below"),
    (lambda: fedhyper_global(min_rate=-1.0), "`min_rate` must be at least 0"),
    (lambda: fedhyper_global(momentum=1.0), "`momentum` must be below 1"),
    (lambda: fedhyper_server(0.0), "`learning_rate` must be greater than 0"),
    (lambda: fedhyper_client(0.01, clients=0), "`clients` must be at least 1"),
    (lambda: fedhyper_client(0.01, clients=2.5), "`clients` must be a Python int"),
    (lambda: fedhyper_client(0.01, max_growth=1.0), "`max_growth` must be greater than 1"),
    (lambda: fedhyper_client(0.01, min_factor=2.0, max_factor=1.0), "`min_factor` must be below"),
    (lambda: complex_momentum(0.0), "`learning_rate` must be greater than 0"),
    (lambda: complex_momentum(0.1, 1.0), "`beta` must be below 1"),
    (lambda: complex_momentum(0.1, 0.8 + 0.3j), "`beta` must be a real number"),
    (lambda: complex_momentum(0.1, -0.9), "`beta` must be at least 0"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_settings_out_of_range_are_refused(case):
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
