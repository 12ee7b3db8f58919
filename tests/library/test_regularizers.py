"""Every regulariser against its formula or a slow loop, with traced and per-example strengths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import regularizers as reg

KEY = jax.random.key(0)


def jitter(key, images, **settings):
    """One program; the settings are numbers in it, as in an eager call."""
    return jax.jit(lambda key, images: reg.color_jitter(key, images, **settings))(key, images)


def test_dropout_keeps_the_mean_at_every_rate_of_a_batch():
    x = jnp.full((3, 40_000), 2.0)
    rates = jnp.array([0.0, 0.3, 0.9])
    y = jax.jit(reg.dropout)(KEY, x, rates)
    np.testing.assert_array_equal(y[0], x[0])
    # Standard error of the mean: 2 sqrt(r/(1-r)/40000) = 0.03 at r = 0.9; five of them.
    np.testing.assert_allclose(jnp.mean(y, axis=1), 2.0, atol=0.15)
    dropped = jnp.mean(y == 0, axis=1)
    np.testing.assert_allclose(dropped, rates, atol=0.0125)  # five standard errors
    np.testing.assert_allclose(jnp.max(y[2]), 20.0, rtol=1e-6)


def test_dropout_shares_draws_along_broadcast_axes():
    x = jnp.ones((4, 5, 6, 7))
    y = reg.dropout(KEY, x, 0.5, broadcast_axes=(1, 2))
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1, :1], y.shape))
    assert 0 < float(jnp.mean(y == 0)) < 1
    z = reg.locked_dropout(KEY, jnp.ones((4, 9, 30)), jnp.array([0.0, 0.2, 0.5, 0.8]))
    np.testing.assert_array_equal(z, jnp.broadcast_to(z[:, :1], z.shape))
    assert bool(jnp.all(z[0] == 1)) and float(jnp.mean(z[3] == 0)) > 0.5


def test_no_derivative_reaches_a_rate():
    g = jax.grad(lambda r: jnp.sum(reg.dropout(KEY, jnp.ones((4, 8)), r)))(0.3)
    assert float(g) == 0


def test_embedding_dropout_drops_words_not_positions():
    table = 1 + jax.random.uniform(KEY, (50, 3))
    tokens = jax.random.randint(jax.random.key(1), (4, 200), 0, 50)
    for rate in (0.5, jnp.array([0.0, 0.3, 0.5, 0.9])):
        out = np.asarray(jax.jit(reg.embedding_dropout)(KEY, table, tokens, rate))
        gone = np.all(out == 0, axis=-1)
        assert gone.any()
        groups = [np.arange(4)] if np.ndim(rate) == 0 else [np.array([i]) for i in range(4)]
        for rows in groups:
            for word in range(50):
                assert len(set(gone[rows][np.asarray(tokens)[rows] == word])) <= 1
    np.testing.assert_allclose(out[0], table[tokens[0]])
    kept = ~gone[3]
    np.testing.assert_allclose(out[3][kept], 10 * table[tokens[3]][kept], rtol=1e-6)


def test_weight_drop_is_one_mask_and_refuses_a_rate_an_example():
    w = reg.weight_drop(KEY, jnp.ones((30, 40)), 0.25)
    np.testing.assert_allclose(np.unique(w), [0, 1 / 0.75])
    with pytest.raises(ValueError, match="scalar"):
        reg.weight_drop(KEY, jnp.ones((3, 4)), jnp.array([0.1, 0.2]))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"`rate` must lie in \[0, 1\)"):
        reg.dropout(KEY, jnp.ones((2, 3)), rate)


def test_a_rate_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="one value per example"):
        reg.dropout(KEY, jnp.ones((2, 3)), jnp.array([0.1, 0.2, 0.3]))


def _cutout_loop(centres, holes, length, size):
    keep = np.ones((size, size), bool)
    for cy, cx in centres[: int(np.floor(holes))]:
        side = int(np.floor(length))
        for y in range(int(np.floor(cy - side / 2)), int(np.floor(cy + side / 2))):
            for x in range(int(np.floor(cx - side / 2)), int(np.floor(cx + side / 2))):
                if 0 <= y < size and 0 <= x < size:
                    keep[y, x] = False
    return keep


def test_cutout_equals_a_loop_over_pixels():
    batch, size, most = 60, 9, 3
    rng = np.random.default_rng(0)
    holes = np.concatenate([np.zeros(6), rng.uniform(0, 3.99, batch - 6)])
    length = np.concatenate([rng.uniform(0, 12, batch - 6), np.zeros(6)])
    keep = jax.jit(reg.cutout_mask, static_argnums=1, static_argnames="max_holes")(
        KEY, (batch, size, size), jnp.asarray(holes), jnp.asarray(length), max_holes=most
    )
    rows, columns = jax.random.split(KEY)
    rows = np.asarray(jax.random.randint(rows, (batch, most), 0, size))
    columns = np.asarray(jax.random.randint(columns, (batch, most), 0, size))
    for i in range(batch):
        centres = list(zip(rows[i], columns[i], strict=True))
        expected = _cutout_loop(centres, holes[i], length[i], size)
        np.testing.assert_array_equal(keep[i], expected)
    odd_and_even = {int(np.floor(v)) % 2 for v in length[6:-6]}
    assert odd_and_even == {0, 1} and not np.asarray(keep).all()


def test_cutout_fills_all_channels_and_checks_its_numbers():
    images = jnp.ones((2, 8, 8, 3))
    out = reg.cutout(KEY, images, 1.5, 4.0, max_holes=2, fill=-1.0)
    assert set(np.unique(out)) == {-1.0, 1.0}
    np.testing.assert_array_equal(out, jnp.broadcast_to(out[..., :1], out.shape))
    with pytest.raises(ValueError, match="`holes`"):
        reg.cutout(KEY, images, 3.0, 4.0, max_holes=2)
    with pytest.raises(ValueError, match="`length`"):
        reg.cutout(KEY, images, 1.0, -1.0, max_holes=2)


def test_color_jitter_of_strength_zero_changes_nothing():
    images = jax.random.uniform(KEY, (3, 4, 4, 3))
    np.testing.assert_allclose(jitter(KEY, images), images, atol=1e-12)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_color_operation_equals_its_formula(name):
    images = jax.random.uniform(KEY, (5, 6, 6, 3))
    strength = jnp.array([0.0, 0.1, 0.2, 0.3, 0.5])
    out = jitter(jax.random.key(3), images, **{name: strength}, clip=False)
    images, strength, out = (np.asarray(x) for x in (images, strength, out))
    gray = images @ np.array([0.299, 0.587, 0.114])
    new_gray = out @ np.array([0.299, 0.587, 0.114])
    moved = np.max(np.abs(out - images), axis=(1, 2, 3))
    assert float(moved[0]) < 1e-12 and np.all(moved[1:] > 1e-6)
    if name == "hue":
        np.testing.assert_allclose(new_gray, gray, atol=1e-12)  # luma is the axis of rotation
    elif name == "saturation":
        np.testing.assert_allclose(new_gray, gray, atol=1e-12)
        ratio = (out - gray[..., None]) / (images - gray[..., None])
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape))
    elif name == "contrast":
        np.testing.assert_allclose(new_gray.mean((1, 2)), gray.mean((1, 2)), atol=1e-12)
    else:
        ratio = out / images
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape))
        assert np.all(np.abs(ratio[:, 0, 0, 0] - 1) <= strength + 1e-12)


def test_color_jitter_orders_images_differently_and_traces_its_strengths():
    image = jnp.broadcast_to(jax.random.uniform(KEY, (1, 4, 4, 3)), (64, 4, 4, 3))

    def spread(strength):
        return reg.color_jitter(KEY, image, brightness=strength, contrast=strength, hue=0.1)

    out = jax.jit(spread)(0.4)
    assert float(jnp.std(out, axis=0).mean()) > 0.01
    assert np.all((np.asarray(out) >= 0) & (np.asarray(out) <= 1))


def test_noise_and_scaling_follow_their_strengths():
    x = jnp.ones((3, 20_000))
    noisy = reg.input_noise(KEY, x, jnp.array([0.0, 0.5, 2.0]))
    # Relative standard error of a standard deviation: 1/sqrt(2 * 20000) = 0.5 %; five of them.
    np.testing.assert_allclose(jnp.std(noisy, axis=1), [0.0, 0.5, 2.0], rtol=0.025)
    u = reg.input_scaling(KEY, jnp.ones((20_000, 2)), 0.25)
    np.testing.assert_array_equal(u[:, 0], u[:, 1])
    np.testing.assert_allclose([u.min(), u.max()], [0.8, 1.25], rtol=1e-3)
    slope = jax.grad(lambda s: jnp.sum(reg.input_noise(KEY, x, s)))(0.5)
    np.testing.assert_allclose(slope, jnp.sum(reg.input_noise(KEY, x, 1.0) - 1), rtol=1e-8)


def test_mixup_mixes_inputs_and_targets_alike():
    x = jax.random.normal(KEY, (64, 5))
    y = x[:, :2] * 3  # linear targets stay linear in the mixed inputs
    mixed_x, mixed_y = jax.jit(reg.mixup)(KEY, x, y, jnp.linspace(0.0, 1.0, 64))
    np.testing.assert_allclose(mixed_y, mixed_x[:, :2] * 3, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(mixed_x[0], x[0])
    assert float(jnp.max(jnp.abs(mixed_x[32:] - x[32:]))) > 0.1
    with pytest.raises(TypeError, match="one_hot"):
        reg.mixup(KEY, x, jnp.zeros(64, jnp.int32), 0.4)
    slope = jax.jit(jax.grad(lambda a: jnp.sum(reg.mixup(KEY, x, y, a)[0] ** 2)))
    assert float(slope(0.0)) == 0 and np.isfinite(slope(0.5)) and float(slope(0.5)) != 0


def test_label_smoothing_formula():
    y = jnp.eye(4)[:3]
    out = reg.label_smoothing(y, jnp.array([0.0, 0.1, 1.0]))
    np.testing.assert_allclose(out[1], [0.025, 0.925, 0.025, 0.025])
    np.testing.assert_allclose(out[2], 0.25)
    np.testing.assert_allclose(out.sum(-1), 1.0)


def test_activation_penalties_formula():
    h = jax.random.normal(KEY, (3, 4, 5))
    a = jnp.array([0.0, 1.0, 2.0])
    expected = sum(float(a[i]) * float(jnp.sum(h[i] ** 2)) for i in range(3)) / 60
    np.testing.assert_allclose(reg.activation_penalty(h, a), expected)
    steps = sum(float(a[i]) * float(jnp.sum((h[i, 1:] - h[i, :-1]) ** 2)) for i in range(3)) / 45
    np.testing.assert_allclose(reg.temporal_activation_penalty(h, a), steps)
    with pytest.raises(ValueError, match="needs two"):
        reg.temporal_activation_penalty(h[:, :1], 1.0)


@pytest.mark.parametrize("level", ["tensor", "unit", "weight"])
@pytest.mark.parametrize("penalty", [reg.l1_penalty, reg.l2_penalty])
def test_penalties_of_every_level_equal_one_strength_for_all(level, penalty):
    params = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3) - 2, "bias": jnp.ones(3)}}
    log = reg.penalty_init(params, 0.3, level, leaves="kernel")
    assert list(log) == ["['dense']['kernel']"]
    size = {"tensor": 1, "unit": 3, "weight": 6}[level]
    assert jax.tree.leaves(log)[0].size == size
    one = penalty(params, np.log(0.3), leaves="kernel")
    np.testing.assert_allclose(penalty(params, log), one, rtol=1e-12)
    kernel = np.asarray(params["dense"]["kernel"])
    closed = 0.15 * (kernel**2).sum() if penalty is reg.l2_penalty else 0.3 * abs(kernel).sum()
    np.testing.assert_allclose(one, closed, rtol=1e-12)
    grads = jax.grad(lambda s: penalty(params, s))(log)
    np.testing.assert_allclose(sum(jnp.sum(g) for g in grads.values()), closed, rtol=1e-12)


def test_penalties_name_what_is_missing():
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="no leaf has 'kernel'"):
        reg.l2_penalty(params, 0.0, leaves="kernel")
    with pytest.raises(ValueError, match="shape"):
        reg.l2_penalty(params, {"['w']": jnp.zeros(2)})
    with pytest.raises(ValueError, match="names"):
        reg.l2_penalty(params, {"['v']": 0.0})
    with pytest.raises(ValueError, match="level"):
        reg.penalty_init(params, 1.0, "row")


def test_hue_is_in_turns():
    """Chroma turns by an angle drawn from the whole of (-j, j) turns: half of it is too little."""
    images = jnp.broadcast_to(jnp.array([0.8, 0.3, 0.2]), (512, 1, 1, 3))
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    for strength in (0.1, 0.25):
        out = jitter(jax.random.key(4), images, hue=strength, clip=False)
        before, after = (np.asarray(x)[:, 0, 0] @ to_yiq[1:].T for x in (images, out))
        cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
        turns = np.arctan2(cross, np.sum(before * after, axis=1)) / (2 * np.pi)
        assert np.abs(turns).max() <= strength + 1e-6
        # The largest of 512 uniform draws is above 0.98 of its range but once in 30,000 times.
        assert turns.max() > 0.96 * strength and turns.min() < -0.96 * strength


def _kinks():
    """Least squares of 60 examples in 8 dimensions, three of which do nothing; and validation."""
    keys = jax.random.split(jax.random.key(1), 6)
    x, xv = jax.random.normal(keys[0], (60, 8)), jax.random.normal(keys[2], (40, 8))
    weights = jnp.array([1.0, -1.0, 0.5, 0, 0, 0.8, -0.6, 0])
    y = x @ weights + 0.5 * jax.random.normal(keys[1], (60,))
    yv = xv @ weights + 0.5 * jax.random.normal(keys[3], (40,))
    return (x, y), (xv, yv), jnp.linalg.eigvalsh(x.T @ x / 60)[-1]


def _fit(w, hparams, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def _stacked(batch, steps):
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (steps, *a.shape)), batch)


# Central differences of the problem solved by proximal gradients to 1e-16, printed to 5 digits.
LASSO = [0.03869, 0.06521, 0.09196, 0, 0, 0.1337, 0.14258, 0]


def test_the_two_right_ways_through_an_l1_penalty_and_the_wrong_one():
    training, validation, curvature = _kinks()
    log = jnp.full(8, -1.5) + jnp.linspace(-0.3, 0.6, 8)

    # As in the docstring of `l1_penalty`.
    def proximal(log_strength, step_size):
        def update(updates, state, params):
            moved = optax.apply_updates(params, updates)
            kept = jnp.abs(moved) - step_size * jnp.exp(log_strength)
            return jnp.sign(moved) * jnp.maximum(kept, 0) - params, state

        soft = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
        return optax.chain(optax.sgd(step_size), soft)

    # The slowest direction contracts by 1 - 0.24: 0.76^400 is below any rounding.
    response = bilevel.Unroll(lambda h: proximal(h, 1 / curvature), 400)
    unrolled = bilevel.hypergrad_solve(
        _fit, _fit, response, jnp.zeros(8), log,
        inner_batch=_stacked(training, 400), outer_batch=validation,
    )  # fmt: skip
    np.testing.assert_allclose(unrolled.grads, LASSO, atol=5.1e-6)  # as printed
    support = np.flatnonzero(unrolled.params)
    assert list(support) == [0, 1, 2, 5, 6]

    def lasso(w, h, batch):
        return _fit(w, h, batch) + reg.l1_penalty(w, {"": h})

    restricted = bilevel.hypergrad_solve(
        _fit, lasso,
        bilevel.Implicit(bilevel.Dense()), unrolled.params[support], log[support],
        inner_batch=(training[0][:, support], training[1]),
        outer_batch=(validation[0][:, support], validation[1]),
    )  # fmt: skip
    assert restricted.result == bilevel.Status.ok
    np.testing.assert_allclose(restricted.grads, unrolled.grads[support], rtol=1e-9)

    # What the docstring warns of: wrong in every component, and far from stationary.
    wrong = bilevel.hypergrad_solve(
        _fit, lasso, bilevel.Implicit(bilevel.Dense()), unrolled.params, log,
        inner_batch=training, outer_batch=validation,
    )  # fmt: skip
    assert (np.abs(wrong.grads - np.array(LASSO)) > 1e-3).all()
    assert wrong.stats["stationarity"] > 0.1


def test_weights_that_must_not_be_negative_by_a_projected_step():
    training, validation, curvature = _kinks()
    log = jnp.float64(-1.0)

    def inner(w, h, batch):
        return _fit(w, h, batch) + reg.l2_penalty(w, h)

    step = 1 / (curvature + jnp.exp(log))
    tx = optax.chain(optax.sgd(step), optax.keep_params_nonnegative())
    solution = bilevel.hypergrad_solve(
        _fit, inner, bilevel.Unroll(tx, 400), jnp.ones(8), log,
        inner_batch=_stacked(training, 400), outer_batch=validation,
    )  # fmt: skip
    # Central differences of 4000 projected steps, printed to six digits.
    np.testing.assert_allclose(solution.grads, 0.0950123, rtol=1e-6)
    assert (solution.params >= 0).all() and (solution.params == 0).sum() == 5
