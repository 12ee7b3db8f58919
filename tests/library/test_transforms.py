"""At home in JAX: one compilation, vmap, scan, donation, remat, dtypes, sharding."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel import CG, Dense, Diagonal, GaussNewton, Hessian, Implicit, Neumann, Stochastic
from bilevel.ground import tree

ROOT = Path(__file__).parents[2]


def inner(w, lam, batch):
    x, y = batch
    z = x @ w["kernel"] + w["bias"]
    size = jnp.sum(jnp.exp(lam["decay"]) * w["kernel"] ** 2) + jnp.sum(w["bias"] ** 2)
    return 0.5 * jnp.mean((z - y) ** 2) + 0.5 * size


def outer(w, lam, batch):
    x, y = batch
    z = x @ w["kernel"] + w["bias"]
    return 0.5 * jnp.mean((z - y) ** 2) + 0.01 * jnp.sum(lam["decay"] ** 2)


@functools.cache
def data(dtype=jnp.float64, seed=0):
    k = jax.random.split(jax.random.key(seed), 5)
    w = {"kernel": jax.random.normal(k[0], (4,), dtype), "bias": jnp.ones((), dtype)}
    lam = {"decay": 0.3 * jax.random.normal(k[1], (4,), dtype)}
    x = jax.random.normal(k[2], (2, 16, 4), dtype)
    y = jax.random.normal(k[3], (2, 16), dtype)
    return w, lam, (x[0], y[0]), (x[1], y[1])


@jax.jit  # op by op, compiling every small piece would take most of this file's time
def dense(w, lam, tr, va):
    """The oracle: the whole hypergradient by dense algebra on the flattened problem."""
    flat, unravel = ravel_pytree(w)
    hessian = jax.hessian(lambda v: inner(unravel(v), lam, tr))(flat)
    mixed = jax.jacobian(lambda d: jax.grad(lambda v: inner(unravel(v), {"decay": d}, tr))(flat))
    g = jax.grad(lambda v: outer(unravel(v), lam, va))(flat)
    direct = jax.grad(lambda d: outer(w, {"decay": d}, va))(lam["decay"])
    return direct - mixed(lam["decay"]).T @ jnp.linalg.solve(hessian, g)


def solve(response, w, lam, tr, va, state=None):
    return bilevel.hypergrad_solve(
        outer, inner, response, w, lam, inner_batch=tr, outer_batch=va, state=state
    )


def test_no_second_compilation_when_values_change():
    jitted = jax.jit(lambda *args: solve(*args))  # a cache of its own, not that of `solve`
    w, lam, tr, va = data()
    for i in range(4):
        w, lam, tr, va = data(seed=i)
        response = Implicit(CG(50, rtol=10.0 ** -(6 + i), atol=0.0), Hessian(damping=0.1 * i))
        jitted(response, w, lam, tr, va)
    assert jitted._cache_size() == 1
    for i in range(3):
        response = Implicit(Neumann(5, step_size=0.1 + 0.1 * i), Hessian(damping=0.1))
        jitted(response, w, lam, tr, va)
    assert jitted._cache_size() == 2  # another solver is another program, another step is not


def test_no_second_compilation_with_settings_made_inside_the_jitted_function():
    @jax.jit
    def step(damping, rtol, w, lam, tr, va):
        response = Implicit(CG(50, rtol=rtol, preconditioner=Diagonal()), Hessian(damping))
        key = jax.random.key(0)
        return bilevel.hypergrad(outer, inner, response)(
            w, lam, inner_batch=tr, outer_batch=va, key=key
        )

    results = [step(d, 1e-10, *data())["decay"] for d in (0.0, 0.5)]
    assert step._cache_size() == 1
    np.testing.assert_allclose(results[0], dense(*data()), rtol=1e-8)
    assert not np.allclose(results[0], results[1], rtol=1e-2)  # the damping was really read


def test_changed_tolerance_changes_the_work_not_the_program():
    jitted = jax.jit(lambda *args: solve(*args))  # a cache of its own, not that of `solve`
    steps = [
        int(jitted(Implicit(CG(50, rtol=t)), *data()).stats["num_matvecs"]) for t in (0.5, 1e-12)
    ]
    assert jitted._cache_size() == 1
    assert steps[0] < steps[1]


def test_vmap_over_hyperparameters_and_damping_equals_a_loop():
    w, lam, tr, va = data()
    many = {"decay": jnp.stack([lam["decay"], lam["decay"] + 1, lam["decay"] - 1])}
    mapped = jax.jit(jax.vmap(lambda lam: solve(Implicit(CG(50, rtol=1e-12)), w, lam, tr, va)))
    got = mapped(many)
    assert got.result.shape == (3,) and got.stats["num_matvecs"].shape == (3,)
    for i in range(3):
        one = {"decay": many["decay"][i]}
        np.testing.assert_allclose(got.grads["decay"][i], dense(w, one, tr, va), rtol=1e-9)

    dampings = jnp.array([0.0, 0.3])
    of_damping = jax.vmap(lambda d: solve(Implicit(Dense(), Hessian(d)), w, lam, tr, va).grads)
    grads = jax.jit(of_damping)(dampings)
    np.testing.assert_allclose(grads["decay"][0], dense(w, lam, tr, va), rtol=1e-9)


def test_scan_carries_the_state_of_hypergrad_init():
    w, lam, tr, va = data()
    response = Implicit(CG(50, rtol=1e-10))

    @jax.jit
    def run(w, lam, tr, va):
        state = bilevel.hypergrad_init(outer, inner, response, w, lam)

        def body(state, _):
            sol = solve(response, w, lam, tr, va, state)
            return sol.state, (sol.grads["decay"], sol.stats["num_matvecs"])

        return jax.lax.scan(body, state, length=3)[1]

    grads, products = run(w, lam, tr, va)
    for g in grads:
        np.testing.assert_allclose(g, dense(w, lam, tr, va), rtol=1e-8)
    assert products[0] > 1 and products[1] == 1 and products[2] == 1  # the warm start is used


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "solver",
    [CG(5), Stochastic(optax.sgd(0.1, momentum=0.5), 5)],
    ids=["cg", "sgd"],
)
def test_state_out_has_the_type_of_state_in(dtype, solver):
    w, lam, tr, va = data(dtype)
    response = Implicit(solver)
    first = bilevel.hypergrad_init(outer, inner, response, w, lam)
    out = jax.eval_shape(lambda s: solve(response, w, lam, tr, va, s), first)

    def types(t):
        return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), t)

    assert types(first) == types(out.state)
    assert types(lam) == types(out.grads)
    assert jax.tree.leaves(out.state)[0].dtype == jnp.promote_types(dtype, jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (w, lam))
    assert types(bilevel.hypergrad_init(outer, inner, response, *shapes)) == types(first)


def test_donated_state_is_reused():
    w, lam, tr, va = data()
    response = Implicit(CG(50, rtol=1e-10))
    step = jax.jit(lambda s, w, lam: solve(response, w, lam, tr, va, s), donate_argnums=0)
    state = bilevel.hypergrad_init(outer, inner, response, w, lam)
    sol = step(state, w, lam)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    again = step(sol.state, w, lam)
    np.testing.assert_allclose(again.grads["decay"], dense(w, lam, tr, va), rtol=1e-8)


def test_checkpointed_inner_loss_gives_the_same():
    w, lam, tr, va = data()
    remat = jax.checkpoint(inner)
    got = jax.jit(bilevel.hypergrad(outer, remat, Implicit(CG(50, rtol=1e-12))))(
        w, lam, inner_batch=tr, outer_batch=va
    )
    np.testing.assert_allclose(got["decay"], dense(w, lam, tr, va), rtol=1e-9)


def test_derivative_of_a_hypergradient_by_a_direct_solver():
    w, lam, tr, va = data()

    def norm(decay):
        g = solve(Implicit(Dense()), w, {"decay": decay}, tr, va).grads["decay"]
        return jnp.sum(g**2)

    got = jax.jit(jax.grad(norm))(lam["decay"])
    want = jax.grad(lambda d: jnp.sum(dense(w, {"decay": d}, tr, va) ** 2))(lam["decay"])
    np.testing.assert_allclose(got, want, rtol=1e-8)


# bfloat16 rounds data and products to 8 bits (4e-3), and the condition number is about 5.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float64, 1e-9), (jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)]
)
def test_dtypes(dtype, rtol):
    w, lam, tr, va = data(dtype)
    sol = jax.jit(solve)(Implicit(CG(30)), w, lam, tr, va)
    exact = dense(*jax.tree.map(lambda x: x.astype(jnp.float64), (w, lam, tr, va)))
    assert sol.grads["decay"].dtype == dtype
    error = np.linalg.norm(np.asarray(sol.grads["decay"], float) - exact) / np.linalg.norm(exact)
    assert error < rtol
    norms = [sol.stats[k].dtype for k in ("rhs_norm", "residual_norm")]
    assert all(d == jnp.promote_types(dtype, jnp.float32) for d in norms)


def test_bfloat16_inner_products_are_summed_in_float32():
    ones = {"a": jnp.ones(4096, jnp.bfloat16)}
    assert float(tree.vdot(ones, ones)) == 4096.0  # bfloat16 sums stop at 256
    hlo = jax.jit(lambda v: tree.vdot(v, v)).lower(ones).as_text()
    assert "reduce" in hlo and "tensor<f32>" in hlo


def test_gauss_newton_and_hessian_agree_where_they_must():
    w, lam, tr, va = data()

    def model(w, lam, batch):
        return batch[0] @ w["kernel"] + w["bias"]

    op = GaussNewton(
        model,
        lambda z, lam, batch: 0.5 * jnp.mean((z - batch[1]) ** 2),
        penalty=lambda w, lam: (
            0.5 * (jnp.sum(jnp.exp(lam["decay"]) * w["kernel"] ** 2) + jnp.sum(w["bias"] ** 2))
        ),
    )
    got = jax.jit(solve)(Implicit(CG(50, rtol=1e-12), op), w, lam, tr, va).grads["decay"]
    np.testing.assert_allclose(got, dense(w, lam, tr, va), rtol=1e-9)


def exact_solution(w, lam, batch):
    """The minimiser of ``inner``, by dense algebra, as a user's own solver would give it."""
    x, y = batch
    design = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], 1)
    penalty = jnp.concatenate([jnp.exp(lam["decay"]), jnp.ones(1, x.dtype)])
    v = jnp.linalg.solve(design.T @ design / len(x) + jnp.diag(penalty), design.T @ y / len(x))
    return {"kernel": v[:4], "bias": v[4]}


