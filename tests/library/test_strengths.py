"""Regularizers given what they cannot use: refused where it is known, NaN where it is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import regularizers as reg

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (3, 4, 4, 3), jnp.float32)
ROWS = IMAGES.reshape(3, -1)
STEPS = IMAGES.reshape(3, 4, 12)


def _color(name):
    return lambda x, s, key=KEY: reg.color_jitter(key, x, **{name: s})


# name: (function of array and strength, the array, its argument, the strength's argument, a legal
# strength, the first illegal one above (None: only infinity), whether it has a derivative)
CASES = {
    "dropout": (lambda x, s, key=KEY: reg.dropout(key, x, s), ROWS, "x", "rate", 0.3, 1.0, False),
    "locked_dropout": (
        lambda x, s, key=KEY: reg.locked_dropout(key, x, s), STEPS, "x", "rate", 0.3, 1.0, False
    ),
    "embedding_dropout": (
        lambda x, s, key=KEY: reg.embedding_dropout(key, x, jnp.arange(3)[:, None], s),
        ROWS, "table", "rate", 0.3, 1.0, False,
    ),
    "input_noise": (
        lambda x, s, key=KEY: reg.input_noise(key, x, s), ROWS, "x", "std", 0.3, None, True
    ),
    "input_scaling": (
        lambda x, s, key=KEY: reg.input_scaling(key, x, s), ROWS, "x", "strength", 0.3, None, True
    ),
    "mixup": (
        lambda x, s, key=KEY: reg.mixup(key, x, x, s)[0], ROWS, "x", "alpha", 0.3, None, True
    ),
    "cutout holes": (
        lambda x, s, key=KEY: reg.cutout(key, x, s, 2.0, max_holes=2),
        IMAGES, "images", "holes", 1.0, 3.0, False,
    ),
    "cutout length": (
        lambda x, s, key=KEY: reg.cutout(key, x, 1.0, s, max_holes=2),
        IMAGES, "images", "length", 2.0, None, False,
    ),
    "hue": (_color("hue"), IMAGES, "images", "hue", 0.3, 0.500001, True),
    "label_smoothing": (
        lambda x, s: reg.label_smoothing(x, s), ROWS, "targets", "amount", 0.3, 1.00001, True
    ),
}  # fmt: skip
SCALARS = {  # those that give one number, and those that take one strength
    "weight_drop": (
        lambda x, s, key=KEY: reg.weight_drop(key, x, s), ROWS, "kernel", "rate", 0.3, 1.0, False
    ),
    "activation_penalty": (
        lambda x, s: reg.activation_penalty(x, s),
        STEPS, "activations", "strength", 0.3, None, True,
    ),
    "temporal_activation_penalty": (
        lambda x, s: reg.temporal_activation_penalty(x, s),
        STEPS, "activations", "strength", 0.3, None, True,
    ),
}  # fmt: skip
ALL = CASES | SCALARS
PENALTIES = [name for name in ALL if "penalty" in name]
DRAWS = [name for name in ALL if name not in ("label_smoothing", "cutout length", *PENALTIES)]
# Compiled once for a strength per example and once for one strength, by whichever test is first.
RUN = {name: jax.jit(case[0]) for name, case in ALL.items()}


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.bool_, jnp.complex64])
@pytest.mark.parametrize("name", ALL)
def test_arrays_that_cannot_hold_the_result_are_refused(name, dtype):
    function, x, array, _, legal, _, _ = ALL[name]
    message = rf"`{array}` must be .*real.*{jnp.dtype(dtype)}.*(astype|one_hot)"
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(lambda x: function(x, legal), jax.ShapeDtypeStruct(x.shape, dtype))


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_array_is_refused(name):
    function, _, array, _, legal, _, _ = ALL[name]
    for bad in ("text", 3.0, object()):
        with pytest.raises(TypeError, match=rf"`{array}` must be an array of floating-point"):
            function(bad, legal)


@pytest.mark.parametrize("name", DRAWS)
def test_keys_of_every_kind(name):
    function, x, _, _, legal, _, _ = ALL[name]
    jax.eval_shape(function, x, legal, jax.random.key_data(KEY))
    for bad in (0, 0.5, "key", jnp.zeros(2), jnp.zeros(2, jnp.int32), jnp.uint32(3)):
        with pytest.raises(TypeError, match=r"`key` must be a JAX random key, got"):
            function(x, legal, bad)
    with pytest.raises(ValueError, match=r"`key` is missing: .* Pass `key=jax.random.key"):
        function(x, legal, None)
    for several in (jax.random.split(KEY, 3), jax.random.key_data(jax.random.split(KEY, 3))):
        with pytest.raises(ValueError, match=r"`key` has shape .*`jax.vmap`"):
            function(x, legal, several)


@pytest.mark.parametrize("name", ALL)
def test_known_strengths_that_are_impossible_are_refused(name):
    function, x, _, strength, legal, above, _ = ALL[name]
    for bad in (np.nan, np.inf, -np.inf, -0.001, *([] if above is None else [above])):
        for kind in (float, jnp.float32, np.float64):
            with pytest.raises(ValueError, match=rf"`{strength}` must lie in \[0, .*, got"):
                function(x, kind(bad))
        if name in CASES:
            with pytest.raises(ValueError, match=rf"`{strength}` must lie in \[0, "):
                function(x, jnp.array([legal, bad, legal]))
    for bad in (None, "a", 1j, True, jnp.array(True), jnp.complex64(1), [0.1, 0.1, 0.1]):
        with pytest.raises(
            (TypeError, ValueError), match=rf"`{strength}`.*must be a (real|scalar)"
        ):
            function(x, bad)
    with pytest.raises(ValueError, match=rf"`{strength}`"):
        function(x, jnp.full(2, legal))


def test_a_rate_is_judged_as_the_program_computes_it():
    # In float32 this is 1, and a mask of zeros only would have a mean of 0.
    with pytest.raises(ValueError, match=r"`rate` must lie in \[0, 1\)"):
        reg.dropout(KEY, ROWS, np.float32(0.999999999))
    with pytest.raises(ValueError, match=r"`std` must lie in \[0, inf\), got 1000"):
        reg.input_noise(KEY, ROWS, 10**400)


@pytest.mark.parametrize("name", ALL)
def test_traced_strengths_that_are_impossible_give_nan_and_no_plausible_number(name):
    function, x, _, _, legal, above, differentiable = ALL[name]
    worst = np.inf if above is None else above
    run = RUN[name]
    if name in CASES:
        for bad in (worst, -0.001, np.nan):
            out = np.asarray(run(x, jnp.array([legal, bad, legal], jnp.float32)))
            assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1]).all()
    for bad in (worst, -0.001, np.nan):
        assert np.isnan(run(x, jnp.float32(bad))).all()
    slope = jax.jit(jax.grad(lambda s: jnp.sum(function(x, s))))
    assert np.isnan(slope(jnp.float32(-0.001))) == differentiable
    # Where no derivative exists, none is made up.
    assert np.isfinite(slope(jnp.float32(legal))) and (differentiable or slope(legal) == 0)


def test_each_color_strength_is_checked_and_marked():
    names = ("brightness", "contrast", "saturation", "hue")

    @jax.jit
    def run(values):
        return reg.color_jitter(KEY, IMAGES, **dict(zip(names, values, strict=True)))

    assert np.isfinite(run(jnp.full((4, 3), 0.3, jnp.float32))).all()
    for i, name in enumerate(names):
        for bad in (np.nan, np.inf, -0.01):
            out = np.asarray(run(jnp.full((4, 3), 0.3, jnp.float32).at[i, 1].set(bad)))
            assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1]).all()
            with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0, "):
                reg.color_jitter(KEY, IMAGES, **{name: bad})


@pytest.mark.parametrize("name", CASES)
def test_one_strength_per_example_acts_on_its_example_alone(name):
    _, x, _, _, legal, _, _ = CASES[name]
    each = jnp.array([0.0, legal, legal / 2], jnp.float32)
    together = RUN[name](x, each)
    first = x[:1] if name == "embedding_dropout" else x[0]
    np.testing.assert_allclose(together[0], first, atol=1e-6)
    if name != "embedding_dropout":  # which draws one vocabulary for each sequence
        for i in range(3):
            alone = RUN[name](x, each[i])[i]
            np.testing.assert_allclose(together[i], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_rounds_once_at_the_end(name):
    _, x, _, _, legal, _, _ = ALL[name]
    half, legal = x.astype(jnp.bfloat16), jnp.float32(legal)
    out, wide = RUN[name](half, legal), RUN[name](half.astype(jnp.float32), legal)
    assert out.dtype == (jnp.float32 if name in PENALTIES else jnp.bfloat16)  # sums stay wide
    np.testing.assert_array_equal(out, wide.astype(out.dtype))


@pytest.mark.parametrize("size", [1, 0])
def test_batches_of_one_and_of_none(size):
    for name, (function, x, _, _, legal, _, _) in CASES.items():
        for strength in (legal, jnp.full(size, legal)):
            if name == "embedding_dropout":
                tokens = jnp.zeros((size, 5), jnp.int32)
                out = reg.embedding_dropout(KEY, x, tokens, strength)
                assert out.shape == (size, 5, 48)
            else:
                small = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
                shape = jax.eval_shape(function, small, strength).shape
                assert shape == small.shape


def test_means_of_nothing_are_refused():
    for penalty in (reg.activation_penalty, reg.temporal_activation_penalty):
        with pytest.raises(ValueError, match="`activations` is empty"):
            penalty(STEPS[:0], 1.0)


def test_wrong_ranks_are_refused():
    one = jnp.float32(1)
    for function, name in (
        (lambda: reg.input_scaling(KEY, one, 0.1), "x"),
        (lambda: reg.mixup(KEY, one, ROWS, 0.1), "x"),
        (lambda: reg.mixup(KEY, ROWS, one, 0.1), "targets"),
        (lambda: reg.label_smoothing(jnp.ones(3), 0.1), "targets"),
        (lambda: reg.cutout(KEY, ROWS, 1, 1, max_holes=1), "images"),
        (lambda: reg.cutout(KEY, IMAGES[None], 1, 1, max_holes=1), "images"),
        (lambda: reg.color_jitter(KEY, ROWS), "images"),
        (lambda: reg.color_jitter(KEY, IMAGES[..., :1]), "images"),
        (lambda: reg.embedding_dropout(KEY, ROWS[0], jnp.arange(3), 0.1), "table"),
        (lambda: reg.embedding_dropout(KEY, STEPS, jnp.arange(3), 0.1), "table"),
        (lambda: reg.cutout_mask(KEY, (3, 4), 1, 1, max_holes=1), "shape"),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must (have shape|be) \("):
            function()
    with pytest.raises(TypeError, match="`shape` must be a tuple"):
        reg.dropout_mask(KEY, 3, 0.1)


def test_axes_out_of_range_or_named_twice_are_refused():
    for axis in (3, 5, -4):
        for function in (
            lambda axis: reg.locked_dropout(KEY, STEPS, 0.1, time_axis=axis),
            lambda axis: reg.temporal_activation_penalty(STEPS, 0.1, time_axis=axis),
        ):
            with pytest.raises(ValueError, match=rf"`time_axis` names axis {axis} of an array"):
                function(axis)
        with pytest.raises(ValueError, match=rf"`broadcast_axes` names axis {axis} of an array"):
            reg.dropout(KEY, STEPS, 0.1, broadcast_axes=(1, axis))
    for twice in ((1, 1), (1, -2)):
        with pytest.raises(ValueError, match="`broadcast_axes` names an axis twice"):
            reg.dropout(KEY, STEPS, 0.1, broadcast_axes=twice)
    for bad in (1, "a", (1.0,), None):
        with pytest.raises(TypeError, match="`broadcast_axes` must name axes by whole numbers"):
            reg.dropout(KEY, STEPS, 0.1, broadcast_axes=bad)
    np.testing.assert_array_equal(
        reg.locked_dropout(KEY, STEPS, 0.5, time_axis=-2), reg.locked_dropout(KEY, STEPS, 0.5)
    )


def test_time_in_front_leaves_no_axis_for_strengths_per_example():
    one_each = jnp.array([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="leading axis .* steps and not examples"):
        reg.temporal_activation_penalty(STEPS, one_each, time_axis=0)
    with pytest.raises(ValueError, match="leading axis shares one draw"):
        reg.locked_dropout(KEY, STEPS, one_each, time_axis=-3)
    np.testing.assert_allclose(
        reg.temporal_activation_penalty(STEPS.swapaxes(0, 1), 0.3, time_axis=0),
        reg.temporal_activation_penalty(STEPS, 0.3),
        rtol=1e-6,
    )


def test_tokens_outside_the_table_are_refused_or_marked():
    for bad in (-1, 3):
        tokens = jnp.array([[0, 1], [bad, 2]])
        for known in (tokens, np.asarray(tokens)):
            with pytest.raises(ValueError, match=rf"`tokens` contains {bad}, .*expected 0 to 2"):
                reg.embedding_dropout(KEY, ROWS, known, 0.1)
        for rate in (0.0, jnp.zeros(2)):
            out = jax.jit(reg.embedding_dropout)(KEY, ROWS, tokens, rate)
            np.testing.assert_array_equal(out[0], ROWS[:2])
            np.testing.assert_array_equal(out[1, 1], ROWS[2])
            assert np.isnan(out[1, 0]).all()
    for bad in (jnp.zeros((2, 2)), None, [0, 1]):
        with pytest.raises(TypeError, match="`tokens` must be an array of integers"):
            reg.word_mask(KEY, 3, bad, 0.1)
    # 8 bits hold no 300, but every token of theirs is in such a table.
    tokens = jnp.array([[0, 255]], jnp.uint8)
    for run in (reg.word_mask, jax.jit(reg.word_mask, static_argnums=1)):
        np.testing.assert_array_equal(run(KEY, 300, tokens, 0.0), jnp.ones((1, 2, 1)))


def test_mixup_names_the_arrays_that_do_not_match():
    with pytest.raises(ValueError, match=r"`targets` has 2 examples .*`x` has 3"):
        reg.mixup(KEY, ROWS, ROWS[:2], 0.3)
    with pytest.raises(ValueError, match=r"`x\['b'\]` has 2 examples .*`x\['a'\]` has 3"):
        reg.mixup(KEY, {"a": ROWS, "b": ROWS[:2]}, ROWS, 0.3)
    with pytest.raises(ValueError, match="`x` has no arrays"):
        reg.mixup(KEY, {}, ROWS, 0.3)
    with pytest.raises(TypeError, match=r"`x\['token'\]` must be an array of real .*got dtype int"):
        reg.mixup(KEY, {"token": jnp.arange(3)}, ROWS, 0.3)


def test_classes_of_a_row_share_their_smoothing():
    square = jnp.eye(3)
    with pytest.raises(ValueError, match="`amount` has shape"):
        reg.label_smoothing(square, jnp.full((3, 3), 0.1))
    out = reg.label_smoothing(jnp.stack([square] * 2), jnp.array([[0.0, 0.3, 0.6]] * 2))
    np.testing.assert_allclose(out.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(out[0, 1], [0.1, 0.8, 0.1], rtol=1e-6)


def test_masks_hold_factors_and_holes_hold_fills():
    with pytest.raises(TypeError, match="`dtype` of a mask must be a real floating-point"):
        reg.dropout_mask(KEY, (3,), 0.1, dtype=jnp.int32)
    out = reg.cutout(KEY, IMAGES, 2.0, 9.0, max_holes=2, fill=jnp.array([1.0, 2.0, 3.0]))
    hole = np.asarray(out)[np.asarray(out)[..., 2] == 3.0]
    assert len(hole) and (hole == [1.0, 2.0, 3.0]).all()
    for bad, error in (
        (np.nan, ValueError),
        (np.inf, ValueError),
        (None, TypeError),
        ("black", TypeError),
        (1j, TypeError),
        (jnp.ones(2), ValueError),
    ):
        with pytest.raises(error, match="`fill`"):
            reg.cutout(KEY, IMAGES, 1.0, 2.0, max_holes=1, fill=bad)
    with pytest.raises(ValueError, match="`fill` must be finite.*beyond float16"):
        reg.cutout(KEY, IMAGES.astype(jnp.float16), 1.0, 2.0, max_holes=1, fill=1e6)
    keep = jax.jit(lambda n: reg.cutout_mask(KEY, (3, 4, 4), n, 1.0, max_holes=1))
    assert not keep(jnp.float32(np.nan)).any() and keep(jnp.float32(0)).all()


PARAMS = {"w": jnp.ones((2, 3)), "steps": jnp.arange(3)}


@pytest.mark.parametrize("penalty", [reg.l1_penalty, reg.l2_penalty])
def test_penalties_refuse_strengths_and_leaves_that_make_no_sense(penalty):
    for bad in (np.nan, np.inf, -np.inf):
        for given in (bad, jnp.float32(bad), {"['w']": bad}, {"['w']": jnp.full(3, bad)}):
            with pytest.raises(ValueError, match=r"`log_strength\['w'\]` must be finite"):
                penalty(PARAMS, given, leaves="w")
    for bad in (None, "strong", 1j, True, {"['w']": None}, {"['w']": "a"}):
        with pytest.raises(TypeError, match=r"`log_strength\['w'\]` must be a real number"):
            penalty(PARAMS, bad, leaves="w")
    for leaves in (3, ["w", 3], None):
        with pytest.raises(TypeError, match="leaves"):
            penalty(PARAMS, 0.0, leaves=leaves)
    with pytest.raises(TypeError, match=r"`params`\['steps'\] is an array of dtype int"):
        penalty(PARAMS, 0.0)
    for given, leaves, message in (
        (0.0, [], "`leaves` is empty"),
        ({}, None, "`log_strength` is an empty dictionary"),
        (jnp.zeros(3), "w", "`log_strength` has shape"),
        ({3: 0.0}, None, "`log_strength` names 3, but"),
    ):
        with pytest.raises(ValueError, match=message):
            penalty(PARAMS, given, leaves=leaves)
    with pytest.raises(ValueError, match="`params` has no arrays"):
        penalty({}, 0.0)
    assert np.isnan(jax.jit(penalty)({"w": jnp.ones(3)}, jnp.nan))


def test_a_half_precision_log_strength_is_raised_to_float32_first():
    # exp(-20) is 0 in float16 and 2e-9 in float32.
    value = reg.l2_penalty(jnp.ones(4, jnp.float16), jnp.float16(-20.0))
    np.testing.assert_allclose(value, 2 * np.exp(-20.0), rtol=1e-5)


def test_penalty_init_refuses_strengths_and_levels_that_make_no_sense():
    for bad in (0.0, -1.0, np.nan, np.inf, jnp.float32(0)):
        with pytest.raises(ValueError, match="`strength` must be above 0 and finite"):
            reg.penalty_init(PARAMS, bad, leaves="w")
    for bad in (None, "1", 1j, True):
        with pytest.raises(TypeError, match="`strength` must be a real number"):
            reg.penalty_init(PARAMS, bad, leaves="w")
    with pytest.raises(ValueError, match=r"`strength` has shape \(3,\), expected one number"):
        reg.penalty_init(PARAMS, jnp.ones(3), leaves="w")
    for level in ("row", None, ["unit"]):
        with pytest.raises(ValueError, match="`level` must be one of"):
            reg.penalty_init(PARAMS, 1.0, level, leaves="w")
    with pytest.raises(TypeError, match=r"`params`\['steps'\]"):
        reg.penalty_init(PARAMS, 1.0)
    # The logarithm is taken in double precision: 1e-60 is 0 in float32.
    log = reg.penalty_init(jnp.ones(2, jnp.float32), 1e-60)
    np.testing.assert_allclose(jax.tree.leaves(log)[0], np.log(1e-60), rtol=1e-6)
