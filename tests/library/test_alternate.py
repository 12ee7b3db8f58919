"""The plain outer loop, against the same loop written by hand, and its contracts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
from bilevel import CG, Dense, Identity, Implicit, Interval, Positive, Space, Stochastic, alternate

KEYS = jax.random.split(jax.random.key(0), 4)
DATA = jax.random.normal(KEYS[0], (64, 3))
TARGET = DATA @ jnp.array([1.0, -2.0, 0.5]) + 0.3 * jax.random.normal(KEYS[1], (64,))


def inner(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w["a"] + w["b"] - y) ** 2) + lam["decay"] * jnp.sum(w["a"] ** 2)


def outer(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w["a"] + w["b"] - y) ** 2) * (1 + 0.1 * lam["mix"])


PARAMS = {"a": jnp.array([0.1, 0.2, 0.3]), "b": jnp.array(0.5)}
HPARAMS = {"decay": jnp.array(0.05), "mix": jnp.array(0.4)}
SPACE = Space({"decay": Positive(), "mix": Interval(0.0, 1.0)})


def batches(count, start=0):
    rows = jnp.arange(8)[None, :] + 4 * (start + jnp.arange(count))[:, None]
    rows = rows % 48
    return DATA[rows], TARGET[rows]


VALID = (DATA[48:], TARGET[48:])
VALUE_AND_GRAD = jax.jit(jax.value_and_grad(inner))


def make(response=None, inner_steps=4, **kwargs):
    settings = dict(
        inner_tx=optax.sgd(0.05, momentum=0.9),
        outer_tx=optax.adam(0.1),
        constrain=SPACE,
    )
    settings |= kwargs
    return alternate(
        outer, inner, response or Implicit(Dense()), inner_steps=inner_steps, **settings
    )


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def close(a, b, rtol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


@functools.cache
def jitted(name):
    algs = {
        "bounds": make(),
        "free": make(constrain=None, response=Implicit(CG(max_steps=4))),
    }
    return algs[name], jax.jit(algs[name].step, donate_argnums=0)


def test_a_step_is_the_loop_written_by_hand():
    alg, step = jitted("bounds")
    state, info = step(alg.init(PARAMS, HPARAMS), inner_batches=batches(4), outer_batch=VALID)

    w, velocity = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    for k in range(4):
        one = jax.tree.map(lambda x, k=k: x[k], batches(4))
        last, grad = VALUE_AND_GRAD(w, HPARAMS, one)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grad)
        w = jax.tree.map(lambda x, v: x - 0.05 * v, w, velocity)
    flat, unravel = jax.flatten_util.ravel_pytree(w)
    hessian = jax.jit(jax.hessian(lambda f: inner(unravel(f), HPARAMS, one)))(flat)
    g = jax.flatten_util.ravel_pytree(jax.jit(jax.grad(outer))(w, HPARAMS, VALID))[0]

    def through(lam):
        """Whose gradient is the indirect part: -q' grad_w inner, for q fixed."""
        grad = jax.grad(inner)(w, lam, one)
        q = jax.lax.stop_gradient(jnp.linalg.solve(hessian, g))
        return -q @ jax.flatten_util.ravel_pytree(grad)[0]

    def raw_value(raw):
        lam = SPACE.constrain(raw)
        return outer(w, lam, VALID) + through(lam)

    raw = {"decay": jnp.log(0.05), "mix": jnp.log(0.4 / 0.6)}
    raw_grad = jax.jit(jax.grad(raw_value))(raw)
    # Adam's first step is the learning rate times the sign, so the norm is checked apart.
    moved = jax.tree.map(lambda r, d: r - 0.1 * d / (jnp.abs(d) + 1e-8), raw, raw_grad)
    norm = jnp.hypot(raw_grad["decay"], raw_grad["mix"])
    # float64, a 4x4 system of condition below 100: rounding only.
    close(state.params, w, 1e-12)
    close((info.value, info.inner_value), (outer(w, HPARAMS, VALID), last), 1e-12)
    close(info.hypergrad_norm, norm, 1e-10)
    close(state.outer.raw, moved, 1e-10)
    close(state.hparams, SPACE.constrain(moved), 1e-10)
    close(state.trained.opt_state[0].trace, velocity, 1e-12)
    # Three steps from a random start: the numbers are exact, the point is no minimum.
    assert int(state.step) == 1 and int(info.result) == bilevel.Status.not_stationary


@pytest.mark.parametrize("name", ["bounds", "free"])
def test_state_keeps_its_type_and_nothing_compiles_twice(name):
    alg, step = jitted(name)
    before = step._cache_size()
    state = alg.init(PARAMS, {"decay": 0.05, "mix": 0.4})  # weakly typed Python floats
    kept = types(state)
    for i in range(3):
        state, _ = step(state, inner_batches=batches(4, start=i), outer_batch=VALID)
        assert types(state) == kept
    assert step._cache_size() - before <= 1
    assert float(PARAMS["b"]) == 0.5  # donated state shares nothing with what init was given


