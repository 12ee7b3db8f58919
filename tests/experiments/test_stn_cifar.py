"""`stn_cifar` in miniature: its network, its fifteen hyperparameters, and a run end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bilevel.inner.layers import Perturbed
from experiments.common import record, stn, stn_cnn
from experiments.stn_cifar import config, figure, problem, run, train


def test_products_with_neighbourhoods_are_convolutions():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), jnp.float32)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5), jnp.float32)
    for stride in (1, 2):
        made = stn_cnn.neighbourhoods(x, stride) @ kernel.reshape(27, 5)
        same = nnx.Conv(3, 5, (3, 3), (stride, stride), use_bias=False, rngs=nnx.Rngs(0))
        same.kernel[...] = kernel
        # Sums of 27 products of normal numbers in float32.
        np.testing.assert_allclose(made, same(x), atol=2e-5)


def test_the_full_network_is_the_papers_and_can_be_traced():
    settings = config.paper()
    assert len(stn.names(settings)) == 15
    params = jax.eval_shape(lambda: problem.task(settings).initial(0))
    hparams = jax.eval_shape(lambda: stn.start(settings))
    network = problem.task(settings).network()
    response = jax.eval_shape(lambda p, h: network.init(jax.random.key(0), p, h), params, hparams)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, response)]
    # Counted by hand from the table of layers: 23.27 million, and as many again and 15 gains an
    # output and a bias for the response.
    assert sizes[0] == 23_272_266
    assert 46.8e6 < sum(sizes) < 46.9e6
    batch = {
        "x": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32),
        "y": jax.ShapeDtypeStruct((4,), jnp.int32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    inner = problem.task(settings).losses()[1]

    def perturbed(params, response, d, hparams, batch):
        return inner(Perturbed(params, response, d), hparams, batch)

    each = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4,), x.dtype), hparams)
    shape = jax.eval_shape(
        perturbed, params, response, jax.ShapeDtypeStruct((4, 15), jnp.float32), each, batch
    )
    assert shape.shape == ()


def test_the_starting_values_are_inside_the_ranges_and_change_nothing_twice():
    settings = config.smoke()
    space, start = stn.space(settings), stn.start(settings)
    back = space.constrain(space.unconstrain(start))
    for name, value in start.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-5)  # a logit and back, in float32
    x = jax.random.uniform(jax.random.key(0), (3, 32, 32, 3), jnp.float32)
    nothing = {name: jnp.float32(0) for name in start}
    made = problem.task(settings).augment(jax.random.key(1), x, nothing)
    # Colour jitter of strength 0 multiplies by a 3 x 3 matrix that is the identity to rounding.
    np.testing.assert_allclose(made, problem.normalized(x), atol=1e-4)


def test_a_run_tunes_every_hyperparameter_and_resumes(tmp_path):
    settings = dataclasses.replace(
        config.smoke(), channels=(4,), pooled=(0,), dense=(), points=2, trials=2
    )
    run.run(settings, 0, tmp_path, resume=False)
    (*_, last) = record.read(tmp_path, method="delta_stn")
    assert np.isfinite([v for v in last.metrics.values() if isinstance(v, float)]).all()
    start = stn.start(settings)
    moved = {name: abs(last.metrics[name] - float(start[name])) for name in start}
    assert min(moved.values()) > 0 and max(moved.values()) > 1e-2
    found = record.load_arrays(tmp_path, "schedule_0")
    assert found["cutout_holes"].shape == (train.cycles(settings),)
    assert set(np.unique(found["cutout_holes"])) <= {0.0, 1.0, 2.0, 3.0}
    best = [r.metrics["validation_loss"] for r in record.read(tmp_path, method="random_search")]
    assert best[1] <= best[0]
    before = (tmp_path / record.FILE).read_bytes()
    run.run(settings, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == before
    assert all(path.exists() for path in figure.figures(tmp_path))
