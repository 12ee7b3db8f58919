"""Inner optimizers beyond the gradient: zero gradients, losses, pairs and averages (float64).

The oracle is always the same: central differences of the run written with optax by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Evolution, FiniteDifference, Status, Unroll
from bilevel.inner.optimizer import compute_updates
from bilevel.inner.roots import flat_roots

STEPS = 4
KEYS = jax.random.split(jax.random.key(0), 3)
# The second input is always zero: its weight's gradient is, too, and it stays where it starts.
X = jax.random.normal(KEYS[0], (STEPS, 6, 3)).at[:, :, 1].set(0.0)
Y = jax.random.normal(KEYS[1], (STEPS, 6))
W = {"w": jnp.asarray([0.3, 0.0, -0.7]), "unused": jnp.zeros((2, 2))}
# Not weak: times a float32 schedule, a weak rate would be float32 and its differences noise.
LAM = {"rate": jnp.float64(0.05), "decay": jnp.float64(-3.0)}
BATCH, VALID = (X, Y), (X[0], Y[0])


def outer(params, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2) + jnp.sum(params["unused"])


def inner(params, lam, batch):
    penalty = jnp.exp(lam["decay"]) * jnp.sum(params["w"] ** 2)
    return outer(params, lam, batch) - jnp.sum(params["unused"]) + penalty


def by_hand(factory, lam, params=W, steps=STEPS, outer=outer, inner=inner, evaluate=None):
    """The outer loss after the run: a Python loop, no part of the library."""
    tx, opt_state = factory(lam), factory(lam).init(params)
    for t in range(steps):
        batch = jax.tree.map(lambda x, t=t: x[t], BATCH)
        value, grads = jax.value_and_grad(inner)(params, lam, batch)
        extra = {}
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            value_fn = lambda w, b=batch: inner(w, lam, b)  # noqa: E731
            extra = {"value": value, "grad": grads, "value_fn": value_fn}
        if isinstance(params, optax.LookaheadParams):
            grads = grads.fast
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        params = optax.apply_updates(params, updates)
    return outer(evaluate(opt_state, params) if evaluate else params, lam, VALID)


def check(factory, response, lam=LAM, params=W, rtol=1e-5, atol=1e-9, **kwargs):
    """Value and gradient against the run by hand and its central differences."""
    kwargs = {"outer": outer, "inner": inner, **kwargs}
    one = isinstance(response, FiniteDifference)

    def solve(lam):
        return bilevel.hypergrad_solve(
            kwargs["outer"], kwargs["inner"], response, params, lam,
            inner_batch=VALID if one else BATCH, outer_batch=VALID,
        )  # fmt: skip

    sol = jax.jit(solve)(lam)
    steps = 1 if one else STEPS
    run = jax.jit(lambda lam: by_hand(factory, lam, params, steps, **kwargs))
    np.testing.assert_allclose(sol.value, run(lam), rtol=1e-10)
    assert sol.result == Status.ok
    for k in lam:  # h^2 and rounding / h are both below 1e-9 at h = 1e-5
        high, low = (run({**lam, k: lam[k] + h}) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(sol.grads[k], (high - low) / 2e-5, rtol=rtol, atol=atol)
    assert sol.grads["rate"] != 0
    return sol


SECOND_MOMENTS = {
    "adam": optax.adam,
    "nadam": optax.nadam,
    "adamw": optax.adamw,
    "amsgrad": optax.amsgrad,
    "adabelief": lambda rate: optax.adabelief(rate, eps_root=0.0),
    "adagrad": optax.adagrad,
    "rmsprop": lambda rate: optax.rmsprop(rate, eps_in_sqrt=False),
    "centered rmsprop": lambda rate: optax.rmsprop(rate, centered=True, eps_in_sqrt=False),
    "lamb": optax.lamb,
    "injected adam": optax.inject_hyperparams(optax.adam),
    "adam every second step": lambda rate: optax.MultiSteps(optax.adam(rate), 2),
    "schedule-free adam": optax.contrib.schedule_free_adamw,
}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_a_gradient_of_exactly_zero_has_the_derivative_of_the_limit(name):
    def factory(lam):
        return SECOND_MOMENTS[name](lam["rate"])

    # MultiSteps averages with float32 weights: the differences are noise below 1e-11 / 1e-5.
    atol = 1e-6 if name == "adam every second step" else 1e-9
    sol = check(factory, Unroll(factory, STEPS), atol=atol)
    assert sol.params["w"][1] == 0 and not sol.params["unused"].any()


@pytest.mark.parametrize("mode", ["reverse", "forward", "one step"])
def test_in_every_mode(mode):
    def factory(lam):
        return optax.adam(lam["rate"], eps=0.1)

    if mode == "one step":  # the difference's own error is of order radius^2
        check(factory, FiniteDifference(factory, 1e-4), rtol=1e-4)
    else:
        check(factory, Unroll(factory, STEPS, mode=mode))


def test_the_loss_keeps_its_own_derivatives():
    """A root of the user's at zero is NaN, and says so, as in `jax.grad`."""

    def rooted(params, lam, batch):
        return inner(params, lam, batch) + jnp.sum(jnp.sqrt(params["unused"] ** 2))

    response = Unroll(lambda lam: optax.adam(lam["rate"]), STEPS)
    sol = bilevel.hypergrad_solve(
        outer, rooted, response, W, LAM, inner_batch=BATCH, outer_batch=VALID
    )
    assert not np.isfinite(sol.grads["rate"])
    assert sol.result in (Status.nonfinite_input, Status.nonfinite_output)


