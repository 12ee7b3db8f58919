"""The programs of this checkout cost what is committed, counted by the compiler.

Bounds, not equalities: versions of XLA fuse, and so count and reserve, a little differently. A
program may become cheaper; commit the numbers then, `python tests/program_costs.py --write`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import program_costs
import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = json.loads(program_costs.FILE.read_text())
MORE = {"gradients": 1.1, "products": 1.001, "temporary": 1.25}  # at most, over what is committed


@pytest.fixture(scope="module")
def found():
    # Another process: the number of virtual devices is fixed when JAX starts.
    done = subprocess.run(
        [sys.executable, program_costs.__file__],
        # Without the flags of this suite: memory is that of the users' programs.
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMMITTED)
def test_a_program_costs_no_more_than_committed(found, name):
    now, then = found[name], COMMITTED[name]
    for what, factor in MORE.items():
        assert 0 < now[what] <= factor * then[what], (what, now[what], then[what])
    assert now["compilations"] == 1
    assert now["callbacks"] == 0
    assert now["moves"].keys() <= then["moves"].keys(), (now["moves"], then["moves"])
    for kind, count in now["moves"].items():  # XLA joins neighbours, more or fewer of them
        assert count <= 1.5 * then["moves"][kind], (now["moves"], then["moves"])


def test_every_program_is_held(found):
    assert found.keys() == COMMITTED.keys() == program_costs.PROGRAMS.keys()


def test_what_is_counted_shows():
    def calls_back(x):
        jax.debug.callback(lambda x: None, x)
        return x

    compiled = jax.jit(calls_back).lower(1.0).compile()
    assert program_costs.callbacks(compiled.as_text()) == 1

    def product(x, n):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=n)[0]

    x = jnp.ones((3, 3))
    five = jax.make_jaxpr(product, static_argnums=1)(x, 5)
    assert program_costs.multiplications(five.jaxpr) == 5 * 27
    text = "\n  %a = f32[8] all-gather-start(%b), dimensions={0}\n  %c = f32[] all-reduce(%d)\n"
    assert program_costs.moves(text) == {"all-gather": 1, "all-reduce": 1}
    grows = jax.jit(lambda x: jnp.concatenate([x, x])).lower(jnp.ones(1)).compile()
    assert program_costs.compilations(grows, (jnp.ones(1),), lambda args, out: (out,)) == 2
