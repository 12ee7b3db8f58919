"""Eight devices: self-tuning on sharded batches and Nystrom on sharded parameters, no gathers."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = r"""
import re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import bilevel
assert jax.device_count() == 8

def valid(w, lam, b):
    x, y = b  # sums, whose sharding an explicit mesh never finds ambiguous
    hidden = jnp.tanh(jnp.sum(x[:, :, None] * w["a"][None], 1))
    return jnp.mean((jnp.sum(hidden * w["b"][None], 1) - y) ** 2)
def train(w, lam, b):
    return valid(w, lam, b) + jnp.exp(lam) * sum(jnp.sum(v**2) for v in w.values())

k = jax.random.split(jax.random.key(0), 6)
params = {"a": jax.random.normal(k[0], (4, 24)) / 2, "b": jax.random.normal(k[1], (24,)) / 4}
lam, key = jnp.float32(-2.0), jax.random.key(3)
inner = jax.random.normal(k[2], (2, 64, 4)), jax.random.normal(k[3], (2, 64))
outer = jax.random.normal(k[4], (64, 4)), jax.random.normal(k[5], (64,))
alg = bilevel.self_tuning(valid, train, optax.sgd(0.05), optax.sgd(0.05), 2, groups=4,
                          network=bilevel.StructuredResponse(gain_scale=0.1))
tune = jax.jit(lambda s, i, o, key: alg.step(s, inner_batches=i, outer_batch=o, key=key))

def nystrom(gaussian):
    response = bilevel.Implicit(bilevel.Nystrom(5, gaussian), bilevel.Hessian(0.1))
    return jax.jit(lambda w, lam, o, key: bilevel.hypergrad_solve(
        valid, train, response, w, lam, inner_batch=o, outer_batch=o, key=key).grads)

state = alg.init(params, lam)
solvers = [nystrom(False), nystrom(True)]
plain = [tune(state, inner, outer, key)] + [f(params, lam, outer, key) for f in solvers]

def moves(compiled):
    found = r"all-gather|all-to-all|collective-permute|all-reduce"
    return set(re.findall(rf" ({found})(?:-start)?\(", compiled.as_text()))

for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        def put(tree, *spec):
            return jax.device_put(tree, NamedSharding(mesh, P(*spec)))
        calls = [(tune, (put(state), put(inner, None, "d"), put(outer, "d"), put(key)))]
        w = {"a": put(params["a"], None, "d"), "b": put(params["b"], "d")}
        calls += [(f, (w, put(lam), put(outer), put(key))) for f in solvers]
        for (f, args), expected in zip(calls, plain):
            compiled = f.lower(*args).compile()
            assert moves(compiled) == {"all-reduce"}, (kind, moves(compiled))
            # float32 sums over eight devices in another order.
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
                         compiled(*args), expected)
        many = bilevel.self_tuning(valid, train, optax.sgd(0.05), optax.sgd(0.05), 2, groups=16)
        try:
            jax.eval_shape(lambda i, o: many.step(state, inner_batches=i, outer_batch=o, key=key),
                           *calls[0][1][1:3])
        except ValueError as error:
            assert kind == AxisType.Explicit and "choose a divisor of 8" in str(error), error
        else:
            assert kind == AxisType.Auto

        parts = bilevel.accumulate(train, 16)
        try:
            jax.eval_shape(parts, calls[0][1][0].params, lam, calls[0][1][2])
        except ValueError as error:
            assert kind == AxisType.Explicit and "a divisor of 8, or a larger" in str(error), error
        else:
            assert kind == AxisType.Auto

from bilevel.testing import CheckFailed, check_algorithm
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
def loss(w, lam, b):
    return jnp.sum((w - b) ** 2) + jnp.exp(lam) * jnp.sum(w**2)
alg = bilevel.alternate(loss, loss, bilevel.Implicit(bilevel.Neumann(1, 0.1)),
                        optax.sgd(0.1), optax.sgd(0.1), 1)
def gathers(state, **given):
    new, info = alg.step(state, **given)
    whole = jax.lax.with_sharding_constraint(new.params, NamedSharding(mesh, P()))
    return new._replace(trained=new.trained._replace(params=whole)), info
call = dict(inner_batches=jnp.zeros((1, 8)), outer_batch=jnp.ones(8), through_fit=False)
w = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("d")))
check_algorithm(alg, w, jnp.float32(0), **call)
try:
    check_algorithm(alg._replace(step=gathers), w, jnp.float32(0), **call)
except CheckFailed as error:
    assert "`state.trained.params` changes its sharding in step 0" in str(error), error
else:
    raise AssertionError("a loop that gathers its parameters passed")
print("sharded ok")
"""


def test_examples_and_columns_stay_where_they_are():
    # Another process: the number of virtual devices is fixed when JAX starts.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "sharded ok" in done.stdout, done.stderr[-3000:]