def python_solution(w, lam, batch):
    """The same by NumPy, on concrete values only."""
    got = exact_solution(w, lam, jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, batch)))
    float(got["bias"])  # fails on a tracer
    return got


def test_with_response_is_differentiable_everywhere():
    w, lam, tr, va = data()
    solved = bilevel.with_response(exact_solution, inner, Implicit(CG(50, rtol=1e-13)))

    def objective(lam, w, tr, va):
        return outer(solved(w, lam, tr), lam, va)

    def through(lam, w, tr, va):  # the dense algebra itself differentiated
        return outer(exact_solution(w, lam, tr), lam, va)

    want = jax.jit(jax.grad(through))(lam, w, tr, va)["decay"]
    for grad in (jax.jit(jax.grad(objective)), jax.grad(jax.jit(objective))):
        np.testing.assert_allclose(grad(lam, w, tr, va)["decay"], want, rtol=1e-9)

    many = {"decay": jnp.stack([lam["decay"], lam["decay"] + 1])}
    mapped = jax.jit(jax.vmap(jax.grad(objective), (0, None, None, None)))(many, w, tr, va)
    np.testing.assert_allclose(mapped["decay"][0], want, rtol=1e-9)
    per_start = jax.jit(jax.grad(objective, argnums=1))(lam, w, tr, va)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(per_start))