def test_a_loss_that_the_update_evaluates_keeps_its_own_derivatives_too():
    def update(updates, state, params=None, *, value_fn, **_):
        return updates * value_fn(params), state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)

    def moved(w, value_fn):
        return compute_updates(tx, 1.0, (), w, value=0.0, value_fn=value_fn)[0]

    rooted = jax.grad(moved)(0.0, lambda w: jnp.sqrt(w**2))
    assert np.isnan(rooted)


def test_roots_in_loops_branches_and_calls_are_flat_at_zero_and_else_unchanged():
    def root(x):
        return jnp.sqrt(x) + jnp.where(x > 0, jax.lax.rsqrt(x), 0) + x**0.3 + jnp.cbrt(x)

    programs = {
        "plain": root,
        "jit": jax.jit(root),
        "checkpoint": jax.checkpoint(root),
        "cond": lambda x: jax.lax.cond(x.sum() >= 0, root, jnp.sin, x),
        "scan": lambda x: jax.lax.scan(
            lambda c, z: (c + root(x), c * z), 0 * x, jnp.arange(1.0, 3.0), reverse=True
        ),
        "while": lambda x: jax.lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + root(x)), (0, x)
        )[1],
    }
    x = jnp.asarray([0.0, 0.7, 2.0])
    for name, program in programs.items():
        flat = flat_roots(program)
        jax.tree.map(np.testing.assert_array_equal, flat(x), program(x))

        def slope(f, x, program=name):
            return jax.jvp(f, (x,), (jnp.asarray([1.0, 1.0, -2.0]),))[1]

        found, usual = slope(flat, x), slope(program, jnp.maximum(x, 0.1))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(usual), strict=True):
            np.testing.assert_allclose(a[..., 1:], b[..., 1:], rtol=1e-14)
            assert np.isfinite(a).all()
        if name == "plain":
            np.testing.assert_array_equal(found[0], 0)
            assert np.isnan(slope(flat, x * jnp.asarray([jnp.nan, 1, 1]))[0])
            poisoned = jax.jvp(flat, (x,), (jnp.asarray([jnp.nan, 0, 0]),))[1]
            assert np.isnan(poisoned[0])  # NaN is not replaced by the zero slope
    assert jax.make_jaxpr(flat_roots(jnp.sin))(x).eqns[0].primitive.name == "sin"


NEEDS_LOSS = {
    # Its step is the loss over the squared gradient, below a limit that is not met here: where
    # it is met, nothing comes through the loss.
    "polyak": lambda lam: optax.chain(
        optax.polyak_sgd(max_learning_rate=1e3), optax.scale(lam["rate"])
    ),
    "plateau": lambda lam: optax.chain(
        optax.sgd(lam["rate"]), optax.contrib.reduce_on_plateau(patience=1, cooldown=0)
    ),
    "lbfgs without a search": lambda lam: optax.lbfgs(lam["rate"], linesearch=None),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "mixed") for name in NEEDS_LOSS] + [("polyak", m) for m in ("reverse", "forward")],
)
def test_optimizers_that_ask_for_the_loss(name, mode):
    check(NEEDS_LOSS[name], Unroll(NEEDS_LOSS[name], STEPS, mode=mode))


def test_the_loss_reaches_one_step_and_evolution():
    factory = NEEDS_LOSS["polyak"]
    one = jax.tree.map(lambda x: x[0], BATCH)

    def solve(response, batch, lam=LAM, key=None):
        return jax.jit(
            lambda: bilevel.hypergrad_solve(
                outer, inner, response, W, lam, inner_batch=batch, outer_batch=VALID, key=key
            )
        )()

    exact = solve(Unroll(factory, 1), jax.tree.map(lambda x: x[:1], BATCH))
    # the part through the loss itself is a first derivative, which no mixed product holds
    near = solve(FiniteDifference(factory, 1e-4), one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), near.grads, exact.grads)
    response = Evolution(lambda lam: optax.lbfgs(), STEPS, 2, 0.1)
    sol = solve(response, BATCH, {"decay": LAM["decay"]}, jax.random.key(0))
    value = jax.jit(lambda: by_hand(lambda lam: optax.lbfgs(), LAM))()
    np.testing.assert_allclose(sol.value, value, rtol=1e-6)  # the search stops by tolerances


