"""Bounds: inverse, gradient, dtype, transforms, and every message."""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Free, Integer, Interval, Positive, Simplex, Space

BOUNDS = {
    "free": (Free(), [-3.0, 0.0, 7.5]),
    "positive": (Positive(), [1e-6, 1.0, 50.0]),
    "interval": (Interval(-2.0, 3.0), [-1.99, 0.1, 2.5]),
    "integer": (Integer(1, 8), [0.75, 3.0, 8.25]),
    "simplex": (Simplex(), [0.2, 0.7, 0.1]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_unconstrain_is_the_inverse_and_the_gradient_matches_differences(name):
    bound, values = BOUNDS[name]
    space = Space({"x": bound})
    hparams = {"x": jnp.array(values)}
    raw = jax.jit(space.unconstrain)(hparams)
    back = space.constrain(raw)["x"]
    # A few roundings of numbers of size 1, amplified by at most 500, the nearness of an end.
    np.testing.assert_allclose(back, values, rtol=1e-12)

    def scalar(raw):
        return jnp.sum(jnp.sin(space.constrain(raw)["x"]))

    gradient = jax.grad(scalar)(raw)["x"]
    step = 1e-6
    for i in range(3):
        e = jnp.zeros(3).at[i].set(step)
        slope = (scalar({"x": raw["x"] + e}) - scalar({"x": raw["x"] - e})) / (2 * step)
        # Central differences: error of order step^2 plus rounding over step, 1e-16 / 1e-6.
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-7, atol=1e-9)


def test_values_stay_inside_for_any_raw():
    raw = {
        "p": jnp.array([-50.0, 50.0]),
        "i": jnp.array([-30.0, 30.0]),
        "s": jnp.array([-9.0, 9.0]),
    }
    space = Space({"p": Positive(), "i": Interval(2.0, 4.0), "s": Simplex()})
    value = space.constrain(raw)
    assert (value["p"] > 0).all()
    assert (value["i"] > 2).all() and (value["i"] < 4).all()
    np.testing.assert_allclose(value["s"].sum(), 1.0, rtol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtype_is_kept_and_the_inverse_holds_to_its_rounding(dtype):
    space = Space({"p": Positive(), "i": Interval(0.0, 1.0), "n": Integer(0, 9), "s": Simplex()})
    hparams = {
        "p": jnp.array([1e-3, 2.0], dtype),
        "i": jnp.array(0.3, dtype),
        "n": jnp.array(4.0, dtype),
        "s": jnp.array([0.25, 0.75], dtype),
    }
    raw = space.unconstrain(hparams)
    back = space.constrain(raw)
    for name, value in hparams.items():
        assert raw[name].dtype == back[name].dtype == dtype
        # raw is rounded to eps |raw|, which exp turns into a relative error of |raw| <= 7 eps.
        np.testing.assert_allclose(
            np.float64(back[name]), np.float64(value), rtol=8 * float(jnp.finfo(dtype).eps)
        )


def test_integer_rounds_to_its_range():
    space = Space({"k": Integer(1, 4), "x": Free()})
    rounded = space.round({"k": jnp.array([0.6, 2.4, 2.6, 4.49]), "x": jnp.array(0.3)})
    np.testing.assert_array_equal(rounded["k"], [1, 2, 3, 4])
    np.testing.assert_array_equal(rounded["x"], 0.3)


def test_integer_rounds_values_beyond_its_range_to_its_ends():
    # Values of the user's own, and halves: 0.5 and 7.5 round to the even numbers 0 and 8.
    values = jnp.array([-7.0, 0.5, 7.5, 99.0])
    for rounded in (Integer(1, 7).round(values), Space(Integer(1, 7)).round(values)):
        np.testing.assert_array_equal(rounded, [1, 1, 7, 7])


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]
ENDS = {  # name: (bound, lower end, upper end), open
    "positive": (Positive(), 0.0, np.inf),
    "interval": (Interval(0.1, 0.95), 0.1, 0.95),
    "near_zero": (Interval(0.0, 1e-6), 0.0, 1e-6),
    "negative": (Interval(-3.0, 0.0), -3.0, 0.0),
    "huge": (Interval(-3e38, 3e38), -3e38, 3e38),
    "integer": (Integer(1, 199), 0.5, 199.5),
    "simplex": (Simplex(), 0.0, 1.0),
}


@jax.jit
def _through_the_bounds(raw):
    space = Space({name: bound for name, (bound, _, _) in ENDS.items()})
    value, back = jax.vjp(space.constrain, raw)
    alone = {name: bound.constrain(raw[name]) for name, (bound, _, _) in ENDS.items()}
    return value, alone, space.unconstrain(value), back(jax.tree.map(jnp.ones_like, value))[0]


EXTREMES = [0.0, 20.0, 40.0, 88.7, 88.9, 200.0, 710.0, 6e4, 1e30, 3.3e38]
RAWS = st.lists(
    st.one_of(
        st.sampled_from([sign * x for x in EXTREMES for sign in (1, -1)]),
        st.floats(-60, 60),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    min_size=6,
    max_size=6,
)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(raws=RAWS)
def test_every_finite_raw_stays_strictly_inside_in_every_dtype(dtype, raws):
    greatest = float(jnp.finfo(dtype).max)
    raw = jnp.sort(jnp.clip(jnp.array(raws), -greatest, greatest).astype(dtype))
    value, alone, again, slope = _through_the_bounds({name: raw for name in ENDS})
    for name, (_, lo, hi) in ENDS.items():
        assert value[name].dtype == dtype
        for found in (value[name], alone[name]):
            found = np.asarray(found, np.float64)
            if name == "simplex":
                assert (found > 0).all() and (found <= 1).all()
                # Each weight is rounded once, by eps/2 of itself: eps/2 of the sum.
                np.testing.assert_allclose(found.sum(), 1.0, atol=float(jnp.finfo(dtype).eps))
            else:
                assert (found > lo).all() and (found < hi).all()
            # Neighbours may swap by the rounding of the formula; three operations of it.
            size = np.maximum(np.abs(found[1:]), max(0.0, -lo))
            assert (np.diff(found) >= -3 * float(jnp.finfo(dtype).eps) * size).all()
        assert np.isfinite(np.asarray(again[name], np.float64)).all()
        assert not np.isnan(np.asarray(slope[name], np.float64)).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ordinary_raws_give_the_bits_of_the_formula(dtype):
    raw = jnp.linspace(-9.0, 9.0, 37, dtype=dtype)
    expected = {
        "positive": (Positive(), jnp.exp(raw)),
        "interval": (Interval(0.1, 0.95), 0.1 + (0.95 - 0.1) * jax.nn.sigmoid(raw)),
        "integer": (Integer(0, 3), -0.5 + 4.0 * jax.nn.sigmoid(raw)),
        "simplex": (Simplex(), jax.nn.softmax(raw)),
    }
    for bound, value in expected.values():
        np.testing.assert_array_equal(bound.constrain(raw), value)


def test_a_value_that_rounds_to_an_end_keeps_the_slope_of_the_formula():
    raw = jnp.bfloat16(8.0)  # 0.99966, which is 1 in bfloat16
    for constrain in (Space(Interval(0.0, 1.0)).constrain, Interval(0.0, 1.0).constrain):
        value, slope = jax.value_and_grad(constrain)(raw)
        assert float(value) == 1 - 2**-8
        # 1 - s has lost four digits of seven in float32; the result is rounded to bfloat16.
        np.testing.assert_allclose(np.float64(slope), np.exp(-8.0), rtol=2**-8 + 1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_raw_that_is_not_finite_gives_nan_and_not_an_end(bad):
    raw = jnp.array([bad, 0.5])
    for bound in (Positive(), Interval(0, 1), Integer(0, 3), Simplex()):
        assert np.isnan(bound.constrain(raw)[0])


def test_whole_numbers_that_a_dtype_cannot_tell_apart_are_refused():
    most = {jnp.bfloat16: 2**8, jnp.float16: 2**11, jnp.float32: 2**24, jnp.float64: 2**53}
    for dtype, hi in most.items():
        # All whole numbers up to the last can be constrained to, ends included.
        space = Space(Integer(0, hi))
        ends = jnp.array([0.0, hi], dtype)
        np.testing.assert_array_equal(space.round(space.constrain(space.unconstrain(ends))), ends)
        assert np.isfinite(np.asarray(space.unconstrain(ends), np.float64)).all()
        for move in ("constrain", "unconstrain", "round"):
            with pytest.raises(ValueError, match=r"hparams\['k'\] has dtype .*cannot tell whole"):
                getattr(Space({"k": Integer(0, 2 * hi)}), move)({"k": jnp.ones((), dtype)})
    with pytest.raises(ValueError, match="cannot tell whole numbers beyond 2"):
        Integer(-(2**25), 0).constrain(jnp.float32(0))


def test_ends_that_a_dtype_cannot_hold_are_refused():
    one = jnp.ones((), jnp.float32)
    with pytest.raises(ValueError, match=r"hparams has dtype float32, whose numbers do not reach"):
        Space(Interval(0, 1e300)).constrain(one)
    with pytest.raises(ValueError, match=r"fewer than two numbers strictly inside `Interval\(1, "):
        Space(Interval(1, 1 + 1e-8)).constrain(one)
    # 0.1 is above 0.1 in float32, but nothing is left of the difference: the logit is infinite.
    with pytest.raises(ValueError, match=r"contains 0.1, outside its bounds: .*in float32: from"):
        Space(Interval(0.1, 1)).unconstrain(jnp.float32(0.1))


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


def test_bounds_are_a_prefix_of_any_tree():
    hparams = {"net": {"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}, "pair": [0.5, 0.25]}
    space = Space({"net": Positive(), "pair": (Interval(0, 1), Free())})
    raw = space.unconstrain(hparams)
    np.testing.assert_allclose(raw["net"]["w"], np.log([1.0, 2.0]))
    np.testing.assert_allclose(raw["pair"][0], 0.0)
    np.testing.assert_allclose(raw["pair"][1], 0.25)
    assert jax.tree.structure(raw) == jax.tree.structure(hparams)
    np.testing.assert_allclose(Space(Positive()).constrain(raw)["net"]["b"], 3.0)
    named = Space(Pair(a=Interval(0, 1), b=Free())).unconstrain(Pair(a=0.5, b=0.25))
    np.testing.assert_allclose([named.a, named.b], [0.0, 0.25])
    lanes = jax.vmap(Space(Positive()).unconstrain)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(lanes, np.log([1.0, 2.0]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Interval(1.0, 1.0), ValueError, r"needs lo < hi, got lo=1.0 and hi=1.0"),
        (lambda: Interval(3, 2), ValueError, "swap them"),
        (lambda: Interval(0.0, float("inf")), ValueError, "`hi` must be finite"),
        (lambda: Interval(float("nan"), 1.0), ValueError, "`lo` must be finite"),
        (lambda: Interval("a", 1.0), TypeError, "`lo` must be a real number"),
        (lambda: Interval(None, 1.0), TypeError, "`lo` must be a real number .*got None"),
        (lambda: Interval(0, 1j), TypeError, "`hi` must be a real number"),
        (lambda: Interval(0, np.complex64(1)), TypeError, "`hi` must be a real number"),
        (lambda: Interval(False, True), TypeError, "`lo` must be a real number .*got False"),
        (lambda: Interval(0, jnp.array(True)), TypeError, "`hi` must be a real number"),
        (lambda: Interval(0, jnp.ones(2)), TypeError, "`hi` must be a real number"),
        (lambda: Interval(jnp.array(-np.inf), 0.0), ValueError, "`lo` must be finite"),
        (lambda: Interval(0, 10**400), ValueError, "`hi` must be finite"),
        (
            lambda: jax.eval_shape(lambda x: Interval(0, x).constrain(x), jnp.ones(())),
            TypeError,
            "`hi` must be a real number known in advance",
        ),
        (lambda: Integer(True, 3), TypeError, "`lo` must be a Python int"),
        (lambda: Integer("1", 3), TypeError, "`lo` must be a Python int"),
        (lambda: Integer(0, jnp.array(3)), TypeError, "`hi` must be a Python int"),
        (lambda: Integer(0, float("inf")), TypeError, "`hi` must be a Python int"),
        (lambda: Space(None), TypeError, "`bounds` is None, expected"),
        (lambda: Space("positive"), TypeError, "`bounds` is 'positive', expected"),
        (lambda: Space(["positive"]), TypeError, r"`bounds`\[0\] is 'positive', expected"),
        (lambda: Space({"a": object()}), TypeError, r"`bounds`\['a'\] is <object"),
        (lambda: Space({"a": float("nan")}), TypeError, r"`bounds`\['a'\] is nan"),
        (lambda: Space({"a": {}}), ValueError, "is empty"),
        (lambda: Integer(3, 3), ValueError, "holds one value only"),
        (lambda: Integer(5, 3), ValueError, "needs lo < hi"),
        (lambda: Integer(0.5, 3), TypeError, "`lo` must be a Python int"),
        (lambda: Space({}), ValueError, "is empty"),
        (lambda: Space({"a": 3.0}), TypeError, r"`bounds`\['a'\] is 3.0"),
        (lambda: Space({"a": Positive}), TypeError, "expected `Free"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("bound", "value", "message"),
    [
        (Positive(), 0.0, r"hparams\['x'\] contains 0.0, outside its bounds: expected greater"),
        (Positive(), [1.0, -2.0], "contains -2.0"),
        (Interval(0, 1), 1.0, "strictly between 0 and 1"),
        (Integer(1, 3), 3.5, "strictly between 0.5 and 3.5"),
        (Simplex(), [0.5, 0.0, 0.5], "weights greater than 0"),
        (Simplex(), [0.5, 0.6], "sums to 1.1"),
        (Simplex(), 1.0, "last axis of at least 2"),
        (Free(), float("nan"), "is not finite"),
        (Positive(), float("inf"), "is not finite"),
        (Positive(), np.float32(1e-40), "outside its bounds: expected greater than 0"),
    ],
)
def test_values_outside_their_bounds_are_refused(bound, value, message):
    with pytest.raises(ValueError, match=message):
        Space({"x": bound}).unconstrain({"x": jnp.array(value)})


def test_names_that_do_not_match_are_refused():
    space = Space({"a": Free(), "b": {"c": Positive()}})
    one = jnp.ones(())
    with pytest.raises(ValueError, match=r"no bound for hparams\['z'\]"):
        space.constrain({"a": one, "b": {"c": one}, "z": one})
    with pytest.raises(ValueError, match=r"names hparams\['b'\]\['c'\], which `hparams` does not"):
        space.constrain({"a": one})
    with pytest.raises(ValueError, match=r"hparams\['b'\] is an array, but"):
        space.constrain({"a": one, "b": one})
    with pytest.raises(TypeError, match=r"hparams\['a'\] has dtype int.*write 3.0"):
        space.constrain({"a": 3, "b": {"c": one}})
    with pytest.raises(ValueError, match=r"no bound for hparams\[1\]"):
        Space((Free(),)).constrain((one, one))


@pytest.mark.parametrize("move", ["constrain", "unconstrain", "round"])
@pytest.mark.parametrize(
    ("bound", "value", "error", "message"),
    [
        (Free(), "abc", TypeError, r"hparams\['x'\] is 'abc' of type str, expected an array"),
        (Free(), object(), TypeError, r"hparams\['x'\] is <object .* expected an array"),
        (Free(), None, ValueError, r"names hparams\['x'\], .*`None` is not one"),
        (Free(), True, TypeError, r"hparams\['x'\] has dtype bool, expected .*: convert it"),
        (Free(), 1j, TypeError, r"hparams\['x'\] has dtype complex128, expected .*: convert it"),
        (Free(), np.array(["a"]), TypeError, r"hparams\['x'\] has dtype <U1, expected"),
        (Free(), jax.random.key(0), TypeError, r"hparams\['x'\] has dtype key<fry>, expected"),
    ],
)
def test_hyperparameters_that_are_no_numbers_are_named(move, bound, value, error, message):
    with pytest.raises(error, match=message):
        getattr(Space({"x": bound}), move)({"x": value})


def test_a_simplex_of_one_weight_is_refused_where_only_shapes_are_known():
    for shape in ((), (1,), (3, 1)):
        for move in (Space(Simplex()).constrain, Space(Simplex()).unconstrain):
            with pytest.raises(ValueError, match="last axis of at least 2"):
                jax.eval_shape(move, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_ends_may_be_any_real_numbers():
    half = Interval(Fraction(0), jnp.array(1.0))
    assert half == Interval(0, 1.0) and hash(half) == hash(Interval(0, 1.0))
    np.testing.assert_array_equal(half.constrain(jnp.zeros(2)), 0.5)
