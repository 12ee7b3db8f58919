"""What the main programs cost, counted by the compiler: a regression gate without a clock.

    python tests/program_costs.py            print the numbers of this checkout
    python tests/program_costs.py --write    and put them into tests/program_costs.json

`library/test_program_costs.py` holds a checkout against the file. The programs are compiled for
eight virtual devices, the examples divided over them, parameters on each: so that a gather, or a
batch that is copied to every device, shows too. Of each program:

- `gradients`: floating-point operations over those of one inner gradient, both as XLA counts
  them. XLA counts the body of a loop once,
- `products`: so the matrix products of the traced program are counted too, with the lengths of its
  scans, over those of one inner gradient,
- `temporary`: bytes that XLA reserves beside arguments and results, on one device,
- `compilations`: of calls in a row, each with what the one before returned,
- `callbacks`: calls from the program back to the host,
- `moves`: collectives by name.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevel
from bilevel.problem.two_losses import Problem
from bilevel.run.segments import compiled_steps, floats_of

FILE = Path(__file__).with_suffix(".json")
STEPS = 16
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def on_eight_devices() -> None:
    """Start this program again with eight virtual devices: their number is fixed before."""
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    if not devices.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **devices})


def model(w, x):
    return jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"]


def half_square(out, y):
    return 0.5 * jnp.mean((out - y) ** 2)


def valid(w, lam, batch):
    return half_square(model(w, batch[0]), batch[1])


def penalty(w, lam):
    return sum(jnp.exp(lam[k]) * jnp.sum(w[k] ** 2) for k in "abc")


def train(w, lam, batch):
    return valid(w, lam, batch) + penalty(w, lam)


def setting() -> dict[str, Any]:
    """Parameters on each of the devices, examples divided over them."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))

    def put(tree: Any, *axes: Any) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, P(*axes)))

    k = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"a": (16, 32), "b": (32, 32), "c": (32, 2)}
    w = {name: jax.random.normal(next(k), s) / s[0] ** 0.5 for name, s in shapes.items()}
    x, y = jax.random.normal(next(k), (STEPS, 64, 16)), jax.random.normal(next(k), (STEPS, 64, 2))
    return {
        "w": put(w),
        "lam": put({name: jnp.float32(-3.0) for name in shapes}),
        "stack": put((x, y), None, "d"),
        "batch": put((x[0], y[0]), "d"),
        "key": put(jax.random.key(1)),
    }


def hypergradient(response: Any, stacked: bool = False) -> Callable[..., Any]:
    def make(s: dict[str, Any]) -> Any:
        batch = s["stack"] if stacked else s["batch"]
        state = bilevel.hypergrad_init(valid, train, response, s["w"], s["lam"])
        call = jax.jit(
            lambda w, lam, state, inner, outer: bilevel.hypergrad_solve(
                valid, train, response, w, lam,
                inner_batch=inner, outer_batch=outer, state=state,
            )
        )  # fmt: skip

        def again(args: Any, out: Any) -> Any:
            return (*args[:2], out.state, *args[3:])

        placed = jax.device_put(state, s["batch"][0].sharding.update(spec=P()))
        return call, (s["w"], s["lam"], placed, batch, s["batch"]), again

    return make


def loop(algorithm: Any, inner: int | None, key: bool = False) -> Callable[..., Any]:
    def make(s: dict[str, Any]) -> Any:
        state = algorithm.init(s["w"], s["lam"])
        batches = s["batch"] if inner is None else jax.tree.map(lambda x: x[:inner], s["stack"])
        step = jax.jit(
            lambda state, inner, outer, key: algorithm.step(
                state, inner_batches=inner, outer_batch=outer, key=key
            )
        )
        state = jax.device_put(state, s["batch"][0].sharding.update(spec=P()))
        args = (state, batches, s["batch"], s["key"] if key else None)
        return step, args, lambda args, out: (out[0], *args[1:])

    return make


def pass_of_a_run(name: str) -> Callable[..., Any]:
    def make(s: dict[str, Any]) -> Any:
        run = compiled_steps(Problem(valid, train), optax.adam(1e-3))
        state = run.begin(s["w"], s["lam"], None, None)
        state = jax.device_put(state, s["batch"][0].sharding.update(spec=P()))
        step = (state, s["lam"], s["batch"])
        if name in ("advance", "link"):
            return getattr(run, name), step, lambda args, out: (out[0], *args[1:])
        carried = (
            [jnp.ones_like(x) for x in floats_of(state)],
            jax.tree.map(jnp.zeros_like, s["lam"]),
        )
        fixed = step if name == "pull" else (run.link(*step)[2], *step)
        return getattr(run, name), (*fixed, *carried), lambda args, out: (*fixed, *out)

    return make