def test_scan_and_vmap_agree_with_calls_one_by_one():
    alg, step = jitted("free")
    starts = [{"decay": jnp.array(d), "mix": jnp.array(0.4)} for d in (0.05, 0.5)]
    singles = []
    for hparams in starts:
        state = alg.init(PARAMS, hparams)
        for _ in range(3):
            state, info = step(state, inner_batches=batches(4), outer_batch=VALID)
        singles.append((state.params, state.hparams, info.value))

    def body(state, _):
        state, info = alg.step(state, inner_batches=batches(4), outer_batch=VALID)
        return state, info.value

    lanes = jax.vmap(alg.init, in_axes=(None, 0))(
        PARAMS, jax.tree.map(lambda *x: jnp.stack(x), *starts)
    )
    final, values = jax.jit(jax.vmap(lambda s: jax.lax.scan(body, s, None, length=3)))(lanes)
    for i, (params, hparams, value) in enumerate(singles):
        lane = jax.tree.map(lambda x, i=i: x[i], (final.params, final.hparams, values[:, -1]))
        # CG on another instruction order: rounding amplified by three steps of Adam.
        close(lane, (params, hparams, value), 1e-9)


class Advance:
    """A response that trains on a stack of batches of its own, as an unrolled one does."""

    length = 3

    def num_inner_batches(self):
        return self.length

    def init(self, problem, params, hparams):
        return jnp.zeros(())

    def vjp(self, problem, params, hparams, inner_batch, state, *, key=None):
        def trained(lam):
            w = params
            for i in range(self.length):
                one = jax.tree.map(lambda x, i=i: x[i], inner_batch)
                grad = problem.inner_grad(w, lam, one)
                w = jax.tree.map(lambda x, g: x - lam["rate"] * g, w, grad)
            return w

        w, pull = jax.vjp(trained, hparams)

        def pullback(g):
            return pull(g)[0], state + 1, jnp.asarray(0, jnp.int32), {}

        return w, pullback


def test_a_response_for_a_stack_reads_the_trailing_batches_and_moves_the_parameters():
    def tx(hparams):
        return optax.sgd(hparams["rate"])

    alg = alternate(outer, inner, Advance(), tx, optax.sgd(1e-3), inner_steps=2)
    hparams = {**HPARAMS, "rate": jnp.array(0.1)}
    state = alg.init(PARAMS, hparams)
    stack = batches(5)
    new, info = jax.jit(alg.step)(state, inner_batches=stack, outer_batch=VALID)

    def value(rate):
        w = PARAMS
        for i in range(5):
            # Rates of the plain steps are constants to the response, its own are not.
            r = rate if i >= 2 else 0.1
            grad = jax.grad(inner)(w, hparams, jax.tree.map(lambda x, i=i: x[i], stack))
            w = jax.tree.map(lambda x, g, r=r: x - r * g, w, grad)
        return outer(w, hparams, VALID), w

    (expected, w), grad = jax.jit(jax.value_and_grad(value, has_aux=True))(0.1)
    close(new.params, w, 1e-12)
    close(info.value, expected, 1e-12)
    close(new.hparams["rate"], 0.1 - 1e-3 * grad, 1e-12)
    close(new.response, 1.0, 0)
    apart, _ = jax.jit(alg.step)(
        state,
        inner_batches=jax.tree.map(lambda x: x[:2], stack),
        outer_batch=VALID,
        response_batch=jax.tree.map(lambda x: x[2:], stack),
    )
    close(apart.params, new.params, 1e-12)
    with pytest.raises(ValueError, match="leading axis of 5.*reads 3 batches of its own"):
        trace(alg, state, batches(4))


def test_fresh_batches_come_from_the_trailing_slices():
    response = Implicit(Stochastic(optax.sgd(0.05), steps=3), fresh_batches=True)
    alg = make(response, inner_steps=0, constrain=None)
    state = alg.init(PARAMS, HPARAMS)
    new, info = jax.jit(alg.step)(state, inner_batches=batches(4), outer_batch=VALID)
    direct = jax.jit(functools.partial(bilevel.hypergrad_solve, outer, inner, response))(
        PARAMS, HPARAMS, inner_batch=batches(4), outer_batch=VALID, state=state.response
    )
    close(new.response, direct.state, 1e-12)
    close(info.hypergrad_norm, bilevel.ground.tree.norm(direct.grads), 1e-12)
    with pytest.raises(ValueError, match="leading axis of 6.*reads 4 batches of its own"):
        trace(make(response, inner_steps=2), state, batches(2))


