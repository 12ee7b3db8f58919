r"""Self-tuning: the ridge optimum, who moves what in a cycle, perturbations, whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.inner.groups import draw_noise
from bilevel.outer.self_tuning.state import entropy_of, inverse_softplus
from bilevel.regularizers import dropout

KEY = jax.random.key(0)
N, DIM = 40, 20


def ridge_data(seed):
    k = jax.random.split(jax.random.key(seed), 5)
    w = 0.5 * jax.random.normal(k[0], (DIM,))
    x, xv = jax.random.normal(k[1], (N, DIM)), jax.random.normal(k[3], (N, DIM))
    y, yv = (m @ w + jax.random.normal(key, (N,)) for m, key in ((x, k[2]), (xv, k[4])))
    return (x, y), (xv, yv)


def ridge_inner(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def ridge_outer(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def ridge_value(lam, data):
    (x, y), valid = data
    w = jnp.linalg.solve(x.T @ x / N + jnp.exp(lam) * jnp.eye(DIM), x.T @ y / N)
    return ridge_outer(w, lam, valid)


def repeat(tree, times):
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (times, *a.shape)), tree)


def test_ridge_optimum_is_found_within_two_percent_from_both_sides():
    # The width 0.1 biases the slope by a few tenths of a percent, and the last cycles' noise
    # of one draw a step is averaged by the decay of the outer rate: 0.5 % is typical.
    cycles = 4000
    alg = bilevel.self_tuning(
        ridge_outer,
        ridge_inner,
        optax.sgd(0.1),
        optax.adam(optax.cosine_decay_schedule(1e-2, cycles)),
        response_tx=optax.sgd(3.0),
        scale=0.1,
        tune_scales=False,
        groups=1,
    )

    def run(seed, start, key):
        train, valid = ridge_data(seed)
        state = alg.init(jnp.zeros(DIM), start)
        return bilevel.scan_run(
            alg, state, lambda _: (repeat(train, 5), valid), cycles, key=key
        ).state

    seeds, starts = jnp.repeat(jnp.arange(3), 2), jnp.tile(jnp.array([-5.0, 2.0]), 3)
    state = jax.jit(jax.vmap(run))(seeds, starts, jax.random.split(KEY, 6))
    grid = jnp.linspace(-4.5, 0.0, 901)
    data = jax.vmap(ridge_data)(seeds)
    values = jax.vmap(lambda d: jax.lax.map(lambda g: ridge_value(g, d), grid))(data)
    optima = grid[jnp.argmin(values, axis=1)]
    assert bool(jnp.all((optima > -4) & (optima < 0)))
    np.testing.assert_allclose(state.raw, optima, rtol=0.02)
    reached = jax.vmap(ridge_value)(state.raw, data)
    assert bool(jnp.all(reached <= 1.001 * jnp.min(values, axis=1)))


HPARAMS = {"rate": jnp.array(0.3), "decay": jnp.array(-4.0), "holes": jnp.array(1.0)}
SPACE = bilevel.Space(
    {
        "rate": bilevel.Interval(0.0, 0.95),
        "decay": bilevel.Free(),
        "holes": bilevel.Integer(0, 3),
    }
)
PARAMS = {
    "a": 0.3 * jax.random.normal(jax.random.key(1), (4, 6)),
    "b": 0.3 * jax.random.normal(jax.random.key(2), (6, 1)),
}


def predict(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"]


def net_model(w, h, batch):
    keep = jnp.arange(4)[None, :] >= h["holes"]  # the first inputs are cut out: a discrete strength
    return predict(w, dropout(batch["key"], batch["x"], h["rate"]) * keep)


def net_error(z, h, batch):
    return jnp.mean((z - batch["y"]) ** 2)


def net_penalty(w, h):
    return jnp.exp(h["decay"]) * sum(jnp.sum(v**2) for v in jax.tree.leaves(w))


SPLIT = bilevel.GaussNewton(net_model, net_error, penalty=net_penalty)


def net_outer(w, h, batch):
    return jnp.mean((predict(w, batch["x"]) - batch["y"]) ** 2)


def net_batch(seed, size=16):
    k = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(k[0], (size, 4))
    return {"x": x, "y": jnp.sin(x[:, :1]) + 0.1 * jax.random.normal(k[1], (size, 1)), "key": k[2]}


INNER = jax.tree.map(lambda *a: jnp.stack(a), *(net_batch(i) for i in range(3)))
OUTER = net_batch(100)


def make(inner_tx=None, outer_tx=None, **settings):
    inner_tx = optax.sgd(0.05, momentum=0.9) if inner_tx is None else inner_tx
    outer_tx = optax.adam(0.02) if outer_tx is None else outer_tx
    base = {
        "inner_steps": 3,
        "groups": 4,
        "constrain": SPACE,
        "linearize": SPLIT,
    }
    return bilevel.self_tuning(net_outer, SPLIT.loss, inner_tx, outer_tx, **(base | settings))


DEFAULT = make()
STEP = jax.jit(DEFAULT.step)


def cycle(alg, state, key=KEY):
    return alg.step(state, inner_batches=INNER, outer_batch=OUTER, key=key)


def test_scales_and_entropy():
    raw = inverse_softplus(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(raw, [-0.4328, 0.5413], atol=1e-4)
    big = jnp.array([1e-4, 80.0, 700.0])
    np.testing.assert_allclose(jax.nn.softplus(inverse_softplus(big)), big, rtol=1e-10)
    np.testing.assert_allclose(entropy_of(jnp.ones(3)), 4.25682, atol=1e-5)
    slope = jax.grad(lambda s: -1e-3 * entropy_of(jax.nn.softplus(s)))(jnp.array(0.2))
    np.testing.assert_allclose(slope, -1e-3 * jax.nn.sigmoid(0.2) / jax.nn.softplus(0.2))


def with_network(state, network_params):
    network = state.trained.network._replace(params=network_params)
    return state._replace(trained=state.trained._replace(network=network))


def test_a_cycle_of_one_step_equals_the_updates_written_out():
    alg = make(inner_steps=1, groups=1, tune_scales=False, scale=0.7)
    state = alg.init(PARAMS, HPARAMS)
    gains = jax.tree.map(lambda u: 0.1 + u, state.network_params.gains)
    state = with_network(state, state.network_params._replace(gains=gains))
    batch = jax.tree.map(lambda x: x[0], INNER)
    new, info = jax.jit(alg.step)(
        state, inner_batches=jax.tree.map(lambda x: x[:1], INNER), outer_batch=OUTER, key=KEY
    )
    raw = SPACE.unconstrain(HPARAMS)
    general = jax.jit(jax.grad(SPLIT.loss))(PARAMS, HPARAMS, batch)
    w = jax.tree.map(lambda p, g: p - 0.05 * g, PARAMS, general)
    np.testing.assert_allclose(new.params["a"], w["a"], rtol=1e-10)

    network = bilevel.StructuredResponse()
    # Validation: at no displacement, through the response of the new weights.
    grads = jax.jit(
        lambda network_params: (
            bilevel.hypergrad_solve(
                lambda p, r, b: net_outer(p, SPACE.constrain(r), b),
                lambda p, r, b: SPLIT.loss(p, SPACE.constrain(r), b),
                bilevel.BestResponse(network),
                w,
                raw,
                inner_batch=batch,
                outer_batch=OUTER,
                state=bilevel.BestResponseState(network_params, None),
            ).grads
        )
    )(new.network_params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(info.hypergrad_norm, norm, rtol=1e-8)
    np.testing.assert_allclose(info.value, jax.jit(net_outer)(w, HPARAMS, OUTER), rtol=1e-10)
    for name in raw:  # Adam's first step is the rate times the sign
        moved = raw[name] - 0.02 * jnp.sign(grads[name])
        np.testing.assert_allclose(new.raw[name], moved, rtol=1e-5)
    assert float(info.stats["response_norm"]) > 0
    assert int(info.result) == 0


@pytest.mark.parametrize("centred", [True, False])
def test_cycles_with_noise_equal_the_updates_written_out(centred):
    """Each training step and the validation step draw their own noise; the response learns
    around the weights as they are after their own step."""
    network = bilevel.StructuredResponse(centred=centred, gain_scale=0.3)
    step, state, batches = small(
        network=network, scale=0.4, scale_tx=optax.sgd(0.2), response_tx=optax.sgd(0.3)
    )
    new, info = step(state, **batches, key=KEY)
    raw, scale = state.raw, 0.4
    batch = jax.tree.map(lambda x: x[0], batches["inner_batches"])

    def perturbed(phi, w, eps):
        lam = raw + scale * eps
        d = lam - raw if centred else lam
        return ridge_inner(network.apply(phi, w, d), lam, batch)

    w, phi = state.params, state.network_params
    for k in range(2):
        eps = draw_noise(jax.random.fold_in(KEY, k), raw, 1)[0]
        if centred:
            w = w - 0.1 * jax.grad(ridge_inner)(w, raw, batch)
            grads = jax.grad(perturbed)(phi, w, eps)
        else:
            grads, of_w = jax.grad(perturbed, argnums=(0, 1))(phi, w, eps)
            w = w - 0.1 * of_w
        phi = jax.tree.map(lambda p, g: p - 0.3 * g, phi, grads)
    eps = draw_noise(jax.random.fold_in(KEY, 2), raw, 1)[0]

    def objective(lam, s):
        sigma = jax.nn.softplus(s)
        d = lam + sigma * eps - (raw if centred else 0)
        value = ridge_outer(network.apply(phi, w, d), None, batches["outer_batch"])
        return value - 1e-3 * entropy_of(sigma)

    grad, of_scale = jax.grad(objective, argnums=(0, 1))(raw, state.raw_scales)
    # The same arithmetic in float64, compiled in another way.
    for ours, right in (
        (new.params, w),
        (new.network_params.gains[""], phi.gains[""]),
        (new.raw, raw - 0.1 * grad),
        (new.raw_scales, state.raw_scales - 0.2 * of_scale),
        (info.hypergrad_norm, jnp.abs(grad)),
    ):
        np.testing.assert_allclose(ours, right, rtol=1e-9)


def test_a_network_that_never_trains_is_told():
    step, state, batches = small(response_tx=optax.set_to_zero())
    _, info = step(state, **batches, key=KEY)
    assert float(info.stats["response_norm"]) == 0
    assert int(info.result) == bilevel.Status.invalid_setting


def test_every_step_moves_its_own_part_only():
    rated = optax.inject_hyperparams(optax.sgd)
    alg = make(
        inner_steps=1,
        inner_tx=rated(0.05),
        outer_tx=rated(0.05),
        response_tx=rated(0.05),
        scale_tx=rated(0.05),
        network=bilevel.StructuredResponse(gain_scale=0.1),
    )
    start = alg.init(PARAMS, HPARAMS)
    step = jax.jit(alg.step)
    owners = {
        "params": ("trained", "weights"),
        "network_params": ("trained", "network"),
        "raw": ("moved", "outer"),
        "raw_scales": ("moved", "widths"),
    }
    for frozen, (half, part) in owners.items():
        owner = getattr(getattr(start, half), part)
        still = owner.opt_state._replace(hyperparams={"learning_rate": jnp.zeros(())})
        changed = getattr(start, half)._replace(**{part: owner._replace(opt_state=still)})
        state = start._replace(**{half: changed})
        new, _ = step(
            state, inner_batches=jax.tree.map(lambda x: x[:1], INNER), outer_batch=OUTER, key=KEY
        )
        for part in owners:
            pairs = zip(
                jax.tree.leaves(getattr(state, part)),
                jax.tree.leaves(getattr(new, part)),
                strict=True,
            )
            assert any(bool(jnp.any(a != b)) for a, b in pairs) == (part != frozen), part


def test_discrete_and_sampled_hyperparameters_move_through_the_response():
    before = STEP._cache_size()
    state = DEFAULT.init(PARAMS, HPARAMS)
    raw = [state.raw]
    for i in range(8):
        state, info = STEP(state, inner_batches=INNER, outer_batch=OUTER, key=jax.random.key(i))
        raw.append(state.raw)
    assert STEP._cache_size() - before <= 1
    for name in HPARAMS:
        assert abs(float(raw[-1][name] - SPACE.unconstrain(HPARAMS)[name])) > 1e-3
    assert float(state.hparams["holes"]) == round(float(state.hparams["holes"]))
    assert int(state.step) == 8 and bool(jnp.isfinite(info.value))


def test_whole_numbers_stay_in_their_range_at_any_raw_value():
    raw = jnp.linspace(-30.0, 30.0, 601)
    values = jax.vmap(lambda r: SPACE.round(SPACE.constrain({**HPARAMS, "holes": r}))["holes"])(raw)
    assert set(np.unique(values)) == {0.0, 1.0, 2.0, 3.0}


def test_shared_hyperparameters_get_one_draw_a_batch():
    seen = []

    def spy(w, h, batch):
        jax.debug.callback(lambda d, r: seen.append((float(d), float(r))), h["decay"], h["rate"])
        return SPLIT.loss(w, h, batch)

    alg = bilevel.self_tuning(
        net_outer, spy, optax.sgd(0.05), optax.sgd(0.05), 1, groups=4, shared="decay",
        constrain=SPACE,
    )  # fmt: skip
    state = alg.init(PARAMS, HPARAMS)
    one = jax.tree.map(lambda x: x[:1], INNER)
    jax.block_until_ready(jax.jit(alg.step)(state, inner_batches=one, outer_batch=OUTER, key=KEY))
    jax.effects_barrier()
    perturbed = {pair for pair in seen if pair[0] != float(HPARAMS["decay"])}
    assert len({d for d, _ in perturbed}) == 1
    assert len({r for _, r in perturbed}) == 4


def small(inner=ridge_inner, outer=ridge_outer, tx=None, **settings):
    """A cycle that compiles fast: ridge, and the state and batches to run it on."""
    tx = optax.sgd(0.1) if tx is None else tx
    alg = bilevel.self_tuning(outer, inner, tx, tx, **({"inner_steps": 2, "groups": 1} | settings))
    train, valid = ridge_data(0)
    model_state = (jnp.array(0),) if settings.get("has_state") else ()
    state = alg.init(jnp.zeros(DIM), jnp.array(-1.0), *model_state)
    return jax.jit(alg.step), state, {"inner_batches": repeat(train, 2), "outer_batch": valid}


def test_warm_up_trains_and_does_not_tune():
    step, state, batches = small(warm_up=1, network=bilevel.StructuredResponse(gain_scale=0.1))
    one, info = step(state, **batches, key=KEY)
    assert bool(one.raw == state.raw) and float(info.hypergrad_norm) == 0
    np.testing.assert_allclose(
        info.value, ridge_outer(one.params, None, batches["outer_batch"]), rtol=1e-10
    )
    assert bool(jnp.any(one.params != state.params))
    assert bool(jnp.any(one.network_params.gains[""] != state.network_params.gains[""]))
    two, info = step(one, **batches, key=KEY)
    assert bool(two.raw != one.raw) and float(info.hypergrad_norm) > 0


def test_self_tuning_networks_train_weights_and_response_together():
    network = bilevel.StructuredResponse(centred=False, gain_scale=0.01)
    alg = make(network=network, linearize=None)
    state = alg.init(PARAMS, HPARAMS)
    new, info = jax.jit(alg.step)(state, inner_batches=INNER, outer_batch=OUTER, key=KEY)
    assert bool(jnp.any(new.params["a"] != PARAMS["a"]))
    assert bool(jnp.any(new.raw["holes"] != state.raw["holes"]))
    deployed = alg.deploy(new)
    expected = network.apply(new.network_params, new.params, new.raw)
    np.testing.assert_array_equal(deployed["a"], expected["a"])
    assert bool(jnp.any(deployed["a"] != new.params["a"]))


def test_model_state_advances_in_the_general_step_only():
    step, state, batches = small(
        lambda w, h, batch, count: (ridge_inner(w, h, batch), count + 1),
        lambda w, h, batch, count: (ridge_outer(w, h, batch), count + 100),
        has_state=True,
    )
    new, _ = step(state, **batches, key=KEY)
    assert int(new.model_state) == 2


def _sample(key):
    def fresh(k):
        return {**{n: INNER[n][0] for n in ("x", "y")}, "key": k}

    return jax.vmap(fresh)(jax.random.split(key, 3)), OUTER


def test_a_scanned_run_equals_a_loop_and_keeps_the_best_state_whole():
    alg, step = DEFAULT, STEP
    state = alg.init(PARAMS, HPARAMS)

    def score(state):
        return net_outer(state.params, state.hparams, net_batch(7))

    run = jax.jit(lambda s: bilevel.scan_run(alg, s, _sample, 6, key=KEY, score=score))(state)
    by_hand, states, infos = state, [], []
    for i in range(6):
        sample_key, step_key = jax.random.split(jax.random.fold_in(KEY, i))
        inner_batches, outer_batch = _sample(sample_key)
        by_hand, info = step(
            by_hand, inner_batches=inner_batches, outer_batch=outer_batch, key=step_key
        )
        states.append(by_hand)
        infos.append(info)
    for a, b in zip(jax.tree.leaves(run.state), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    scores = np.array([float(score(s)) for s in states])
    np.testing.assert_allclose(run.scores, scores, rtol=1e-12)
    best = states[int(np.argmin(scores))]
    assert int(run.best.step) == int(np.argmin(scores)) + 1
    for part in ("params", "raw", "raw_scales", "network_params", "hparams"):
        pairs = zip(
            jax.tree.leaves(getattr(run.best, part)), jax.tree.leaves(getattr(best, part)),
            strict=True,
        )  # fmt: skip
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(run.infos.value, [float(i.value) for i in infos], rtol=1e-12)

    schedule = bilevel.HyperSchedule.from_infos(run.infos, steps_each=3)
    for t in range(18):
        np.testing.assert_array_equal(schedule(t)["rate"], run.infos.hparams["rate"][t // 3])
    replay = jax.jit(lambda schedule, t: schedule(t)["rate"])
    np.testing.assert_array_equal(replay(schedule, 99), run.infos.hparams["rate"][-1])


def test_a_schedule_is_saved_and_read_back(tmp_path):
    schedule = bilevel.HyperSchedule(
        jnp.array([0, 5, 9]), {"a": jnp.arange(3.0), "b": jnp.arange(6.0).reshape(3, 2)}
    )
    schedule.save(tmp_path / "schedule.npz")
    like = {"a": jnp.zeros(()), "b": jnp.zeros(2)}
    back = bilevel.HyperSchedule.load(tmp_path / "schedule.npz", like)
    for t in (0, 4, 5, 8, 9, 50):
        np.testing.assert_array_equal(back(t)["b"], schedule(t)["b"])
    with pytest.raises(ValueError, match="holds 2 hyperparameters"):
        bilevel.HyperSchedule.load(tmp_path / "schedule.npz", like={"a": 0.0})
    with pytest.raises(ValueError, match="increase"):
        bilevel.HyperSchedule(jnp.array([0, 0]), jnp.zeros(2))
    with pytest.raises(ValueError, match="leading axis of 2"):
        bilevel.HyperSchedule(jnp.array([0, 1]), jnp.zeros(3))


def test_bad_input_is_refused_by_name():
    tx = optax.sgd(0.1)
    for settings, message in (
        ({"groups": 0}, "`groups`"),
        ({"entropy": -1.0}, "`entropy`"),
        ({"scale": 0.0}, "`scale`"),
        ({"network": bilevel.StructuredResponse(centred=False)}, "`linearize`"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings)
    with pytest.raises(TypeError, match="`network`"):
        make(network=3)
    with pytest.raises(TypeError, match="`constrain`"):
        make(constrain={"rate": 1.0})
    with pytest.raises(ValueError, match="outside its bounds"):
        make().init(PARAMS, {**HPARAMS, "rate": jnp.array(0.99)})
    with pytest.raises(ValueError, match="one value only"):
        bilevel.Integer(2, 2)
    with pytest.raises(ValueError, match="swap"):
        bilevel.Interval(1.0, 0.0)
    with pytest.raises(ValueError, match="no leaf has 'dacay'"):
        make(shared="dacay").init(PARAMS, HPARAMS)
    with pytest.raises(ValueError, match="no leaf has 'kernel'"):
        make(network=bilevel.StructuredResponse(leaves="kernel")).init(PARAMS, HPARAMS)
    alg = make()
    state = alg.init(PARAMS, HPARAMS)
    with pytest.raises(ValueError, match="`key` is missing"):
        cycle(alg, state, key=None)
    with pytest.raises(ValueError, match="inner_steps=3"):
        alg.step(state, inner_batches=OUTER, outer_batch=OUTER, key=KEY)
    with pytest.raises(ValueError, match="does not divide"):
        cycle(make(groups=5), state)
    blind = bilevel.self_tuning(
        ridge_outer, lambda w, h, b: ridge_inner(w, h["l2"], b), tx, tx, groups=1
    )
    train, valid = ridge_data(0)
    state = blind.init(jnp.zeros(DIM), {"l2": jnp.array(0.0), "learning_rate": jnp.array(0.1)})
    with pytest.raises(ValueError, match="learning_rate.*Unroll"):
        blind.step(state, inner_batches=repeat(train, 5), outer_batch=valid, key=KEY)


def test_scales_are_tuned_and_the_entropy_holds_them_up():
    raw = []
    for entropy in (0.0, 0.1):
        step, state, batches = small(entropy=entropy, scale_tx=optax.sgd(1.0))
        raw.append(step(state, **batches, key=KEY)[0].raw_scales)
    start = inverse_softplus(jnp.array(0.5))
    np.testing.assert_allclose(raw[1] - raw[0], 0.1 * jax.nn.sigmoid(start) / 0.5, rtol=1e-6)


def test_several_validation_steps_read_a_batch_each():
    step, state, batches = small(outer_steps=2, outer=lambda w, h, b: h * jnp.mean(b[1]),
                                 tune_scales=False)  # fmt: skip
    valid = ridge_data(1)[1]
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), batches["outer_batch"], valid)
    new, _ = step(state, inner_batches=batches["inner_batches"], outer_batch=stacked, key=KEY)
    # An outer loss linear in h, seen directly: two plain gradient steps, one a batch.
    np.testing.assert_allclose(new.raw, -1.0 - 0.1 * jnp.sum(jnp.mean(stacked[1], axis=1)))
