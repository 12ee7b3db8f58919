"""Unrolled responses at home in JAX: state, transforms, mutable statistics, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Status, Unroll

KEYS = jax.random.split(jax.random.key(11), 6)
STEPS = 4
X, Y = jax.random.normal(KEYS[0], (STEPS, 8, 3)), jax.random.normal(KEYS[1], (STEPS, 8))
XV, YV = jax.random.normal(KEYS[2], (9, 3)), jax.random.normal(KEYS[3], (9,))
W = jnp.asarray([0.3, -0.5, 0.8])
LAM = {"lr": jnp.asarray(-2.0), "decay": jnp.asarray([-1.0, 0.2, 0.5])}


def inner(w, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2) + jnp.sum(jnp.exp(lam["decay"]) * w**2)


def outer(w, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def momentum(lam):
    return optax.sgd(jnp.exp(lam["lr"]), momentum=0.7)


def solve(response, w=W, lam=LAM, inner_batch=(X, Y), inner=inner, outer=outer, **kwargs):
    return bilevel.hypergrad_solve(
        outer, inner, response, w, lam, inner_batch=inner_batch, outer_batch=(XV, YV), **kwargs
    )


def close(a, b, rtol=1e-10, atol=1e-13):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def part(start, stop):
    return X[start:stop], Y[start:stop]


def test_no_step_is_paid_twice():
    """Two calls that hand on parameters and state make the run of one call."""
    half = Unroll(momentum, 2)
    one = solve(half, inner_batch=part(0, 2))
    two = solve(half, w=one.params, inner_batch=part(2, 4), state=one.state)
    whole = solve(Unroll(momentum, 4, truncate=2))
    close(two.params, whole.params)
    close(two.grads, whole.grads)
    close(two.state.opt_state, whole.state.opt_state)


def test_real_time_forward_carries_the_derivative():
    half = Unroll(momentum, 2, mode="forward", real_time=True)
    state = bilevel.hypergrad_init(outer, inner, half, W, LAM)
    one = solve(half, inner_batch=part(0, 2), state=state)
    two = solve(half, w=one.params, inner_batch=part(2, 4), state=one.state)
    whole = solve(Unroll(momentum, 4))
    close(two.grads, whole.grads)
    assert jax.tree.structure(two.state) == jax.tree.structure(state)
    cut = solve(Unroll(momentum, 4, truncate=2))
    assert not np.allclose(cut.grads["lr"], whole.grads["lr"], rtol=1e-3)


@pytest.mark.parametrize("mode", ["mixed", "forward"])
def test_learned_initialisation(mode):
    response = Unroll(
        optax.sgd(0.1), STEPS, mode=mode, initial=lambda w, lam: w + lam["decay"] * lam["lr"]
    )
    grads = solve(response).grads
    for k in LAM:
        shift = 1e-6 * jnp.ones_like(LAM[k])
        high, low = (solve(response, lam={**LAM, k: LAM[k] + s}).value for s in (shift, -shift))
        np.testing.assert_allclose(grads[k].sum(), (high - low) / 2e-6, rtol=1e-7)


def normalised(w, lam, batch, stats, train):
    """A layer with batch normalisation: statistics of the batch, or running ones."""
    x, y = batch
    z = x @ w["in"]
    if train:
        mean, var = z.mean(0), z.var(0)
        stats = {
            "mean": 0.6 * stats["mean"] + 0.4 * mean,
            "var": 0.6 * stats["var"] + 0.4 * var,
            "count": stats["count"] + 1,
        }
    else:
        mean, var = stats["mean"], stats["var"]
    z = jnp.tanh((z - mean[None]) * (w["scale"] / jnp.sqrt(var + 0.1))[None])
    penalty = jnp.sum(jnp.exp(lam["decay"]) * jnp.sum(w["in"] ** 2, 1)) if train else 0.0
    return jnp.mean((z @ w["out"] - y) ** 2) + penalty, stats


@pytest.mark.parametrize("mode", ["mixed", "reverse", "forward"])
def test_batch_norm_equals_central_differences(mode):
    """Running statistics advance with the steps; the outer loss reads them, and through them."""
    w = {
        "in": jax.random.normal(KEYS[4], (3, 4)),
        "scale": jnp.ones(4),
        "out": jax.random.normal(KEYS[5], (4,)),
    }
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4), "count": jnp.asarray(0, jnp.int32)}

    @jax.jit
    def sol(lam):
        return bilevel.hypergrad_solve(
            lambda *a: normalised(*a, train=False), lambda *a: normalised(*a, train=True),
            Unroll(momentum, STEPS, mode=mode), w, lam, inner_batch=(X, Y),
            outer_batch=(XV, YV), has_state=True, model_state=stats,
        )  # fmt: skip

    at = sol(LAM)
    assert at.state.model_state["count"] == STEPS and at.result == Status.ok
    assert at.params.keys() == w.keys()
    for k in LAM:
        direction = jnp.cos(jnp.arange(LAM[k].size, dtype=float)).reshape(LAM[k].shape)
        high, low = (sol({**LAM, k: LAM[k] + s * direction}).value for s in (1e-5, -1e-5))
        slope = jnp.sum(at.grads[k] * direction)
        np.testing.assert_allclose(slope, (high - low) / 2e-5, rtol=1e-7)


def test_a_root_at_zero_in_the_loss_says_what_to_do():
    """Adam's own roots are mended (test_optimizer.py), the user's are not."""

    def rooted(w, lam, batch):  # finite itself, and of infinite slope in the hyperparameter
        return inner(w, LAM, batch) + jnp.sqrt(lam["lr"] - LAM["lr"]) * jnp.sum(w)

    sol = solve(Unroll(optax.adam(0.1), STEPS), lam={"lr": LAM["lr"]}, inner=rooted, outer=outer)
    assert not np.isfinite(sol.grads["lr"]) and sol.result == Status.nonfinite_output
    with pytest.raises(bilevel.HypergradientError, match="a square root or a norm at zero"):
        bilevel.raise_for_status(sol)


def test_divergence_is_a_status():
    sol = solve(Unroll(lambda lam: optax.sgd(1e200 * jnp.exp(lam["lr"])), STEPS))
    assert sol.result == Status.nonfinite_input


@pytest.mark.parametrize("mode", ["mixed", "forward"])
def test_jit_scan_vmap_donation_and_closures(mode):
    """One program, compiled once; a loss may close over tracers of the jit around it."""
    response = Unroll(momentum, STEPS, mode=mode)
    traces = []

    def step(carry, inner_batch, shift):
        w, state = carry
        traces.append(None)

        def shifted(w, lam, batch):
            return inner(w, lam, batch) + jnp.sum(shift * w)

        sol = solve(response, w=w, inner=shifted, inner_batch=inner_batch, state=state)
        return (sol.params, sol.state), sol.grads

    state = bilevel.hypergrad_init(outer, inner, response, W, LAM)
    shift = jnp.asarray([0.1, -0.2, 0.3])
    jitted = jax.jit(step, donate_argnums=0)
    copy = jax.tree.map(jnp.array, (W, state))
    carry, first = jitted(copy, (X, Y), shift)
    kept = jax.tree.map(jnp.array, carry)
    carry, second = jitted(carry, (X, Y), shift)
    assert len(traces) == 1
    # the state of a call fits the next one exactly, so it can be a scan's carry
    _, grads = jax.jit(lambda c, b: jax.lax.scan(lambda c, b: step(c, b, shift), c, b))(
        (W, state), jax.tree.map(lambda x: jnp.stack([x, x]), (X, Y))
    )
    close(jax.tree.map(lambda x: x[0], grads), first)
    close(jax.tree.map(lambda x: x[1], grads), second)
    lanes = jax.vmap(lambda s: step((W, state), (X, Y), s)[1])(jnp.stack([shift, 2 * shift]))
    close(jax.tree.map(lambda x: x[0], lanes), first)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, (W, state))


def test_a_derivative_of_the_hypergradient_through_a_closed_over_value():
    """The primitive's own rule is differentiable, also in what the loss closes over."""

    def gradient(shift, mode):
        moved = lambda w, lam, b: inner(w, lam, b) + jnp.sum(jnp.sin(shift * w))  # noqa: E731
        return solve(Unroll(momentum, 2, mode=mode), inner=moved, inner_batch=part(0, 2)).grads[
            "lr"
        ]

    a, b = (jax.grad(gradient)(0.7, mode) for mode in ("mixed", "reverse"))
    np.testing.assert_allclose(a, b, rtol=1e-9)
    assert abs(a) > 1e-4


