"""Unrolled maps of the user: closed forms, `Unroll` on the same steps, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Status, Unroll, UnrollMap

N, T = 4, 6
KEYS = jax.random.split(jax.random.key(3), 4)
MATRIX = 0.4 * jax.random.normal(KEYS[0], (N, N))
INPUTS = jax.random.normal(KEYS[1], (N, 2))
W0 = jax.random.normal(KEYS[2], (N,))
LAM = {"drive": jax.random.normal(KEYS[3], (T, 2)), "scale": jnp.asarray(0.7)}
OPTIONS = [
    dict(),
    *(dict(remat=remat) for remat in ("step", "sqrt", "log")),
    dict(mode="forward"),
    dict(truncate=2),
    dict(truncate=2, mode="forward"),
]


def affine(w, lam, batch, t):
    matrix, inputs = batch
    return lam["scale"] * matrix @ w + inputs @ lam["drive"][t]


def outer(w, lam, batch):
    return 0.5 * jnp.sum((w - batch) ** 2) + lam["scale"]


def call(response, lam=LAM, w=W0, inner=None, **kwargs):
    return bilevel.hypergrad_solve(
        outer, inner, response, w, lam, inner_batch=(MATRIX, INPUTS), outer_batch=jnp.ones(N),
        **kwargs,
    )  # fmt: skip


def by_hand(kept):
    """The reverse recursion in NumPy: gradients per step, and those of the last ``kept`` steps."""
    a, c, s = np.asarray(MATRIX), np.asarray(INPUTS), float(LAM["scale"])
    path = [np.asarray(W0)]
    for t in range(T):
        path.append(s * a @ path[-1] + c @ np.asarray(LAM["drive"][t]))
    alpha, drive, scale = path[-1] - 1, np.zeros((T, 2)), 1.0
    for t in reversed(range(T - kept, T)):
        drive[t] = c.T @ alpha
        scale += alpha @ a @ path[t]
        alpha = s * a.T @ alpha
    return path, drive, scale


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_recursion_by_hand(options):
    path, drive, scale = by_hand(options.get("truncate", T))
    sol = call(UnrollMap(affine, T, **options))
    np.testing.assert_allclose(sol.params, path[-1], rtol=1e-12)
    np.testing.assert_allclose(sol.grads["drive"], drive, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(sol.grads["scale"], scale, rtol=1e-11)
    moved = np.linalg.norm(path[-1] - path[-2])
    np.testing.assert_allclose(sol.stats["stationarity"], moved, rtol=1e-11)
    assert sol.result == Status.ok and sol.state is None


def loss(w, lam, batch):
    return jnp.sum((batch @ w - 1.0) ** 2) + jnp.exp(lam["decay"]) * jnp.sum(jnp.cos(w))


def test_gradient_steps_are_those_of_unroll():
    """Momentum travels in the parameters, and the batch of a step is found by its number."""
    lam = {"decay": jnp.asarray(-1.0), "rate": jnp.asarray(0.02), "beta": jnp.asarray(0.8)}
    batches = jax.random.normal(KEYS[0], (T, 5, N))

    def step(state, lam, batches, t):
        w, momentum = state
        momentum = lam["beta"] * momentum + jax.grad(loss)(w, lam, batches[t])
        return w - lam["rate"] * momentum, momentum

    def valid(w, lam, batch):
        return jnp.sum(w**3)

    at = dict(inner_batch=batches, outer_batch=None)
    mine = bilevel.hypergrad_solve(
        lambda s, lam, b: valid(s[0], lam, b), None, UnrollMap(step, T), (W0, 0 * W0), lam, **at
    )
    response = Unroll(lambda lam: optax.sgd(lam["rate"], lam["beta"]), T)
    theirs = bilevel.hypergrad_solve(valid, loss, response, W0, lam, **at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), mine.grads, theirs.grads)
    np.testing.assert_allclose(mine.params[0], theirs.params, rtol=1e-12)


def begin(w, lam, batch):
    return lam["scale"] * jnp.sum(batch[1], 1)


def test_a_start_that_depends_on_data_and_hyperparameters():
    response = UnrollMap(affine, T, initial=begin)
    assert bilevel.check_hypergrad(
        outer, None, response, W0, LAM, inner_batch=(MATRIX, INPUTS), outer_batch=jnp.ones(N)
    ).passed
    far = call(response, w=W0 + 9)
    np.testing.assert_allclose(call(response).params, far.params, rtol=0)
    np.testing.assert_allclose(response.run(W0, LAM, (MATRIX, INPUTS)), far.params, rtol=1e-12)


def test_a_wrong_derivative_is_noticed():
    check = bilevel.check_hypergrad(
        outer, None, UnrollMap(affine, T, truncate=2), W0, LAM,
        inner_batch=(MATRIX, INPUTS), outer_batch=jnp.ones(N),
    )  # fmt: skip
    assert check.converged and not check.passed


@pytest.mark.parametrize("frozen", [False, True])
def test_alternate_tunes_an_iteration(frozen):
    """Without an inner loss; the parameters go on from step to step, frozen by `inner_tx` or not.

    (It makes no step here, so that the map alone says what moves.)
    """
    tx = optax.identity()
    if frozen:
        tx = optax.multi_transform({"a": optax.sgd(0.1), "b": optax.set_to_zero()}, ("a", "b"))

    def step(state, lam, batch, t):
        return affine(state[0], lam, batch, t), state[1] + 1

    response = UnrollMap(step, T)
    alg = bilevel.alternate(
        lambda s, lam, b: outer(s[0], lam, b), None, response, tx, optax.sgd(0.1), inner_steps=0
    )
    state = alg.init((W0, jnp.zeros(())), LAM)
    batches = jax.tree.map(lambda x: x[None], (MATRIX, INPUTS))
    state, info = jax.jit(alg.step)(state, inner_batches=batches, outer_batch=jnp.ones(N))
    sol = call(UnrollMap(affine, T))
    np.testing.assert_allclose(state.params[0], sol.params, rtol=1e-12)
    assert state.params[1] == T
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, LAM, sol.grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), state.hparams, moved)
    assert info.result == Status.ok and info.inner_value == 0
    assert (info.cost.inner_gradients, info.cost.products) == (T, T)


def test_nan_poisons():
    bad = {**LAM, "scale": jnp.asarray(jnp.nan)}
    assert call(UnrollMap(affine, T), bad).result in (
        Status.nonfinite_input, Status.nonfinite_output,
    )  # fmt: skip


def test_many_steps_in_half_precision_are_marked():
    half = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))

    def step(w, lam, batch, t):
        return lam * w

    for steps, status in ((40, Status.ok), (50, Status.rounding)):
        sol = bilevel.hypergrad_solve(
            lambda w, lam, b: jnp.sum(w), None, UnrollMap(step, steps), half(W0), jnp.asarray(0.9),
            inner_batch=None, outer_batch=None,
        )  # fmt: skip
        assert sol.result == status and sol.params.dtype == jnp.bfloat16


def searching(w, lam, batch, t):
    return jax.lax.while_loop(lambda x: jnp.sum(x**2) > 1, lambda x: lam["scale"] * x, w)


def with_rule(w, lam, batch, t):
    rule = jax.custom_vjp(lambda x: x)
    rule.defvjp(lambda x: (x, None), lambda _, g: (g,))
    return rule(affine(w, lam, batch, t))


def stopped(w, lam, batch, t):
    return affine(w, {**lam, "scale": jax.lax.stop_gradient(lam["scale"])}, batch, t)


def plain(w, lam, batch):
    return 0.0 * jnp.sum(w)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UnrollMap(lambda w, lam, b: w, T), TypeError, "cannot be called as step.*, t"),
        (lambda: UnrollMap(3, T), TypeError, "`step` must be callable"),  # type: ignore
        (lambda: UnrollMap(affine, 0), ValueError, "`steps`"),
        (lambda: UnrollMap(affine, 2, truncate=3), ValueError, "at most `steps`=2"),
        (lambda: UnrollMap(affine, T, mode="mixed"), ValueError, "`mode` must be"),  # type: ignore
        (lambda: UnrollMap(affine, T, mode="forward", remat="log"), ValueError, "no meaning"),
        (lambda: UnrollMap(lambda w, lam, b, t: w[:2], T), ValueError, "of `step` has shape"),
        (lambda: UnrollMap(lambda w, lam, b, t: (w, w), T), ValueError, "tree structure"),
        (lambda: UnrollMap(lambda w, lam, b, t: None, T), TypeError, "`step` returned None"),
        (lambda: UnrollMap(lambda w, lam, b, t: w > 0, T), TypeError, "of `step` has dtype bool"),
        (lambda: UnrollMap(lambda w, lam, b, t: w + 0j, T), TypeError, "has dtype complex"),
        (lambda: UnrollMap(stopped, T), ValueError, r"reaches hparams.*no_such.*neither `step`"),
        (lambda: UnrollMap(searching, T), ValueError, "`step` has a loop .* mode='forward'"),
        (lambda: UnrollMap(with_rule, T, mode="forward"), TypeError, "tangents through `step`"),
        (lambda: UnrollMap(affine, T, mode="forward", max_hparams=3), ValueError, "`max_hparams`="),
        (lambda: UnrollMap(affine, T, initial=lambda w, lam, b: w[1:]), ValueError, "`initial`"),
    ],
)  # fmt: skip
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        lam = {**LAM, "no_such": jnp.ones(())} if "no_such" in message else LAM
        call(make(), lam)


def test_a_loop_of_unknown_length_goes_forward():
    sol = call(UnrollMap(searching, 1, mode="forward"), {"scale": jnp.asarray(0.5)})
    shrunk = float(jnp.linalg.norm(W0) / jnp.linalg.norm(sol.params))
    k = round(np.log2(shrunk))
    expected = 1 + (sol.params - 1) @ sol.params * k / 0.5
    np.testing.assert_allclose(sol.grads["scale"], expected, rtol=1e-12)


def test_only_a_map_goes_without_an_inner_problem():
    with pytest.raises(TypeError, match="`inner` must be a function"):
        call(bilevel.Implicit())
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool(jnp.array_equal(a, b)),
            call(UnrollMap(affine, T)).grads,
            call(UnrollMap(affine, T), inner=plain).grads,
        )
    )