CG = bilevel.Implicit(bilevel.CG(5), bilevel.Hessian(damping=0.1))
NEUMANN = bilevel.Implicit(bilevel.Neumann(5), bilevel.Hessian(damping=0.1))
GAUSS_NEWTON = bilevel.GaussNewton(
    lambda w, lam, batch: model(w, batch[0]), lambda out, lam, batch: half_square(out, batch[1]),
    penalty=penalty, damping=0.1, independent_examples=True,
)  # fmt: skip
SGD = optax.sgd(0.01)
PROGRAMS = {
    "hypergradient, CG(5)": hypergradient(CG),
    "hypergradient, Neumann(5)": hypergradient(NEUMANN),
    "hypergradient, Woodbury": hypergradient(bilevel.Implicit(bilevel.Woodbury(), GAUSS_NEWTON)),
    **{
        f"hypergradient, Unroll({remat})": hypergradient(
            bilevel.Unroll(optax.adam(1e-3), STEPS, remat=remat), stacked=True
        )
        for remat in ("none", "sqrt", "log")
    },
    "alternate, Neumann(5)": loop(
        bilevel.alternate(valid, train, NEUMANN, SGD, optax.adam(0.1), 4), 4
    ),
    "self_tuning": loop(bilevel.self_tuning(valid, train, SGD, SGD, 2), 2, key=True),
    "soba": loop(bilevel.soba(valid, train, SGD, SGD, SGD), 1),
    **{
        f"metagradient, {name}": pass_of_a_run(name)
        for name in ("advance", "pull", "link", "follow")
    },
}


def multiplications(jaxpr: Any) -> int:
    """Of the matrix products of a traced program, with the lengths of its scans; of branches the
    costliest; the body of a loop whose length is unknown once."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += (
                eqn.outvars[0].aval.size
                * jnp.prod(jnp.array([1, *(shape[i] for i in contracted)])).item()
            )
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inside = []
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    inside.append(multiplications(part))
        total += (max if eqn.primitive.name == "cond" else sum)([0, *inside]) * times
    return total


def callbacks(text: str) -> int:
    """Calls back to the host, in a compiled program."""
    return len(re.findall(r'custom_call_target="[^"]*callback', text))


def moves(text: str) -> dict[str, int]:
    """Collectives of a compiled program: how many of each name."""
    found = re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text)
    return {name: found.count(name) for name in sorted(set(found))}


def compilations(compiled: Any, args: Any, again: Callable[..., Any]) -> int:
    """How many programs the calls of a loop take: 2 where the first returns another kind."""

    def kind(args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        return treedef, [
            (
                x.shape,
                x.dtype,
                getattr(x, "weak_type", False),
                x.sharding.is_fully_replicated or x.sharding,
            )
            for x in leaves
        ]

    mine = jax.tree.map(jnp.copy, args)  # some are donated
    return 1 if kind(again(args, compiled(*mine))) == kind(args) else 2


def measure(program: Callable[..., Any], s: dict[str, Any], unit: tuple[float, float]) -> Any:
    call, args, again = program(s)
    traced = call.trace(*args)
    compiled = traced.lower().compile()
    text = compiled.as_text()
    return {
        "gradients": round(compiled.cost_analysis()["flops"] / unit[0], 3),
        "products": round(multiplications(traced.jaxpr.jaxpr) / unit[1], 3),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "compilations": compilations(compiled, args, again),
        "callbacks": callbacks(text),
        "moves": moves(text),
    }


def everything() -> dict[str, Any]:
    s = setting()
    gradient = jax.jit(jax.grad(train)).trace(s["w"], s["lam"], s["batch"])
    compiled = gradient.lower().compile()
    unit = compiled.cost_analysis()["flops"], multiplications(gradient.jaxpr.jaxpr)
    return {name: measure(program, s, unit) for name, program in PROGRAMS.items()}


if __name__ == "__main__":
    on_eight_devices()
    numbers = json.dumps(everything(), indent=1) + "\n"
    if "--write" in sys.argv[1:]:
        FILE.write_text(numbers)
    sys.stdout.write(numbers)