def test_a_line_search_is_differentiated_forward_or_refused():
    factory = lambda lam: optax.lbfgs()  # noqa: E731
    one = jax.tree.map(lambda x: x[0], BATCH)
    for response, batch in (
        (Unroll(factory, STEPS), BATCH),
        (Unroll(factory, STEPS, mode="reverse"), BATCH),
        (FiniteDifference(factory), one),
    ):
        with pytest.raises(ValueError, match=r"`inner_tx` has a loop.*linesearch=None"):
            bilevel.hypergrad_solve(
                outer, inner, response, W, LAM, inner_batch=batch, outer_batch=VALID
            )

    def searched(params, lam, batch):  # a while loop of the user's own is not blamed on `inner_tx`
        steps = jax.lax.while_loop(lambda c: c < params["w"][0], lambda c: c + params["w"][0], 0.0)
        return inner(params, lam, batch) * steps

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        bilevel.hypergrad_solve(
            outer, searched, Unroll(optax.sgd(0.1), STEPS), W, {"decay": LAM["decay"]},
            inner_batch=BATCH, outer_batch=VALID,
        )  # fmt: skip


def test_what_no_training_step_can_tell_is_named():
    def update(updates, state, params=None, *, curvature):
        return jax.tree.map(lambda g: g * curvature, updates), state

    needy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    for tx in (needy, optax.contrib.sophia(0.1)):
        with pytest.raises(TypeError, match=r"`inner_tx` needs an argument.*`value`, `grad`"):
            bilevel.hypergrad_solve(
                outer, inner, Unroll(tx, STEPS), W, LAM, inner_batch=BATCH, outer_batch=VALID
            )


def fast(loss):
    return lambda params, lam, batch: loss(params.fast, lam, batch)


def slow(loss):
    return lambda params, lam, batch: loss(params.slow, lam, batch)


def test_lookahead_moves_a_pair():
    def factory(lam):
        return optax.chain(
            optax.clip_by_global_norm(10.0), optax.lookahead(optax.adam(lam["rate"]), 2, 0.5)
        )

    pair = optax.LookaheadParams.init_synced(W)
    check(factory, Unroll(factory, STEPS), params=pair, inner=fast(inner), outer=slow(outer))
    with pytest.raises(TypeError, match=r"`inner_tx` is `optax.lookahead`.*init_synced"):
        bilevel.hypergrad_solve(
            outer, inner, Unroll(factory, STEPS), W, LAM, inner_batch=BATCH, outer_batch=VALID
        )


@pytest.mark.parametrize("mode", ["mixed", "forward"])
def test_averaged_weights_reach_the_outer_loss(mode):
    def factory(lam):
        return optax.contrib.schedule_free_sgd(lam["rate"], b1=0.8)

    evaluate = optax.contrib.schedule_free_eval_params
    sol = check(factory, Unroll(factory, STEPS, mode=mode, evaluate=evaluate), evaluate=evaluate)
    np.testing.assert_allclose(
        sol.value, outer(evaluate(sol.state.opt_state, sol.params), LAM, VALID), rtol=1e-12
    )
    assert abs(sol.value - outer(sol.params, LAM, VALID)) > 1e-4  # the trained ones are returned


def test_an_average_alone_can_be_tuned_where_it_is_read():
    """The decay of an average moves no parameter: only `evaluate` lets the outer loss see it."""

    def factory(lam):
        def update(updates, state, params=None):
            new = optax.apply_updates(params, updates)
            return updates, optax.tree.add_scale(optax.tree.scale(lam["rate"], state), 1, new)

        return optax.chain(
            optax.sgd(0.1), optax.GradientTransformation(optax.tree.zeros_like, update)
        )

    evaluate = lambda opt_state, params: opt_state[1]  # noqa: E731
    check(factory, Unroll(factory, STEPS, evaluate=evaluate), evaluate=evaluate)
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['rate'\]"):
        bilevel.hypergrad_solve(
            outer, inner, Unroll(factory, STEPS), W, LAM, inner_batch=BATCH, outer_batch=VALID
        )


def test_a_tuned_peak():
    def tested_in_python(lam):
        return optax.sgd(optax.warmup_cosine_decay_schedule(0.0, lam["rate"], 1, 2))

    with pytest.raises(TypeError, match=r"`inner_tx` uses a hyperparameter.*peak 1 and scale it"):
        bilevel.hypergrad_solve(
            outer, inner, Unroll(tested_in_python, STEPS), W, LAM,
            inner_batch=BATCH, outer_batch=VALID,
        )  # fmt: skip

    def scaled(lam):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 1, STEPS)
        return optax.sgd(lambda count: lam["rate"] * schedule(count))

    check(scaled, Unroll(scaled, STEPS))