def test_with_response_inside_scan_with_everything_closed_over():
    w, lam, tr, va = data()

    @jax.jit
    def total(lam, w, tr, va, scale):
        def scaled(w, lam, batch):  # closes over a tracer
            return scale * inner(w, lam, batch)

        solved = bilevel.with_response(exact_solution, scaled, Implicit(CG(50, rtol=1e-13)))

        def body(carry, _):
            w, value = carry
            w = solved(w, lam, tr)
            return (w, value + outer(w, lam, va)), None

        return jax.lax.scan(body, (w, jnp.zeros(())), length=2)[0][1]

    want = jax.jit(jax.grad(lambda lam: 2 * outer(exact_solution(w, lam, tr), lam, va)))(lam)[
        "decay"
    ]
    got = jax.jit(jax.grad(total))(lam, w, tr, va, 2.0)["decay"]
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_with_response_accepts_a_solver_in_plain_python():
    w, lam, tr, va = data()
    solved = bilevel.with_response(python_solution, inner, Implicit(Dense()))
    got = jax.grad(lambda lam: outer(solved(w, lam, tr), lam, va))(lam)["decay"]
    want = jax.jit(jax.grad(lambda lam: outer(exact_solution(w, lam, tr), lam, va)))(lam)["decay"]
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_with_response_refuses_derivatives_it_does_not_have():
    w, lam, tr, va = data()
    solved = bilevel.with_response(exact_solution, inner, Implicit(Dense()))

    def closes(scale):
        solved = bilevel.with_response(
            exact_solution, lambda w, lam, b: scale * inner(w, lam, b), Implicit(Dense())
        )
        return outer(solved(w, lam, tr), lam, va)

    assert np.isfinite(closes(2.0))
    with pytest.raises(ValueError, match="closes over"):
        jax.grad(closes)(2.0)
    unread = {**lam, "rate": jnp.ones(())}
    assert np.isfinite(outer(solved(w, unread, tr), lam, va))  # no derivative is asked for
    with pytest.raises(ValueError, match=r"hparams\['rate'\].*Unroll"):
        jax.grad(lambda lam: outer(solved(w, lam, tr), lam, va))(unread)
    with pytest.raises(ValueError, match="result of `solve`"):
        bilevel.with_response(lambda w, lam, b: w["kernel"], inner, Implicit())(w, lam, tr)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import bilevel
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
def inner(w, lam, b):
    return 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)
