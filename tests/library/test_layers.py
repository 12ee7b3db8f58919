"""Layer mode: equal to weight mode, one displacement an example, inside self-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
from bilevel.ground import tree
from bilevel.inner.layers import (
    Perturbed,
    TunedConv,
    TunedEmbedding,
    TunedLinear,
    TunedLSTMCell,
    split_layers,
)
from bilevel.inner.network import StructuredParams
from bilevel.regularizers import dropout, dropout_mask

KEY = jax.random.key(0)
B, H = 3, 2
D = jax.random.normal(jax.random.key(1), (B, H), jnp.float32)


class Recurrent(nnx.Module):
    """Tokens to hidden states, with weight drop."""

    def __init__(self, rngs):
        self.embed = TunedEmbedding(11, 5, H, rngs=rngs)
        self.lstm = TunedLSTMCell(5, 4, H, rngs=rngs)

    def __call__(self, tokens, d=None):
        mask = dropout_mask(KEY, (4, 16), 0.3)
        start = self.lstm.start(tokens.shape[0])
        return self.lstm.sequence(start, self.embed(tokens, d), d, mask=mask)[1]


def _case(name):
    rngs = nnx.Rngs(0)
    floats = jax.random.normal(KEY, (B, 6, 6, 5), jnp.float32)
    return {
        "dense": (TunedLinear(5, 4, H, rngs=rngs), floats[:, 0]),
        "conv": (TunedConv(5, 4, (3, 3), H, strides=2, rngs=rngs), floats),
        "embedding": (TunedEmbedding(11, 5, H, rngs=rngs), jnp.arange(B * 4).reshape(B, 4) % 11),
        "lstm": (Recurrent(rngs), jnp.arange(B * 7).reshape(B, 7) % 11),
    }[name]


def _as_weight_mode(response):
    """The same numbers as parameters of a StructuredResponse."""
    weights, gains = {}, {}
    for path, leaf in tree.paths(response, ""):
        if "_gains" in path:
            gains[path.replace("_gains", "")] = leaf
        else:
            weights[path.replace("_response", "")] = leaf
    return StructuredParams(weights, gains)


@pytest.mark.parametrize("name", ["dense", "conv", "embedding", "lstm"])
def test_layer_mode_equals_weight_mode(name):
    model, x = _case(name)
    network, params = split_layers(model, gain_scale=1.0)
    response = network.init(KEY, params, jnp.zeros(H))
    weight_mode = _as_weight_mode(response)

    @jax.jit
    def by_layer(d):
        merged, d = network.merge(Perturbed(params, response, d))
        return merged(x, d)

    @jax.jit
    def by_weight(d):
        def one(d, x):
            moved = bilevel.StructuredResponse().apply(weight_mode, params, d)
            return network.merge(Perturbed(moved, response, None))[0](x[None])[0]

        return jax.vmap(one)(d, x)

    # Two orders of summing the same float32 products of order one.
    np.testing.assert_allclose(by_layer(D), by_weight(D), atol=1e-6, rtol=1e-6)
    plain = jax.jit(lambda: network.merge(network.plain(response, params))[0](x))()
    assert float(jnp.max(jnp.abs(by_layer(D) - plain))) > 1e-2
    # Added zeros are exact, but the two programs are fused, hence rounded, apart.
    np.testing.assert_allclose(by_layer(jnp.zeros_like(D)), model(x), atol=1e-7, rtol=1e-5)
    g = jax.random.normal(KEY, plain.shape, jnp.float32)
    grads = [jax.grad(lambda d, f=f: jnp.vdot(f(d), g))(D) for f in (by_layer, by_weight)]
    np.testing.assert_allclose(*grads, atol=1e-5, rtol=1e-5)


def test_the_cell_is_an_lstm():
    cell = TunedLSTMCell(5, 4, H, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (B, 5), jnp.float32)
    c, h = jax.random.normal(KEY, (2, B, 4), jnp.float32)
    (c_new, h_new), out = cell((c, h), x)
    z = x @ cell.inputs.kernel[...] + h @ cell.kernel[...]
    i, f, g, o = np.split(np.asarray(z), 4, axis=1)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    expected = sigmoid(f) * np.asarray(c) + sigmoid(i) * np.tanh(g)
    np.testing.assert_allclose(c_new, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h_new, sigmoid(o) * np.tanh(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out, h_new)


def test_shapes_that_do_not_fit_are_refused():
    model, x = _case("dense")
    with pytest.raises(ValueError, match=r"expected \(3, 2\)"):
        model(x, D[:2])
    network, params = split_layers(model)
    with pytest.raises(ValueError, match="num_hparams=3"):
        network.init(KEY, params, jnp.zeros(3))
    with pytest.raises(ValueError, match="no best-response layer"):
        split_layers(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("linearised", [False, True])
def test_self_tuning_of_layers_perturbs_every_example(linearised):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = TunedLinear(4, 8, H, rngs=rngs)
            self.last = TunedLinear(8, 1, H, rngs=rngs)

        def __call__(self, x, d):
            return self.last(jnp.tanh(self.first(x, d)), d)

    network, params = split_layers(Net(nnx.Rngs(0)), gain_scale=0.1)
    shapes = set()

    def model(params, h, batch):
        shapes.add((jnp.shape(h["rate"]), params.displacement is None))
        net, d = network.merge(params)
        return net(dropout(batch["key"], batch["x"], h["rate"]), d)

    def error(z, h, batch):
        return 0.01 * jnp.mean(jnp.exp(h["decay"])) * jnp.mean(z**2) + jnp.mean(
            (z - batch["y"]) ** 2
        )

    def outer(params, h, batch):
        net, d = network.merge(params)
        return jnp.mean((net(batch["x"], d) - batch["y"]) ** 2)

    split = bilevel.GaussNewton(model, error)
    x = jax.random.normal(KEY, (16, 4), jnp.float32)
    batch = {"x": x, "y": jnp.sin(x[:, :1]), "key": jax.random.key(3)}
    alg = bilevel.self_tuning(
        outer,
        split.loss,
        optax.sgd(0.05),
        optax.sgd(0.05),
        1,
        network=network,
        shared="decay",
        linearize=split if linearised else None,
        constrain=bilevel.Space({"rate": bilevel.Interval(0, 0.95), "decay": bilevel.Free()}),
    )
    hparams = {"rate": jnp.float32(0.3), "decay": jnp.float32(0.0)}
    state = alg.init(params, hparams)
    new, info = jax.jit(alg.step)(
        state, inner_batches=jax.tree.map(lambda a: a[None], batch), outer_batch=batch, key=KEY
    )
    assert shapes == {((), True), ((16,), False)}
    assert np.isfinite(info.value) and float(info.stats["response_norm"]) > 0
    assert float(new.raw["rate"]) != float(state.raw["rate"])
    for part in ("params", "network_params"):
        old, moved = (jax.tree.leaves(getattr(s, part)) for s in (state, new))
        assert all(bool(jnp.any(a != b)) for a, b in zip(old, moved, strict=True))


def test_uncentred_layers_warm_up_and_are_deployed_at_one_displacement():
    # STN's weights at the hyperparameters are a displacement too: of all examples at once.
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.only = TunedLinear(3, 2, 1, rngs=rngs)

        def __call__(self, x, d):
            return self.only(x, d)

    network, params = split_layers(Net(nnx.Rngs(0)), centred=False, gain_scale=1.0)

    def loss(params, h, batch):
        net, d = network.merge(params)
        return jnp.mean(net(dropout(batch["key"], batch["x"], h), d) ** 2)

    alg = bilevel.self_tuning(
        loss, loss, optax.sgd(0.1), optax.sgd(0.1), 1, network=network, warm_up=1,
        constrain=bilevel.Space(bilevel.Interval(0, 0.95)),
    )  # fmt: skip
    x = jax.random.normal(KEY, (4, 3), jnp.float32)
    batch = {"x": x, "key": jax.random.key(1)}
    state = alg.init(params, jnp.float32(0.2))
    one = jax.tree.map(lambda a: a[None], batch)
    new, _ = jax.jit(alg.step)(state, inner_batches=one, outer_batch=batch, key=KEY)
    assert float(new.raw) == float(state.raw) and int(new.step) == 1
    model, d = network.merge(alg.deploy(state))
    each, rows = network.merge(
        network.apply(state.network_params, state.params, jnp.full((4,), state.raw))
    )
    assert d.shape == (1, 1) and rows.shape == (4, 1)
    np.testing.assert_allclose(model(x, d), each(x, rows), rtol=1e-6)
