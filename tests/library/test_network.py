"""The weight-space response: its formula on any tree, any output axis, groups and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bilevel.inner.groups import draw_noise, fold_keys, split_batch
from bilevel.inner.network import StructuredParams, StructuredResponse, fan_in_uniform

KEY = jax.random.key(0)
HPARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(())}
PARAMS = {
    "dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)},
    "conv": jax.random.normal(KEY, (3, 3, 2, 5)),
    "gain": jnp.ones(()),
}


def _filled(phi: StructuredParams) -> StructuredParams:
    """The same response with random gains, so that it says something."""
    draw = {k: jax.random.normal(jax.random.fold_in(KEY, i), v.shape, v.dtype)
            for i, (k, v) in enumerate(phi.gains.items())}  # fmt: skip
    return phi._replace(gains=draw)


def test_every_leaf_follows_the_formula():
    network = StructuredResponse()
    phi = _filled(network.init(KEY, PARAMS, HPARAMS))
    d = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(1.5)}
    vector = np.array([0.3, -0.2, 1.5])
    out = network.apply(phi, PARAMS, d)
    for path, leaf, new in (
        ("['conv']", PARAMS["conv"], out["conv"]),
        ("['dense']['kernel']", PARAMS["dense"]["kernel"], out["dense"]["kernel"]),
    ):
        expected = np.array(leaf)
        for unit in range(leaf.shape[-1]):
            gate = vector @ np.array(phi.gains[path])[:, unit]
            expected[..., unit] += np.array(phi.weights[path])[..., unit] * gate
        np.testing.assert_allclose(new, expected, rtol=1e-12)
    np.testing.assert_allclose(
        out["dense"]["bias"], vector @ phi.gains["['dense']['bias']"], rtol=1e-12
    )
    np.testing.assert_allclose(out["gain"], 1 + (vector @ phi.gains["['gain']"])[0], rtol=1e-12)
    assert set(phi.weights) == {"['conv']", "['dense']['kernel']"}


def test_no_displacement_is_the_plain_model_bit_for_bit_and_still_has_a_slope():
    network = StructuredResponse()
    phi = _filled(network.init(KEY, PARAMS, HPARAMS))
    out = network.apply(phi, PARAMS, jax.tree.map(jnp.zeros_like, HPARAMS))
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(a, b)
    slope = jax.grad(lambda d: jnp.sum(network.apply(phi, PARAMS, d)["conv"]))(HPARAMS)
    assert bool(jnp.all(slope["a"] != 0)) and float(slope["b"]) != 0


def test_output_axes_first_several_and_by_path():
    kernel = {"w": jnp.ones((4, 3))}
    first = StructuredResponse(output_axes=0, gain_scale=1.0)
    phi = first.init(KEY, kernel, jnp.zeros(()))
    assert phi.gains["['w']"].shape == (1, 4) and phi.weights["['w']"].shape == (4, 3)
    out = first.apply(phi, kernel, jnp.array(2.0))["w"]
    expected = 1 + phi.weights["['w']"] * 2 * phi.gains["['w']"][0][:, None]
    np.testing.assert_allclose(out, expected, rtol=1e-12)

    heads = {"q": jnp.ones((6, 2, 5)), "o": jnp.ones((2, 5, 6))}
    network = StructuredResponse(
        output_axes=lambda path, shape: (-2, -1) if "q" in path else -1, gain_scale=1.0
    )
    phi = network.init(KEY, heads, jnp.zeros(()))
    assert phi.gains["['q']"].shape == (1, 10) and phi.gains["['o']"].shape == (1, 6)
    out = network.apply(phi, heads, jnp.array(1.0))["q"]
    gate = phi.gains["['q']"][0].reshape(2, 5)
    np.testing.assert_allclose(out, 1 + phi.weights["['q']"] * gate[None], rtol=1e-12)


def test_first_weights_have_the_spread_of_their_fan_in():
    w = fan_in_uniform(KEY, (25, 4, 1000), jnp.float64)
    assert float(jnp.abs(w).max()) <= 0.1
    np.testing.assert_allclose(jnp.std(w), 0.1 / np.sqrt(3), rtol=0.01)
    phi = StructuredResponse(output_axes=0).init(KEY, {"w": jnp.ones((1000, 100))}, jnp.zeros(()))
    assert float(jnp.abs(phi.weights["['w']"]).max()) <= 0.1


def test_named_leaves_only_and_a_name_that_is_not_there():
    network = StructuredResponse(leaves="kernel", gain_scale=1.0)
    phi = network.init(KEY, PARAMS, HPARAMS)
    assert set(phi.gains) == {"['dense']['kernel']"}
    out = network.apply(phi, PARAMS, jax.tree.map(jnp.ones_like, HPARAMS))
    np.testing.assert_array_equal(out["conv"], PARAMS["conv"])
    with pytest.raises(ValueError, match="no leaf has 'decoder'"):
        StructuredResponse(leaves="decoder").init(KEY, PARAMS, HPARAMS)
    with pytest.raises(ValueError, match="out of range"):
        StructuredResponse(output_axes=2).init(KEY, {"w": jnp.ones((3, 4))}, HPARAMS)
    with pytest.raises(ValueError, match="made for 3 hyperparameters, got 1"):
        network.apply(phi, PARAMS, jnp.zeros(()))


def test_dtypes_are_those_of_the_model():
    params = {"w": jnp.ones((8, 4), jnp.bfloat16), "b": jnp.ones(4, jnp.float32)}
    network = StructuredResponse(gain_scale=0.5)
    phi = network.init(KEY, params, jnp.zeros((), jnp.float32))
    assert phi.gains["['w']"].dtype == jnp.float32 and phi.weights["['w']"].dtype == jnp.bfloat16
    out = network.apply(phi, params, jnp.ones((), jnp.float32))
    assert out["w"].dtype == jnp.bfloat16 and out["b"].dtype == jnp.float32


def test_it_works_on_the_state_of_an_nnx_model_and_on_shapes_alone():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    network = StructuredResponse(gain_scale=1.0)
    shapes = jax.eval_shape(lambda: params)
    phi = network.init(KEY, shapes, jnp.zeros(2))
    moved = nnx.merge(graph, network.apply(phi, params, jnp.array([1.0, -1.0])))
    x = jnp.ones((5, 3), jnp.float32)
    assert moved(x).shape == (5, 2) and bool(jnp.any(moved(x) != model(x)))


def test_split_batch_cuts_arrays_splits_keys_and_names_what_does_not_fit():
    batch = {"x": jnp.arange(12.0).reshape(6, 2), "key": KEY, "t": jnp.array(3.0)}
    parts = split_batch(batch, 3)
    for g in range(3):  # every third example, so that a sharded batch need not move
        np.testing.assert_array_equal(parts["x"][g], batch["x"][g::3])
    assert parts["x"].shape == (3, 2, 2) and parts["t"].shape == (3,)
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(parts["key"]))}) == 3
    with pytest.raises(ValueError, match="does not divide the batch of 6"):
        split_batch(batch, 4)
    with pytest.raises(ValueError, match="share their leading axis"):
        split_batch({"x": jnp.zeros((6, 2)), "z": jnp.zeros(4)}, 2)
    with pytest.raises(ValueError, match="jax.random.key"):
        split_batch({"a": jnp.zeros((6, 2)), "k": jnp.zeros(2, jnp.uint32)}, 2)


def test_keys_fold_and_noise_is_shared_where_told():
    batch = {"x": jnp.ones(3), "key": KEY}
    folded = fold_keys(batch, 1)
    np.testing.assert_array_equal(folded["x"], batch["x"])
    assert bool(jnp.any(jax.random.key_data(folded["key"]) != jax.random.key_data(KEY)))
    noise = draw_noise(KEY, HPARAMS, 5, {"a": True, "b": False})
    assert noise["a"].shape == (5, 2) and noise["b"].shape == (5,)
    np.testing.assert_array_equal(noise["a"], jnp.broadcast_to(noise["a"][:1], (5, 2)))
    assert len(set(np.asarray(noise["b"]))) == 5