def outer(w, lam, b):
    return 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2)
k = jax.random.split(jax.random.key(0), 3)
w, lam = jax.random.normal(k[0], (16,)), jnp.zeros(16)
batch = jax.random.normal(k[1], (64, 16)), jax.random.normal(k[2], (64,))
response = bilevel.Implicit(bilevel.CG(30))
step = jax.jit(lambda w, lam, b, s: bilevel.hypergrad_solve(
    outer, inner, response, w, lam, inner_batch=b, outer_batch=b, state=s))
start = bilevel.hypergrad_init(outer, inner, response, w, lam)
plain = step(w, lam, batch, start)
rows, cut = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("data"))
b = jax.device_put(batch, rows)
for place in (NamedSharding(mesh, P()), cut):
    ws, lams, s = jax.device_put((w, lam, start), place)
    got = step(ws, lams, b, s)
    np.testing.assert_allclose(got.grads, plain.grads, rtol=2e-5, atol=1e-6)
    assert got.state.sharding.is_equivalent_to(s.sharding, 1), (got.state.sharding, s.sharding)
    n = step._cache_size()
    step(ws, lams, b, got.state)
    assert step._cache_size() == n, "the state of a call compiled the next one again"
    first = bilevel.hypergrad_init(outer, inner, response, ws, lams)
    assert first.dtype == got.state.dtype and first.shape == got.state.shape
print("sharded ok")
"""


def test_sharded_equals_replicated_on_eight_devices():
    # Another process: the number of virtual devices is fixed when JAX starts.
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "sharded ok" in done.stdout, done.stderr[-3000:]
