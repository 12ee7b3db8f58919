"""Bounds: inverse, gradient, dtype, transforms, and every message."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
