"""Products whose matrices are turned: the same numbers, and where it is left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import GaussNewton, Hessian
from bilevel.ground.traced import contains_primitive, programs_within
from bilevel.problem.operators import gauss_newton, hessian
from bilevel.problem.operators.stored import with_stored
from bilevel.problem.two_losses import Problem

KEYS = jax.random.split(jax.random.key(11), 8)
N, T, D, H, C = 4, 2, 20, 30, 2


def dense(w, lam, batch):
    return jnp.tanh(batch @ w["first"]) @ w["last"]


def rematerialized(w, lam, batch):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w["first"]) @ w["last"])(w, batch)


def recurrent(w, lam, batch):
    def step(h, x):
        return jnp.tanh(x @ w["first"] + h @ w["middle"]), None

    start = jnp.zeros((batch.shape[0], H), batch.dtype)
    return jax.lax.scan(step, start, jnp.swapaxes(batch, 0, 1))[0] @ w["last"]


def convolutional(w, lam, batch):
    kernel = w["first"][None]
    z = jax.lax.conv_general_dilated(
        batch, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(z).reshape(len(batch), -1) @ jnp.tile(w["last"], (T, 1))


def transposed_weights(w, lam, batch):
    return jnp.tanh(batch @ w["first"].T) @ w["last"].T


X = {
    "matrix": jax.random.normal(KEYS[0], (N, D)),
    "sequence": jax.random.normal(KEYS[1], (N, T, D)),
    "one example": jax.random.normal(KEYS[2], (1, D)),
}
CASES = {
    "dense": (dense, "matrix", C),
    "one column": (dense, "matrix", 1),
    "sequence": (dense, "sequence", C),
    "one example": (dense, "one example", C),
    "checkpoint": (rematerialized, "matrix", C),
    "scan": (recurrent, "sequence", C),
    "convolution": (convolutional, "sequence", C),
    "transposed": (transposed_weights, "matrix", C),
}


def loss(z, lam, batch):
    return jnp.mean(jnp.log(jnp.cosh(z - 0.3)))


def setting(name, dtype=jnp.float64):
    model, x, columns = CASES[name]
    shapes = {"first": (D, H), "middle": (H, H), "last": (H, columns)}
    if model is not recurrent:
        shapes.pop("middle")
    if model is transposed_weights:
        shapes = {key: shape[::-1] for key, shape in shapes.items()}
    w = {
        k: jax.random.normal(key, s) for key, (k, s) in zip(KEYS[3:], shapes.items(), strict=False)
    }
    v = jax.tree.map(lambda a: jnp.cos(3 * a), w)
    return model, *jax.tree.map(lambda a: a.astype(dtype), (w, v, X[x]))


def operators(model):
    def inner(w, lam, batch):
        return loss(model(w, lam, batch), lam, batch)

    problem = Problem(inner, inner)
    return problem, {"hessian": Hessian(0.1), "gauss_newton": GaussNewton(model, loss, 0.1)}


def product(name, operator, w, batch, model):
    problem, known = operators(model)
    return known[operator].bind(problem, w, None, batch, fresh=False).mv


def across(function, like):
    """Products in the traced function that contract the leading axes of both of their arrays."""

    def count(jaxpr):
        found = 0
        for eqn in jaxpr.eqns:
            found += sum(map(count, programs_within(eqn)))
            if eqn.primitive.name == "dot_general":
                (a, b), _ = eqn.params["dimension_numbers"]
                found += a[0] == b[0] == 0
        return found

    return count(jax.make_jaxpr(function)(like).jaxpr)


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name, operator, monkeypatch):
    model, w, v, batch = setting(name)
    turned = jax.jit(lambda w, b, v: product(name, operator, w, b, model)(v))(w, batch, v)
    for room in (gauss_newton, hessian):
        monkeypatch.setattr(room, "with_stored", lambda product, like, room: product)
    plain = jax.jit(lambda w, b, v: product(name, operator, w, b, model)(v))(w, batch, v)
    # Only the order of the sums differs.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), turned, plain
    )


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("name", ["dense", "one column", "sequence", "transposed"])
def test_no_product_reads_across_its_rows(name, operator, monkeypatch):
    model, w, v, batch = setting(name)
    assert across(product(name, operator, w, batch, model), v) == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert across(product(name, operator, w, batch, model), v) > 0


def test_a_checkpoint_stays_one():
    model, w, v, batch = setting("checkpoint")
    for operator in ("hessian", "gauss_newton"):
        mv = product("checkpoint", operator, w, batch, model)
        assert contains_primitive(mv, v, prefix="remat") or contains_primitive(
            mv, v, prefix="checkpoint"
        )


@pytest.mark.parametrize("columns", [1, 3])
def test_constants_larger_than_the_room_are_not_stored(columns):
    x = jax.random.normal(KEYS[0], (200, 4))
    u = jax.random.normal(KEYS[1], (200, columns))

    def pull(u):
        return jax.linear_transpose(lambda w: x @ w, jnp.zeros((4, columns)))(u)[0]

    small = with_stored(pull, u, room=jnp.zeros((4, columns)))
    large = with_stored(pull, u, room=x)
    # A single column is turned by a reshape, whatever the room.
    assert across(small, u) == (columns > 1)
    assert across(large, u) == 0
    for function in (small, large):
        np.testing.assert_allclose(function(u), x.T @ u, rtol=1e-12)


def test_one_constant_in_two_products():
    x = jax.random.normal(KEYS[1], (N, T, D))

    def product(v):
        u, s = v
        return jnp.einsum("btg,btf->gf", u, x), jnp.einsum("bg,btf->gtf", s, x)

    v = jax.random.normal(KEYS[2], (N, T, C)), jax.random.normal(KEYS[3], (N, C))
    turned = with_stored(product, v, room=(x, x))
    assert across(product, v) == 2 and across(turned, v) == 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), turned(v), product(v))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_dtypes_are_kept(dtype, operator):
    model, w, v, batch = setting("dense", dtype)
    image = product("dense", operator, w, batch, model)(v)
    assert {x.dtype for x in jax.tree.leaves(image)} == {jnp.dtype(dtype)}
    # A solver's vectors are wider than parameters of half precision: the product casts them.
    mv = product("dense", operator, w, batch, model).undamped
    wide = mv(jax.tree.map(lambda a: a.astype(jnp.float32), v))
    jax.tree.map(np.testing.assert_array_equal, wide, mv(v))
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(dtype)}


def test_under_vmap_and_grad():
    model, w, v, batch = setting("dense")

    def length(scale, x):
        moved = jax.tree.map(lambda a: scale * a, w)
        image = product("dense", "hessian", moved, x, model)(v)
        return sum(jnp.vdot(a, a) for a in jax.tree.leaves(image))

    batches = jnp.stack([batch, 2 * batch])
    many = jax.vmap(length, (None, 0))(1.1, batches)
    np.testing.assert_allclose(many, [length(1.1, x) for x in batches], rtol=1e-12)
    step = 1e-5
    difference = (length(1.1 + step, batch) - length(1.1 - step, batch)) / (2 * step)
    # Central differences err by step^2, about 1e-10, and by rounding over the step, 1e-11.
    np.testing.assert_allclose(jax.grad(length)(1.1, batch), difference, rtol=1e-8)


def test_what_is_there_to_be_transposed_is_made_as_its_transpose():
    """Also a sum of two products, but not one that is read besides."""
    a, b = jax.random.normal(KEYS[1], (4, 3)), jax.random.normal(KEYS[2], (4, 3))

    def summed(e):
        return jax.jvp(lambda a, e: jnp.einsum("ni,nj->ij", e, a).T, (a, e), (b, e))[1]

    def read_besides(e):
        z = jnp.einsum("ni,nj->ij", e, a) + jnp.einsum("ni,nj->ij", e, b)
        return z.T, z

    e = jax.random.normal(KEYS[3], (4, 5))
    for product, count in ((summed, 0), (read_besides, 1)):
        turned = with_stored(product, e, room=(a, b))
        eqns = jax.make_jaxpr(turned)(e).jaxpr.eqns
        made = [eqn.outvars[0].aval.shape for eqn in eqns if eqn.primitive.name == "transpose"]
        assert made.count((3, 5)) == count
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12), turned(e), product(e)
        )


def test_a_sum_of_a_thousand_products_is_looked_through():
    """The gradient of a kernel that an unrolled recurrence reads has as many parts as steps."""
    a, e = jax.random.normal(KEYS[1], (4, 3)), jax.random.normal(KEYS[3], (4, 5))

    def product(e):
        parts = [jnp.einsum("ni,nj->ij", e, a) for _ in range(1100)]
        return functools.reduce(jnp.add, parts).T

    turned = with_stored(product, e, room=a)
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(turned)(e).jaxpr.eqns]
    assert names.count("dot_general") == 1100 and names.count("transpose") == 0
    np.testing.assert_allclose(jax.jit(turned)(e), 1100 * a.T @ e, rtol=1e-11)
