"""Layers read off a model's program: which they are, the dual matrix, Kronecker factors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel import CG, EKFAC, KFAC, Dense, GaussNewton, Hessian, Nystrom, Woodbury
from bilevel.problem.layers.find import NOT_A_KERNEL, TWICE, find_layers
from bilevel.problem.layers.program import evaluate, trace
from bilevel.problem.two_losses import Problem

N, UNITS = 4, 3
KEYS = jax.random.split(jax.random.key(0), 12)
IMAGES = jax.random.normal(KEYS[0], (N, 6, 6, 2))
LABELS = jnp.arange(N) % UNITS
WEIGHTS = jax.random.normal(KEYS[1], (N,))
BATCH = (IMAGES, LABELS)


def weighted(z: Any, hparams: Any, batch: Any) -> Any:
    log_p = jax.nn.log_softmax(z.astype(jnp.float32 if z.dtype == jnp.bfloat16 else z.dtype))
    losses = -jnp.take_along_axis(log_p, batch[1][:, None], 1)[:, 0]
    return jnp.mean(jax.nn.sigmoid(hparams) * losses)


def squared(z: Any, hparams: Any, batch: Any) -> Any:
    return 0.5 * jnp.mean(jnp.sum(z**2, -1))


def penalty(w: Any, hparams: Any) -> Any:
    """Another strength for every weight."""
    leaves = jax.tree.leaves(w)
    strengths = [1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) for x in leaves]
    return 0.5 * sum(jnp.sum(s * x**2) for s, x in zip(strengths, leaves, strict=True))


def mlp() -> tuple[Any, Any]:
    def model(p, hparams, batch):
        z = batch[0].reshape(batch[0].shape[0], -1)
        z = jnp.tanh(z @ p["in"]["w"] + p["in"]["b"][None])
        return z @ p["out"]["w"].T + jnp.broadcast_to(p["out"]["b"], (z.shape[0], UNITS))

    first = {"w": jax.random.normal(KEYS[2], (72, 5)) / 8, "b": jnp.ones(5)}
    last = {"w": jax.random.normal(KEYS[3], (UNITS, 5)), "b": jnp.zeros(UNITS)}
    return model, {"in": first, "out": last}


def positions() -> tuple[Any, Any]:
    """A dense layer at each of nine positions, its kernel wider than long."""

    def model(p, hparams, batch):
        z = jnp.tanh(batch[0].reshape(-1, 9, 8) @ p[0])
        return (z**2).sum(1) @ p[1]

    kernels = jax.random.normal(KEYS[4], (8, 20)) / 3, jax.random.normal(KEYS[5], (20, UNITS))
    return model, kernels


def cnn() -> tuple[Any, Any]:
    """Strides, dilation, a normalization that is no layer, and a kernel without bias."""
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), strides=2, param_dtype=float, rngs=rngs),
        nnx.gelu,
        nnx.Conv(
            4, 5, (2, 2), padding="VALID", kernel_dilation=2, use_bias=False,
            param_dtype=float, rngs=rngs,
        ),
        nnx.tanh,
        lambda x: x.reshape(x.shape[0], -1),
        nnx.LayerNorm(5, param_dtype=float, rngs=rngs),
        nnx.Linear(5, UNITS, param_dtype=float, rngs=rngs),
    )  # fmt: skip
    graph, params = nnx.split(net)
    return lambda p, hparams, batch: nnx.merge(graph, p)(batch[0]), params


def linen_cnn() -> tuple[Any, Any]:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(4, (3, 3), param_dtype=float)(x)).mean((1, 2))
            return linen.Dense(UNITS, param_dtype=float)(x)

    net = Net()
    params = net.init(KEYS[6], IMAGES)
    return lambda p, hparams, batch: net.apply(p, batch[0]), params


NETWORKS = {"mlp": mlp, "positions": positions, "cnn": cnn, "linen_cnn": linen_cnn}


def bound(model, params, damping=0.1, loss=weighted, pen=None, independent=True):
    operator = GaussNewton(model, loss, damping, pen, independent)
    problem = Problem(operator.loss, operator.loss)
    return operator.bind(problem, params, WEIGHTS, BATCH, fresh=False).mv


def jacobian(model, params):
    flat, unravel = ravel_pytree(params)
    return jax.jacrev(lambda w: model(unravel(w), WEIGHTS, BATCH).reshape(-1))(flat), unravel


def dense_matrix(amap, params):
    flat, unravel = ravel_pytree(params)
    columns = jax.vmap(lambda e: ravel_pytree(amap(unravel(e)))[0])(jnp.eye(flat.size))
    return columns.T


def relative(got, want) -> float:
    got, want = ravel_pytree(got)[0], ravel_pytree(want)[0]
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def like(params, seed=8):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(KEYS[seed], flat.shape, flat.dtype))


# ---- What is a layer -------------------------------------------------------------------------


def names_of(model, params, batch=BATCH):
    """Names of the leaves in layers, and the reasons for the others."""
    program = trace(lambda w: model(w, WEIGHTS, batch), params)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers, reasons = find_layers(program, jax.tree.leaves(params))
    found = [
        (la.kind, paths[la.kernel], None if la.bias is None else paths[la.bias]) for la in layers
    ]
    return found, {paths[i]: why for i, why in reasons.items()}


def test_dense_layers_with_their_biases_are_found():
    found, reasons = names_of(*mlp())
    assert found == [
        ("dense", "['in']['w']", "['in']['b']"),
        ("dense", "['out']['w']", "['out']['b']"),
    ]
    assert reasons == {}


def test_convolutions_of_flax_are_found_and_a_normalization_is_not():
    found, reasons = names_of(*cnn())
    assert [kind for kind, _, _ in found] == ["conv", "conv", "dense"]
    assert [bias is None for _, _, bias in found] == [False, True, False]
    assert len(reasons) == 2 and set(reasons.values()) == {NOT_A_KERNEL}
    assert [kind for kind, _, _ in names_of(*linen_cnn())[0]] == ["conv", "dense"]


def test_what_is_no_layer_says_why():
    square = {
        "shared": jnp.eye(4),
        "looped": jnp.eye(4),
        "table": jnp.ones((7, 4)),
        "free": jnp.ones(2),
    }
    square["last"] = jnp.ones((4, UNITS))

    def model(p, hparams, batch):
        z = p["table"][batch[1]] @ p["shared"]
        z = jnp.tanh(z) @ p["shared"]
        z = jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["looped"]), None), z, None, 3)[0]
        return z @ p["last"]

    found, reasons = names_of(model, square)
    assert found == [("dense", "['last']", None)]
    assert reasons == {
        "['shared']": TWICE,
        "['looped']": NOT_A_KERNEL,
        "['table']": NOT_A_KERNEL,
        "['free']": "it is not read",
    }


def test_calls_are_written_out_and_custom_derivatives_stay():
    @jax.custom_jvp
    def cube(x):
        return x**3

    cube.defjvp(lambda primal, tangent: (cube(*primal), 7.0 * tangent[0]))  # a wrong derivative

    @jax.checkpoint
    @jax.jit
    def model(p, hparams, batch):
        return cube(batch[0].reshape(N, -1) @ p)

    p = jax.random.normal(KEYS[7], (72, UNITS))
    assert names_of(model, p)[0] == [("dense", "", None)]
    program = trace(lambda w: model(w, WEIGHTS, BATCH), p)

    def again(w):
        return evaluate(program, [w], {}, [])[0]

    want, pull = jax.vjp(lambda w: model(w, WEIGHTS, BATCH), p)
    got, pull_again = jax.vjp(again, p)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(pull_again(want)[0], pull(want)[0], rtol=1e-12)


# ---- The dual matrix -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("uniform", [True, False])
def test_dual_is_the_jacobian_times_its_transpose(name, uniform):
    model, params = NETWORKS[name]()
    dual = bound(model, params, pen=None if uniform else penalty).dual()
    j, unravel = jacobian(model, params)
    entries = (
        jnp.full(j.shape[1], 0.3) if uniform else 0.1 + jax.random.uniform(KEYS[9], j.shape[1:])
    )
    identity = jnp.broadcast_to(jnp.eye(UNITS), (N, UNITS, UNITS))
    got = jax.jit(dual.kernel)(unravel(entries), identity)
    want = (j * entries[None]) @ j.T
    np.testing.assert_allclose(np.tril(got), np.tril(want), rtol=1e-10, atol=1e-12)
    q = output_hessian(model(params, WEIGHTS, BATCH))
    np.testing.assert_allclose(dual.root @ jnp.swapaxes(dual.root, 1, 2), q, atol=1e-12)
    assert bool(dual.is_root)
    v = like(params)
    np.testing.assert_allclose(dual.push(v), j @ ravel_pytree(v)[0], rtol=1e-10, atol=1e-12)
    assert dual.covered == (1.0 if name != "cnn" else pytest.approx(1 - 10 / j.shape[1]))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pen", [None, penalty])
def test_woodbury_through_layers_is_woodbury_through_rows(name, pen):
    model, params = NETWORKS[name]()
    amap, g = bound(model, params, pen=pen), like(params)
    layers = jax.jit(lambda g: Woodbury().solve(amap, g))(g)
    rows = jax.jit(lambda g: Woodbury(structured=False).solve(amap, g))(g)
    assert relative(layers.value, rows.value) < 1e-10
    assert float(layers.stats["residual_norm"]) < 1e-9 * float(layers.stats["rhs_norm"])
    assert int(layers.result) == int(rows.result) == 0
    assert (
        int(layers.stats["num_matvecs"]) == UNITS + 2 < int(rows.stats["num_matvecs"]) == N * UNITS
    )
    assert "covered" in layers.stats and "covered" not in rows.stats


def test_woodbury_keeps_to_rows_where_examples_may_depend_on_each_other():
    model, params = mlp()
    assert bound(model, params, independent=False).dual() is None
    solution = Woodbury().solve(bound(model, params, independent=False), like(params))
    assert "covered" not in solution.stats and int(solution.result) == 0


@pytest.mark.slow
def test_woodbury_through_layers_with_several_outputs_and_a_negative_diagonal():
    model, params = mlp()

    def two(p, hparams, batch):
        z = model(p, hparams, batch)
        return {"a": z[:, 0], "b": z[:, 1:] ** 2}

    def loss(z, hparams, batch):
        return jnp.mean(z["a"] ** 2) + jnp.mean(jnp.logaddexp(0.0, z["b"] + z["a"][:, None]))

    amap, g = bound(two, params, loss=loss), like(params)
    got = Woodbury().solve(amap, g).value
    assert relative(got, Woodbury(structured=False).solve(amap, g).value) < 1e-10
    concave = bound(model, params, pen=lambda w, h: -penalty(w, h))
    assert int(Woodbury().solve(concave, g).result) == bilevel.Status.negative_curvature


def coupled(z, hparams, batch):
    """Convex, and no sum over the examples."""
    return jnp.mean(z**2) + 0.5 * jnp.sum(z) ** 2


def wavy(z, hparams, batch):
    """A sum over examples, and not convex: Q has negative entries, the matrix none."""
    return 0.01 * jnp.sum(jnp.sin(z))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [coupled, wavy])
def test_woodbury_through_layers_for_a_loss_without_a_root_by_examples(loss):
    model, params = mlp()
    amap, g = bound(model, params, loss=loss, damping=3.0), like(params)
    assert not bool(amap.dual().is_root)
    got, want = Woodbury().solve(amap, g), Woodbury(structured=False).solve(amap, g)
    assert relative(got.value, want.value) < 1e-10
    assert int(got.result) == int(want.result) == 0


def test_woodbury_refuses_more_equations_than_allowed():
    model, params = mlp()
    with pytest.raises(ValueError, match="max_outputs"):
        Woodbury(N * UNITS - 1).solve(bound(model, params), like(params))


# ---- Kronecker factors -----------------------------------------------------------------------


def output_hessian(z):
    """(N, C, C) blocks of the weighted softmax loss, in closed form."""
    p = jax.nn.softmax(z)
    block = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return jax.nn.sigmoid(WEIGHTS)[:, None, None] * block / N


def test_factors_of_dense_layers_are_their_closed_forms():
    model, p = mlp()
    found = bound(model, p).kronecker(None, None)
    x = IMAGES.reshape(N, -1)
    hidden = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"][None])
    q = output_hessian(model(p, WEIGHTS, BATCH))
    # rows of the last layer see Q itself; those of the first the last kernel and tanh'
    back = p["out"]["w"][None] * (1 - hidden**2)[:, None, :]  # (N, C, hidden)
    ones = jnp.ones((N, 1))
    for (left, right), a, g in zip(
        found.factors,
        (jnp.concatenate([x, ones], 1), jnp.concatenate([hidden, ones], 1)),
        (jnp.einsum("nci,ncd,ndj->ij", back, q, back), q.sum(0)),
        strict=True,
    ):
        np.testing.assert_allclose(left, a.T @ a / N, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(right, g, rtol=1e-10, atol=1e-12)


def test_factors_of_a_convolution_count_positions_as_examples():
    kernel = jax.random.normal(KEYS[10], (2, 2, 2, UNITS))

    def model(p, hparams, batch):
        z = jax.lax.conv_general_dilated(
            batch[0], p, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(z**2, (1, 2))

    found = bound(model, kernel).kronecker(None, None)
    patches = np.stack([
        np.asarray(IMAGES[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]).transpose(2, 0, 1).reshape(-1)
        for n in range(N) for i in range(3) for j in range(3)
    ])  # fmt: skip
    matrix = np.asarray(kernel).transpose(2, 0, 1, 3).reshape(-1, UNITS)
    slope = (2 * patches @ matrix).reshape(N, 9, UNITS)
    q = output_hessian(model(kernel, WEIGHTS, BATCH))
    ((left, right),) = found.factors
    np.testing.assert_allclose(left, patches.T @ patches / len(patches), rtol=1e-10)
    want = jnp.einsum("npc,ncd,npd->cd", slope, q, slope)
    np.testing.assert_allclose(right, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.split(kernel)[0], matrix)


@pytest.mark.parametrize("name", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_moments_are_the_diagonal_of_gauss_newton_in_any_bases(name):
    model, params = NETWORKS[name]()
    amap = bound(model, params, damping=0.0)
    found = amap.kronecker(None, None)
    matrix = dense_matrix(amap, params)
    _, unravel = ravel_pytree(params)
    selection = jax.jacobian(lambda w: found.split(unravel(w)))(ravel_pytree(params)[0])
    bases = [(jnp.linalg.eigh(a)[1], jnp.linalg.eigh(g)[1]) for a, g in found.factors]
    for got, rows, (u, w) in zip(found.moments(bases, 0)[0], selection, bases, strict=True):
        flat = rows.reshape(-1, rows.shape[-1])
        block = flat @ matrix @ flat.T
        turn = jnp.kron(u, w)
        want = jnp.diag(turn.T @ block @ turn)
        np.testing.assert_allclose(got.reshape(-1), want, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_sampled_factors_tend_to_the_exact_ones():
    model, params = mlp()
    amap = bound(model, params)
    exact, sampled = amap.kronecker(None, None), amap.kronecker(2000, KEYS[11])
    for (left, right), (_, drawn) in zip(exact.factors, sampled.factors, strict=True):
        # an entry is a mean of 2000 products of signs: five standard errors
        error = np.abs(drawn - right).max() / np.abs(right).max()
        assert left.shape[0] > 1 and 0 < error < 5 * np.sqrt(N * UNITS / 2000)
    assert sampled.num_products == 2000 and exact.num_products == UNITS


# ---- KFAC and EKFAC --------------------------------------------------------------------------


def one_layer(p, hparams, batch):
    return batch[0].reshape(batch[0].shape[0], -1)[:, :9] @ p["kernel"] + p["bias"][None]


ONE_LAYER = {"kernel": jax.random.normal(KEYS[7], (9, UNITS)), "bias": jnp.ones(UNITS)}


@pytest.mark.parametrize(
    ("loss", "count"), [(squared, N), (weighted, 1)], ids=["squared", "one_example"]
)
def test_ekfac_is_exact_where_the_block_is_a_kronecker_product(loss, count):
    operator = GaussNewton(one_layer, loss, 0.1)
    batch = jax.tree.map(lambda x: x[:count], BATCH)
    problem = Problem(operator.loss, operator.loss)
    amap = operator.bind(problem, ONE_LAYER, WEIGHTS[:count], batch, fresh=False).mv
    g = like(ONE_LAYER)
    got = jax.jit(lambda g: EKFAC().solve(amap, g))(g)
    assert relative(got.value, Dense().solve(amap, g).value) < 1e-9
    assert int(got.result) == 0 and int(got.stats["num_matvecs"]) == 2 * UNITS
    assert float(got.stats["covered"]) == 1.0


@pytest.mark.parametrize("multiple", [1.0, 10.0])
def test_kfac_is_the_inverse_of_its_formula(multiple):
    model, params = mlp()
    amap, r = bound(model, params, damping=0.02), like(params)
    found = amap.kronecker(None, None)
    prepared = KFAC(None, damping_multiple=multiple).prepare(amap, r, None)
    parts = zip(found.factors, found.split(r), found.split(prepared.apply(r)), strict=True)
    for (left, right), v, got in parts:
        block = jnp.kron(left, right) + multiple * 0.02 * jnp.eye(v.size)
        np.testing.assert_allclose(
            got.reshape(-1), jnp.linalg.solve(block, v.reshape(-1)), rtol=1e-8
        )


@pytest.mark.slow
def test_ekfac_says_how_far_it_is_off_where_it_is_not_exact():
    model, params = mlp()
    amap, g = bound(model, params, damping=1e-3), like(params)
    got = EKFAC().solve(amap, g)
    left = relative(amap(got.value), g)
    np.testing.assert_allclose(got.stats["residual_norm"] / got.stats["rhs_norm"], left, rtol=1e-10)
    assert left > 1e-3 and int(got.result) != 0


PRECONDITIONERS = {
    "kfac": KFAC(),
    "kfac_exact": KFAC(None),
    "ekfac": EKFAC(),
    "nystrom": Nystrom(8),
    "nystrom_gaussian": Nystrom(8, gaussian=True),
}


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("network", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_preconditioned_cg_reaches_the_same_solution(name, network):
    model, params = NETWORKS[network]()
    amap, g = bound(model, params, damping=1e-2), like(params)
    solver = CG(400, rtol=1e-11, preconditioner=PRECONDITIONERS[name], unroll=False)
    got = jax.jit(lambda g: solver.solve(amap, g, key=KEYS[11]))(g)
    assert relative(got.value, jax.jit(lambda g: Woodbury().solve(amap, g).value)(g)) < 1e-7
    assert int(got.result) == 0
    assert float(got.stats["residual_norm"]) < 1e-10 * float(got.stats["rhs_norm"])


def test_preconditioners_are_symmetric_and_positive():
    model, params = mlp()
    amap = bound(model, params)
    u, v = like(params, 8), like(params, 9)

    @jax.jit
    def applied(u, v):
        prepared = (p.prepare(amap, u, KEYS[11]).apply for p in PRECONDITIONERS.values())
        return [(apply(u), apply(v)) for apply in prepared]

    for images in applied(u, v):
        flat = [ravel_pytree(x)[0] for x in (u, v, *images)]
        np.testing.assert_allclose(flat[0] @ flat[3], flat[1] @ flat[2], rtol=1e-10)
        assert flat[0] @ flat[2] > 0


@pytest.mark.slow
def test_nystrom_at_full_rank_leaves_cg_two_steps():
    model, params = one_layer, ONE_LAYER
    amap, g = bound(model, params, damping=0.1), like(params)
    n = ravel_pytree(params)[0].size
    solver = CG(50, rtol=1e-8, preconditioner=Nystrom(n, gaussian=True))
    got = jax.jit(lambda g: solver.solve(amap, g, key=KEYS[11]))(g)
    # A is P times one number where M acts, and another on its null space: two steps
    assert int(got.stats["num_matvecs"]) <= n + 2 and int(got.result) == 0


def wide_classifier(examples: int):
    """A net after thirty steps of training, inputs of decaying size, a small damping."""
    sizes = (100, 60, 60, 10)
    keys = jax.random.split(jax.random.key(4), 8)
    scale = 3 / jnp.arange(1, 101) ** 0.7
    labels = jax.random.randint(keys[0], (2 * examples,), 0, 10)
    centres = scale[None] * jax.random.normal(keys[1], (10, 100))
    x = scale[None] * jax.random.normal(keys[2], (2 * examples, 100)) + centres[labels]
    train, held_out = (x[:examples], labels[:examples]), (x[examples:], labels[examples:])
    params = [
        (jnp.sqrt(2 / m) * jax.random.normal(k, (m, n)), jnp.zeros(n))
        for k, m, n in zip(keys[3:], sizes[:-1], sizes[1:], strict=False)
    ]

    def model(p, hparams, batch):
        z = batch[0]
        for kernel, bias in p[:-1]:
            z = jax.nn.relu(z @ kernel + bias[None])
        return z @ p[-1][0] + p[-1][1][None]

    def loss(z, hparams, batch):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), batch[1][:, None], 1))

    operator = GaussNewton(model, loss, 1e-4)

    @jax.jit
    def step(p):
        slope = jax.grad(operator.loss)(p, None, train)
        return jax.tree.map(lambda x, s: x - 0.05 * s, p, slope)

    for _ in range(30):
        params = step(params)
    g = jax.grad(operator.loss)(params, None, held_out)
    problem = Problem(operator.loss, operator.loss)
    return operator.bind(problem, params, None, train, fresh=False).mv, g


def test_kfac_needs_a_third_of_the_products():
    amap, g = wide_classifier(1024)

    def solved(preconditioner):
        solver = CG(300, rtol=1e-1, preconditioner=preconditioner)
        return jax.jit(lambda g: solver.solve(amap, g, key=KEYS[11]))(g)

    plain, kfac = solved(None), solved(KFAC())
    assert int(plain.result) == int(kfac.result) == 0
    assert 3 * int(kfac.stats["num_matvecs"]) <= int(plain.stats["num_matvecs"])
    assert float(kfac.stats["residual_norm"]) < 0.1 * float(kfac.stats["rhs_norm"])
    assert float(kfac.stats["covered"]) == 1.0


@pytest.mark.parametrize(("dtype", "bound_on"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.1)])
def test_low_precision(dtype, bound_on):
    model, params = mlp()

    def narrowed(t):
        return jax.tree.map(lambda x: x.astype(dtype), t)

    def narrow(p, hparams, batch):
        return model(p, hparams, (batch[0].astype(dtype), batch[1]))

    g, low = like(params), narrowed(params)
    solvers = Woodbury(), EKFAC(), CG(100, rtol=1e-5, preconditioner=KFAC(None), unroll=False)

    @jax.jit
    def solutions(params, low, g):
        return [
            (s.solve(bound(model, params), g), s.solve(bound(narrow, low), narrowed(g)))
            for s in solvers
        ]

    for exact, got in solutions(params, low, g):
        exact = exact.value
        assert {x.dtype for x in jax.tree.leaves(got.value)} == {jnp.dtype(jnp.float32)}
        # eight bits of bfloat16 are an error of 0.4 % in every entry of the network
        assert relative(got.value, exact) < bound_on


def test_solvers_through_layers_may_be_mapped():
    model, params = mlp()
    many = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), params)

    def solve(p):
        return Woodbury().solve(bound(model, p), p).value, EKFAC().solve(bound(model, p), p).value

    got = jax.jit(jax.vmap(solve))(many)
    want = jax.jit(solve)(jax.tree.map(lambda x: x[1], many))
    assert relative(jax.tree.map(lambda x: x[1], got), want) < 1e-9


def test_errors_of_layered_solvers():
    model, params = mlp()
    g = like(params)
    for solver in (EKFAC(), CG(preconditioner=KFAC())):
        hessian = Hessian(0.1)
        loss = GaussNewton(model, squared).loss
        amap = hessian.bind(Problem(loss, loss), params, WEIGHTS, BATCH, fresh=False).mv
        with pytest.raises(ValueError, match=r"FAC reads its factors off the layers"):
            solver.solve(amap, g, key=KEYS[0])
        with pytest.raises(ValueError, match=r"FAC inverts factors that may be singular"):
            solver.solve(bound(model, params, damping=0.0), g, key=KEYS[0])
    with pytest.raises(ValueError, match=r"`key` is missing: KFAC"):
        CG(preconditioner=KFAC()).solve(bound(model, params), g)
    with pytest.raises(ValueError, match="EKFAC found no dense or convolutional layer"):
        EKFAC().solve(bound(lambda p, h, b: p[b[1]], jnp.ones((9, UNITS))), jnp.ones((9, UNITS)))
    wide = jnp.ones((72, 257))
    with pytest.raises(ValueError, match="at most 256 outputs a row, got 257"):
        EKFAC().solve(bound(lambda p, h, b: b[0].reshape(N, -1) @ p, wide, loss=squared), wide)