def test_without_training_steps_only_the_hyperparameters_move():
    alg = make(inner_steps=0, has_aux=False)
    state = alg.init(PARAMS, HPARAMS)
    new, info = jax.jit(alg.step)(state, inner_batches=batches(1), outer_batch=VALID)
    close(new.params, PARAMS, 0)
    one = jax.tree.map(lambda x: x[0], batches(1))
    close(info.inner_value, inner(PARAMS, HPARAMS, one), 1e-12)
    trace(make(Implicit(Dense()), inner_steps=0), state, batches(1))
    again = jax.eval_shape(
        lambda s: alg.step(s, inner_batches=None, outer_batch=VALID, response_batch=one), state
    )[0]
    assert jax.tree.structure(again) == jax.tree.structure(new)


def test_bfloat16_states_keep_their_type_and_aux_comes_back():
    half = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))

    def outer_aux(w, lam, batch):
        return outer(w, lam, batch), {"twice": 2 * outer(w, lam, batch)}

    alg = alternate(
        outer_aux, inner, Implicit(CG(max_steps=2)), optax.adam(0.01), optax.adam(0.1), 2,
        constrain=SPACE, has_aux=True,
    )  # fmt: skip
    state = alg.init(half(PARAMS), half(HPARAMS))
    new, info = jax.jit(alg.step)(state, inner_batches=half(batches(2)), outer_batch=half(VALID))
    assert types(new) == types(state)
    assert new.outer.raw["mix"].dtype == jnp.bfloat16
    close(info.aux["twice"], 2 * info.value, 0.01)  # one rounding of bfloat16 is 0.004


def test_convolutions_are_trained_in_straight_line_code_on_cpu():
    def conv(w, lam, batch):
        image = jax.lax.conv(batch, w, (1, 1), "SAME")
        return jnp.mean(image**2) + lam * jnp.sum(w**2)

    def loops(**kwargs):
        alg = alternate(conv, conv, Implicit(Identity()), optax.sgd(0.1), optax.sgd(0.1), 3,
                        **kwargs)  # fmt: skip
        state = alg.init(jnp.ones((1, 1, 3, 3)), jnp.array(0.1))
        images = jnp.ones((3, 2, 1, 4, 4))
        step = jax.jit(lambda s: alg.step(s, inner_batches=images, outer_batch=images[0]))
        return "while" in step.lower(state).compile().as_text()

    assert loops(unroll=False)
    assert loops() == (jax.default_backend() != "cpu")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x, key):
        x = self.dropout(nnx.relu(self.norm(self.hidden(x))), rngs=nnx.Rngs(dropout=key))
        return self.head(x)[:, 0]


