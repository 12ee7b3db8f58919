"""Unrolled responses against closed forms, central differences and each other (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Implicit, Neumann, Unroll

MODES = ("mixed", "reverse", "forward")


def spd(key, n, low=0.2, high=1.0):
    q, _ = np.linalg.qr(np.asarray(jax.random.normal(key, (n, n))))
    return jnp.asarray(q @ np.diag(np.linspace(low, high, n)) @ q.T)


class Quadratic:
    """h = w'Aw/2 - lam'C'w, f = |w - t|^2/2 + d'lam: O12's setting, B = -C constant."""

    n, p, steps, rate = 6, 3, 7, 0.6

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 6)
        self.a = spd(keys[0], self.n)
        self.c = jax.random.normal(keys[1], (self.n, self.p))
        self.lam = jax.random.normal(keys[2], (self.p,))
        self.w0 = jax.random.normal(keys[3], (self.n,))
        self.target = jax.random.normal(keys[4], (self.n,))
        self.d = jax.random.normal(keys[5], (self.p,))
        self.batches = jnp.broadcast_to(self.a, (self.steps, self.n, self.n))

    def inner(self, w, lam, a):
        return 0.5 * w @ a @ w - lam @ (self.c.T @ w)

    def outer(self, w, lam, batch):
        return 0.5 * jnp.sum((w - self.target) ** 2) + self.d @ lam

    def solve(self, response, w0=None, **kwargs):
        w0 = self.w0 if w0 is None else w0
        return bilevel.hypergrad_solve(
            self.outer, self.inner, response, w0, self.lam,
            inner_batch=self.batches, outer_batch=None, **kwargs,
        )  # fmt: skip

    def closed(self, terms):
        """d - B' a sum_{j<terms} (I - aA)^j g(w_T), and w_T."""
        w = self.w0
        for _ in range(self.steps):
            w = w - self.rate * (self.a @ w - self.c @ self.lam)
        shrink = jnp.eye(self.n) - self.rate * self.a
        series = sum(jnp.linalg.matrix_power(shrink, j) for j in range(terms))
        return self.d + self.c.T @ (self.rate * series @ (w - self.target)), w


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("truncate", [None, 7, 3])
def test_quadratic_equals_its_closed_form(mode, truncate):
    case = Quadratic()
    sol = case.solve(Unroll(optax.sgd(case.rate), case.steps, truncate=truncate, mode=mode))
    expected, w = case.closed(truncate or case.steps)
    np.testing.assert_allclose(sol.grads, expected, rtol=1e-10)
    np.testing.assert_allclose(sol.params, w, rtol=1e-12)
    np.testing.assert_allclose(sol.grads, sol.direct + sol.indirect, rtol=1e-14)
    assert sol.result == bilevel.Status.ok
    before = w - 0  # the last gradient was taken one step earlier
    before = jnp.linalg.solve(
        jnp.eye(case.n) - case.rate * case.a, before - case.rate * case.c @ case.lam
    )
    stationarity = jnp.linalg.norm(case.a @ before - case.c @ case.lam)
    np.testing.assert_allclose(sol.stats["stationarity"], stationarity, rtol=1e-9)
    np.testing.assert_allclose(sol.stats["direct_norm"], jnp.linalg.norm(case.d), rtol=1e-12)


@pytest.mark.parametrize("terms", [1, 4])
def test_truncation_at_a_stationary_point_is_neumann(terms):
    """K differentiated steps make K terms of the series: K - 1 products."""
    case = Quadratic()
    w_star = jnp.linalg.solve(case.a, case.c @ case.lam)
    unrolled = case.solve(Unroll(optax.sgd(case.rate), case.steps, truncate=terms), w_star)
    implicit = bilevel.hypergrad_solve(
        case.outer, case.inner, Implicit(Neumann(terms - 1, case.rate)), w_star, case.lam,
        inner_batch=case.a, outer_batch=None,
    )  # fmt: skip
    np.testing.assert_allclose(unrolled.grads, implicit.grads, rtol=1e-10)
    other = case.solve(Unroll(optax.sgd(case.rate), case.steps, truncate=terms + 1), w_star)
    assert not np.allclose(other.grads, implicit.grads, rtol=1e-3)  # off by one is seen