@pytest.mark.parametrize("steps", [1, 4])
def test_convolutions_are_straight_line_on_cpu(steps):
    def loss(w, lam, batch):
        z = jax.lax.conv_general_dilated(batch, w, (1, 1), "SAME")
        return jnp.mean(jnp.tanh(z) ** 2) + jnp.exp(lam) * jnp.sum(w**2)

    w = 0.3 * jax.random.normal(KEYS[4], (2, 2, 3, 3))
    x = jax.random.normal(KEYS[5], (4, 2, 2, 6, 6))

    def run(x, mode, remat="none"):
        response = Unroll(optax.sgd(0.1), steps, mode=mode, remat=remat)
        return bilevel.hypergrad(loss, loss, response)(
            w, jnp.asarray(-1.0), inner_batch=x[:steps], outer_batch=x[0]
        )

    compiled = jax.jit(lambda x: run(x, "mixed")).lower(x).compile()
    if jax.default_backend() == "cpu":
        assert "while" not in compiled.as_text()
    reference = jax.jit(lambda x: run(x, "reverse"))(x)
    np.testing.assert_allclose(compiled(x), reference, rtol=1e-10)
    segments = jax.jit(lambda x: run(x, "mixed", "sqrt"))(x)
    np.testing.assert_allclose(segments, reference, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_parameters_and_wide_hyperparameters(dtype):
    cast = lambda t: jax.tree.map(lambda x: x.astype(dtype), t)  # noqa: E731
    narrow = lambda w, lam, b: inner(w, cast(lam), b).astype(jnp.float32)  # noqa: E731
    low = lambda w, lam, b: outer(w, lam, b).astype(jnp.float32)  # noqa: E731
    sol = bilevel.hypergrad_solve(
        low, narrow, Unroll(momentum, STEPS), W.astype(dtype), LAM,
        inner_batch=cast((X, Y)), outer_batch=cast((XV, YV)),
    )  # fmt: skip
    assert sol.params.dtype == dtype and sol.grads["lr"].dtype == jnp.float64
    # a few roundings of 6e-8 or 4e-3 a step
    close(sol.grads, solve(Unroll(momentum, STEPS)).grads, rtol=100 * float(jnp.finfo(dtype).eps),
          atol=10 * float(jnp.finfo(dtype).eps))  # fmt: skip


def test_too_many_steps_in_half_precision_are_marked_and_float32_masters_are_right():
    """bfloat16 rounds each of 80 steps by up to 4e-3: the error is 10 % and more."""
    steps, rate = 80, lambda lam: optax.sgd(jnp.exp(lam["lr"]))  # noqa: E731
    x, y = jnp.tile(X, (steps // STEPS, 1, 1)), jnp.tile(Y, (steps // STEPS, 1))

    def run(params_dtype, compute_dtype, steps=steps, rate=rate, mode="mixed"):
        def cast(t):
            return jax.tree.map(lambda x: x.astype(compute_dtype), t)

        def loss(w, lam, batch):
            return inner(cast(w), cast(lam), cast(batch)).astype(jnp.float32)

        lam = jax.tree.map(lambda x: x.astype(jnp.float32), LAM)
        response = Unroll(rate, steps, mode=mode)
        stack = (x[:steps], y[:steps])
        return jax.jit(
            lambda w, lam, stack: solve(
                response, w=w, lam=lam, inner=loss, outer=loss, inner_batch=stack
            )
        )(W.astype(params_dtype), lam, stack)

    exact = run(jnp.float32, jnp.float32)
    assert exact.result == Status.ok
    for mode in ("mixed", "forward"):
        assert run(jnp.bfloat16, jnp.bfloat16, mode=mode).result == Status.rounding
    assert run(jnp.float16, jnp.float16).result == Status.ok  # eight times as fine
    assert run(jnp.bfloat16, jnp.bfloat16, steps=20).result == Status.ok
    # few steps, each of them lost: 1e-4 of a gradient of order one, beside weights of order one
    tiny = lambda lam: optax.sgd(1e-3 * jnp.exp(lam["lr"]))  # noqa: E731
    assert run(jnp.bfloat16, jnp.bfloat16, 4, tiny).result == Status.rounding
    masters = run(jnp.float32, jnp.bfloat16)
    assert masters.result == Status.ok and masters.params.dtype == jnp.float32
    # each gradient has a relative error of 2^-8 at most, and they contract
    close(masters.grads, exact.grads, rtol=0.03, atol=0.01 * float(exact.stats["indirect_norm"]))


def test_rounding_costs_float32_nothing():
    """The statistics of half precision are not in the program."""
    from bilevel.inner.descend import descend, start
    from bilevel.problem.two_losses import Problem

    problem, tx = Problem(outer, inner), optax.sgd(0.1)
    for dtype, there in ((jnp.float32, False), (jnp.float64, False), (jnp.bfloat16, True)):
        w = W.astype(dtype)
        info = jax.eval_shape(
            lambda w: descend(problem, tx, start(tx, w), LAM, (X, Y), steps=2)[1], w
        )
        assert (info.rounded is not None) == there


BAD_SETTINGS = [
    (dict(steps=0), ValueError, "`steps` must be at least 1"),
    (dict(steps=2.0), TypeError, "`steps` must be a Python int"),
    (dict(truncate=5), ValueError, "`truncate` must be at most `steps`=4, got 5"),
    (dict(mode="backward"), ValueError, "`mode` must be one of"),
    (dict(remat="all"), ValueError, "`remat` must be one of"),
    (dict(mode="forward", remat="step"), ValueError, "no meaning with `mode='forward'`"),
    (dict(real_time=True), ValueError, "needs `mode='forward'`"),
    (dict(inner_tx=0.1), TypeError, "`inner_tx` must be an optax transformation"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        Unroll(**{"inner_tx": momentum, "steps": STEPS, **settings})


def injected_schedule(lam):
    """The user's rate is put in the state, where the schedule writes over it."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.1 / (1 + count))


def many_steps(lam):
    return optax.MultiSteps(optax.sgd(0.1), every_k_schedule=int(lam["lr"]))


BAD_CALLS = [
    (Unroll(momentum, 5), ValueError, r"inner_batch\[0\] has shape \(4, 8, 3\).*axis of 5"),
    (Unroll(optax.sgd(0.1), 4), ValueError, r"No derivative reaches hparams\['lr'\]"),
    (Unroll(injected_schedule, 4), ValueError, r"No derivative reaches hparams\['lr'\]"),
    (
        Unroll(lambda lam: optax.sgd(jax.lax.stop_gradient(lam["lr"])), 4),
        ValueError,
        r"No derivative reaches hparams\['lr'\].*stop_gradient",
    ),
    (
        Unroll(lambda lam: optax.sgd(jnp.round(lam["lr"])), 4, mode="forward"),
        ValueError,
        r"No derivative reaches hparams\['lr'\]",
    ),
    (
        Unroll(lambda lam: optax.sgd(0.1 / lam["lr"].astype(jnp.int32)), 4),
        ValueError,
        r"No derivative reaches hparams\['lr'\]",
    ),
    (Unroll(many_steps, 4), TypeError, "integer setting"),
    (
        Unroll(lambda lam: optax.sgd(optax.cosine_decay_schedule(0.1, lam["lr"])), 4),
        TypeError,
        "integer setting",
    ),
    (Unroll(momentum, 4, mode="forward", max_hparams=3), ValueError, "has 4 scalars.*max_hparams"),
    (Unroll(lambda lam: lam["lr"], 4), TypeError, "must return an optax transformation"),
]


@pytest.mark.parametrize(("response", "error", "message"), BAD_CALLS)
def test_bad_calls(response, error, message):
    with pytest.raises(error, match=message):
        solve(response)


def test_bad_state_and_integer_hyperparameter():
    state = solve(Unroll(optax.sgd(0.1), 4), lam=LAM["decay"], inner=lambda w, lam, b: inner(
        w, {"decay": lam}, b)).state  # fmt: skip
    with pytest.raises(ValueError, match="state has another tree structure"):
        solve(Unroll(momentum, 4), state=state)
    with pytest.raises(TypeError, match=r"hparams\['every'\] has dtype int"):
        solve(Unroll(momentum, 4), lam={**LAM, "every": 2})