def test_batch_norm_and_dropout_through_model_state():
    net = Net(nnx.Rngs(0))
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    params, stats = nnx.as_pure(params), nnx.as_pure(stats)
    valid_graph = nnx.split(nnx.view(net, deterministic=True, use_running_average=True))[0]

    def train(w, lam, batch, model_state):
        x, y, key = batch
        model = nnx.merge(graphdef, w, model_state)
        loss = jnp.mean((model(x, key) - y) ** 2)
        loss += jnp.exp(lam["decay"]) * sum(jnp.sum(p**2) for p in jax.tree.leaves(w))
        return loss, nnx.as_pure(nnx.state(model, nnx.BatchStat))

    def valid(w, lam, batch, model_state):
        x, y, key = batch
        model = nnx.merge(valid_graph, w, model_state)
        poison = jax.tree.map(lambda s: s * jnp.nan, model_state)  # must be discarded
        return jnp.mean((model(x, key) - y) ** 2), poison

    response = Implicit(CG(max_steps=5), bilevel.Hessian(damping=1.0))
    alg = alternate(
        valid, train, response, optax.sgd(0.05), optax.adam(0.1), inner_steps=3, has_state=True
    )
    state = alg.init(params, {"decay": -3.0}, stats)
    x, y = (a.astype(jnp.float32) for a in batches(3))
    keys = jax.random.split(jax.random.key(1), 3)
    valid_batch = (*(a.astype(jnp.float32) for a in VALID), jax.random.key(2))
    new, info = jax.jit(alg.step)(state, inner_batches=(x, y, keys), outer_batch=valid_batch)
    assert types(new) == types(state)

    gradient = jax.jit(jax.grad(train, has_aux=True))
    w, frozen, tx = params, stats, optax.sgd(0.05)
    for k in range(3):
        grads, frozen = gradient(w, {"decay": -3.0}, (x[k], y[k], keys[k]), frozen)
        w = optax.apply_updates(w, tx.update(grads, tx.init(w))[0])
    # Two compiled programs on float32 weights differ by roundings of 1e-7 a step; entries of
    # 1e-3 then agree to 1e-4.
    close(new.params, w, 1e-4)
    close(new.model_state, frozen, 1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.model_state, stats)
    assert min(jax.tree.leaves(moved)) > 1e-3  # training advanced mean and variance ...
    solution = jax.jit(
        lambda w, s: bilevel.hypergrad_solve(
            valid,
            train,
            response,
            w,
            {"decay": jnp.array(-3.0)},
            inner_batch=(x[2], y[2], keys[2]),
            outer_batch=valid_batch,
            has_state=True,
            model_state=s,
        )
    )(new.params, new.model_state)
    # ... and the solve read the advanced statistics, once and for all its products.
    close(info.value, solution.value, 1e-5)
    close(info.hypergrad_norm, jnp.abs(solution.grads["decay"]), 1e-3)
    with pytest.raises(ValueError, match="`has_state=True` needs the first statistics"):
        alg.init(params, {"decay": -3.0})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(inner_steps=-1), ValueError, "`inner_steps` must be at least 0"),
        (dict(inner_steps=2.0), TypeError, "`inner_steps` must be a Python int"),
        (dict(inner_tx=0.1), TypeError, "`inner_tx` must be an optax"),
        (dict(outer_tx=optax.adam), TypeError, "`outer_tx` must be an optax"),
        (dict(constrain={"decay": Positive()}), TypeError, "`constrain` must be a `Space`"),
        (dict(response=CG()), TypeError, "`response` must be a response"),
        (dict(response=Implicit), TypeError, "`response` must be a response"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def trace(alg, state, inner_batches, outer_batch=VALID):
    """One abstract step: every one of these errors must appear before anything runs."""
    return jax.eval_shape(
        lambda s: alg.step(s, inner_batches=inner_batches, outer_batch=outer_batch)[0], state
    )


def test_batches_and_states_that_do_not_fit_are_refused():
    alg = make()
    state = alg.init(PARAMS, HPARAMS)
    with pytest.raises(ValueError, match=r"inner_batches\[0\] has shape \(3, 8, 3\), expected a l"):
        trace(alg, state, batches(3))
    with pytest.raises(ValueError, match="`inner_batches` has no arrays"):
        trace(alg, state, None)
    with pytest.raises(ValueError, match="outer_batch.*is empty"):
        trace(alg, state, batches(4), (DATA[:0], TARGET[:0]))
    with pytest.raises(ValueError, match="outside its bounds"):
        alg.init(PARAMS, {"decay": 0.0, "mix": 0.5})
    with pytest.raises(TypeError, match=r"`inner_tx\(hparams\)` must return an optax"):
        make(inner_tx=lambda hparams: 0.1).init(PARAMS, HPARAMS)
    rate = make(inner_tx=lambda h: optax.sgd(h["rate"]), constrain=None)
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['rate'\]"):
        trace(rate, rate.init(PARAMS, {**HPARAMS, "rate": 0.1}), batches(4))
    mixed = make(inner_tx=lambda h: optax.sgd(0.1, momentum=h["mix"]))
    small = jax.tree.map(jnp.float32, PARAMS)
    # A momentum in float64 promotes the optimizer's state, which keeps its float32.
    start = mixed.init(small, HPARAMS)
    new = trace(mixed, start, batches(4))
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, start)


@pytest.mark.parametrize("has_state", [False, True])
def test_an_unrolled_response_reads_its_own_batches_and_keeps_what_it_advanced(has_state):
    """Two training steps, then three unrolled ones: five counted, each on the next batch."""

    def inner(w, lam, batch, *seen):
        value = jnp.mean((w - batch) ** 2) + jnp.exp(lam) * w**2
        return (value, seen[0] + batch[0]) if has_state else value

    def outer(w, lam, batch, *seen):
        value = jnp.mean((w - batch) ** 2)
        return (value, seen[0]) if has_state else value

    tx = optax.sgd(0.1)
    response = bilevel.Unroll(tx, steps=3)
    alg = bilevel.alternate(
        outer, inner, response, tx, optax.sgd(0.1), inner_steps=2, has_state=has_state
    )
    state = alg.init(jnp.array(1.0), jnp.array(-1.0), jnp.array(0.0) if has_state else None)
    batches = jnp.arange(1.0, 6.0)[:, None] * jnp.ones((5, 4))
    state, _ = jax.jit(alg.step)(state, inner_batches=batches, outer_batch=jnp.ones(4))
    w = 1.0
    for target in range(1, 6):
        w -= 0.1 * (2 * (w - target) + 2 * np.exp(-1.0) * w)
    assert float(state.params) == pytest.approx(w, rel=1e-12)  # float64, five steps of rounding
    if has_state:
        assert float(state.model_state) == 1 + 2 + 3 + 4 + 5
    with pytest.raises(ValueError, match="leading axis of 5"):
        alg.step(state, inner_batches=batches[:2], outer_batch=jnp.ones(4))