def test_learning_rates_equal_their_closed_form():
    """O13, with one shared rate and with one a step, which sum to it."""
    case, rate = Quadratic(), 0.6
    error = case.w0 - case.target

    def inner(w, lam, a):
        return 0.5 * (w - case.target) @ a @ (w - case.target)

    def outer(w, lam, batch):
        return jnp.sum(jnp.cos(w))

    def grads(inner_tx, lam, mode):
        return bilevel.hypergrad_solve(
            outer, inner, Unroll(inner_tx, case.steps, mode=mode), case.w0, lam,
            inner_batch=case.batches, outer_batch=None,
        )  # fmt: skip

    shrink = jnp.eye(case.n) - rate * case.a
    before = jnp.linalg.matrix_power(shrink, case.steps - 1) @ error
    g = -jnp.sin(shrink @ before + case.target)
    per_step = -g @ case.a @ before
    for mode in MODES:
        shared = grads(lambda lam: optax.sgd(lam), jnp.asarray(rate), mode)
        np.testing.assert_allclose(shared.grads, case.steps * per_step, rtol=1e-10)
        schedule = grads(
            lambda lam: optax.sgd(lambda count: lam[count]), jnp.full(case.steps, rate), mode
        )
        np.testing.assert_allclose(schedule.grads, jnp.full(case.steps, per_step), rtol=1e-10)
        np.testing.assert_allclose(schedule.grads.sum(), shared.grads, rtol=1e-10)


class Network:
    """A small tanh network: one decay a weight, label noise and dropout keyed by the batch."""

    steps = 6

    def __init__(self, noise=False):
        # The default generator takes the CPU compiler seconds a program; this one does not.
        keys = jax.random.split(jax.random.key(1, impl="unsafe_rbg"), 8)
        self.params = {
            "a": 0.5 * jax.random.normal(keys[0], (4, 5)),
            "b": 0.5 * jax.random.normal(keys[1], (5, 2)),
        }
        self.hparams = {
            "decay": jax.tree.map(lambda x: jnp.full(x.shape, -3.0), self.params),
            "rate": jnp.asarray(-1.5),
        }
        x = jax.random.normal(keys[2], (self.steps, 8, 4))
        y = jax.random.normal(keys[3], (self.steps, 8, 2))
        self.inner_batch = (x, y, keys[4])  # one key, split by step
        self.outer_batch = (
            jax.random.normal(keys[5], (9, 4)), jax.random.normal(keys[6], (9, 2)), keys[7]
        )  # fmt: skip
        self.noise = noise

    def forward(self, params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def inner(self, params, hparams, batch):
        x, y, key = batch
        if self.noise:  # a differentiable dropout rate, and noise on the labels
            k1, k2 = jax.random.split(key)
            rate = jax.nn.sigmoid(hparams["rate"])
            x = x * (1 + jnp.sqrt(rate) * jax.random.normal(k1, x.shape))
            y = y + rate * jax.random.normal(k2, y.shape)
        penalty = sum(
            jnp.sum(jnp.exp(d) * w**2)
            for d, w in zip(jax.tree.leaves(hparams["decay"]), jax.tree.leaves(params), strict=True)
        )
        return jnp.mean((self.forward(params, x) - y) ** 2) + 0.5 * penalty

    def outer(self, params, hparams, batch):
        x, y, _ = batch
        return jnp.mean((self.forward(params, x) - y) ** 2)

    def inner_tx(self, hparams):
        return optax.sgd(jnp.exp(hparams["rate"]), momentum=0.8)

    def solve(self, response, hparams=None, **kwargs):
        return bilevel.hypergrad_solve(
            self.outer, self.inner, response, self.params,
            self.hparams if hparams is None else hparams,
            inner_batch=self.inner_batch, outer_batch=self.outer_batch, **kwargs,
        )  # fmt: skip


def assert_trees_close(a, b, rtol, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def central_difference(value, hparams, direction, step=1e-5):
    """Along one direction, by a whole run either side."""

    def at(s):
        return value(jax.tree.map(lambda x, d: x + s * d, hparams, direction))

    high, low = at(step), at(-step)
    return (high - low) / (2 * step)


def test_all_modes_agree_on_a_network_with_keyed_noise():
    """Dropout and label noise have the keys of their batch, so differences see the same ones."""
    case = Network(noise=True)
    runs = [
        Unroll(case.inner_tx, case.steps, mode=mode, remat=remat, truncate=truncate)
        for mode, remat, truncate in [
            ("reverse", "none", None),
            ("mixed", "none", None),
            ("mixed", "step", 5),
            ("mixed", "sqrt", 5),
            ("reverse", "log", 5),
            ("forward", "none", None),
            ("forward", "none", 5),
        ]
    ]
    sols = [jax.jit(lambda lam, r=r: case.solve(r, lam))(case.hparams) for r in runs]
    full, short = sols[0].grads, sols[-1].grads
    for run, sol in zip(runs, sols, strict=True):
        expected = short if run.truncate == 5 else full
        assert_trees_close(sol.grads, expected, rtol=1e-10, atol=1e-14)
        assert_trees_close(sol.params, sols[0].params, rtol=1e-12)
    assert not np.allclose(short["rate"], full["rate"], rtol=1e-3)
    value = jax.jit(lambda lam: case.solve(runs[0], lam).value)
    flat, unflatten = jax.flatten_util.ravel_pytree(full)
    for key in jax.random.split(jax.random.key(2), 3):
        direction = jax.random.normal(key, flat.shape)
        slope = central_difference(value, case.hparams, unflatten(direction))
        # h^2 and rounding / h are both about 1e-10 at h = 1e-5
        np.testing.assert_allclose(flat @ direction, slope, rtol=1e-7, atol=1e-9)


def run_value(case, factory, lam, steps):
    """The whole run by hand: optax in a Python loop, no part of the library."""
    tx = factory(lam)
    w, state = case.params, None
    state = tx.init(w)
    x, y, key = case.inner_batch
    for t in range(steps):
        batch = (x[t], y[t], jax.random.fold_in(key, t))
        updates, state = tx.update(jax.grad(case.inner)(w, case.hparams, batch), state, w)
        w = optax.apply_updates(w, updates)
    return case.outer(w, case.hparams, case.outer_batch)


OPTIMIZERS = {
    "sgd": (
        lambda h: optax.sgd(h["lr"], momentum=h["momentum"], nesterov=True),
        {"lr": 0.1, "momentum": 0.7},
    ),
    "adam": (
        lambda h: optax.adam(h["lr"], b1=h["b1"], b2=h["b2"], eps=h["eps"]),
        {"lr": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2},
    ),
    "adamw": (
        lambda h: optax.adamw(h["lr"], b1=h["b1"], weight_decay=h["wd"]),
        {"lr": 0.05, "b1": 0.8, "wd": 0.1},
    ),
    "rmsprop": (
        lambda h: optax.rmsprop(h["lr"], decay=h["decay"], eps=h["eps"], momentum=h["momentum"]),
        {"lr": 0.02, "decay": 0.8, "eps": 1e-2, "momentum": 0.5},
    ),
    "lamb": (
        lambda h: optax.lamb(h["lr"], b1=h["b1"], b2=h["b2"], weight_decay=h["wd"]),
        {"lr": 0.05, "b1": 0.8, "b2": 0.9, "wd": 0.1},
    ),
    "lion": (
        lambda h: optax.lion(h["lr"], b1=h["b1"], b2=h["b2"], weight_decay=h["wd"]),
        {"lr": 0.02, "b1": 0.8, "b2": 0.9, "wd": 0.1},
    ),
    "adafactor": (
        lambda h: optax.adafactor(
            h["lr"], decay_rate=h["decay"], weight_decay_rate=h["wd"], min_dim_size_to_factor=2
        ),
        {"lr": 0.05, "decay": 0.8, "wd": 0.01},
    ),
    "clipped cosine": (
        lambda h: optax.chain(
            optax.clip_by_global_norm(h["clip"]),
            optax.sgd(optax.cosine_decay_schedule(h["peak"], 9, alpha=h["floor"])),
        ),
        {"clip": 0.3, "peak": 0.3, "floor": 0.1},
    ),
    "injected": (
        lambda h: optax.inject_hyperparams(optax.adamw)(h["lr"], b2=h["b2"], weight_decay=h["wd"]),
        {"lr": 0.05, "b2": 0.9, "wd": 0.1},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_settings_equal_central_differences(name):
    factory, settings = OPTIMIZERS[name]
    case, steps = Network(), 4
    stack = (*(x[:steps] for x in case.inner_batch[:2]), case.inner_batch[2])
    lam = {k: jnp.asarray(v) for k, v in settings.items()}

    def solve(lam):
        inner = lambda w, lam, batch: case.inner(w, case.hparams, batch)  # noqa: E731
        outer = lambda w, lam, batch: case.outer(w, case.hparams, batch)  # noqa: E731
        return bilevel.hypergrad_solve(
            outer, inner, Unroll(factory, steps), case.params, lam,
            inner_batch=stack, outer_batch=case.outer_batch,
        )  # fmt: skip

    sol = jax.jit(solve)(lam)
    by_hand = jax.jit(lambda lam: run_value(case, factory, lam, steps))
    np.testing.assert_allclose(sol.value, by_hand(lam), rtol=1e-12)
    for k in lam:
        # Truncation ~ h^2 and rounding ~ 1e-16 / h are both below 1e-9 at h = 1e-5. Optax computes
        # adafactor's decay in float32, whatever the parameters: rounding 1e-7 / h, hence h = 1e-2.
        step, rtol = (1e-2, 1e-3) if (name, k) == ("adafactor", "decay") else (1e-5, 1e-5)
        high, low = (by_hand({**lam, k: lam[k] + s}) for s in (step, -step))
        np.testing.assert_allclose(sol.grads[k], (high - low) / (2 * step), rtol=rtol, atol=1e-9)
    if name == "lion":  # only the sign of the averaged gradient enters: truthfully zero
        assert sol.grads["b1"] == 0 and sol.grads["b2"] == 0
    assert all(abs(sol.grads[k]) > 1e-6 for k in lam if name != "lion" or k in ("lr", "wd"))
