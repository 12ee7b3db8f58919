"""Every response with its solvers and every loop, on eight devices and on one.

    python tests/sharding_table.py Auto examples      one mesh and one placement, a line per row

`library/test_sharding.py` reads the lines. Placements: `examples` divides the batches alone,
`weights` the parameters too (and what is shaped like them: optimizer states, adjoints, warm
starts); the loss then gathers each weight where it reads it, as fully sharded training does.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from program_costs import moves, on_eight_devices

import bilevel
from bilevel import CG, Implicit, Neumann, Unroll

EXAMPLES, DEVICES = 256, 8
WHOLE = False  # whether a loss gathers the weights that it reads


def whole(w: Any) -> Any:
    if not WHOLE:
        return w
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        return jax.tree.map(lambda x: jax.reshard(x, P()), w)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), w)


def model(w, x):
    w = whole(w)
    return jnp.tanh(x @ w["a"]) @ w["b"]


def half_square(out, y):
    return 0.5 * jnp.mean(jnp.sum((out - y) ** 2, -1))


def valid(w, lam, batch):
    return half_square(model(w, batch[0]), batch[1])


def penalty(w, lam):
    return sum(jnp.exp(lam[k]) * jnp.sum(w[k] ** 2) for k in "ab")


def train(w, lam, batch):
    return valid(w, lam, batch) + penalty(w, lam)


HESSIAN = bilevel.Hessian(damping=0.3)
GAUSS_NEWTON = bilevel.GaussNewton(
    lambda w, lam, batch: model(w, batch[0]), lambda out, lam, batch: half_square(out, batch[1]),
    penalty=penalty, damping=0.3, independent_examples=True,
)  # fmt: skip
TX = optax.sgd(0.05)
ADAM = optax.adam(0.05)
UNITS = ("gradient", "product")  # what the collectives of the others are held against
SOLVERS = {
    "Identity": Implicit(bilevel.Identity()),
    "Dense": Implicit(bilevel.Dense(), HESSIAN),
    "CG": Implicit(CG(5), HESSIAN),
    "CG(Diagonal)": Implicit(CG(5, preconditioner=bilevel.Diagonal()), GAUSS_NEWTON),
    "CG(KFAC)": Implicit(CG(5, preconditioner=bilevel.KFAC()), GAUSS_NEWTON),
    "CG(EKFAC)": Implicit(CG(5, preconditioner=bilevel.EKFAC()), GAUSS_NEWTON),
    "Neumann": Implicit(Neumann(5), HESSIAN),
    "Stochastic": Implicit(bilevel.Stochastic(TX, 5), HESSIAN),
    "Nystrom": Implicit(bilevel.Nystrom(5), GAUSS_NEWTON),
    "Nystrom(gaussian)": Implicit(bilevel.Nystrom(5, True), GAUSS_NEWTON),
    "DynamicLanczos": Implicit(bilevel.DynamicLanczos(5), HESSIAN),
    "EKFAC": Implicit(bilevel.EKFAC(), GAUSS_NEWTON),
    "EKFAC(rank)": Implicit(bilevel.EKFAC(rank=3), GAUSS_NEWTON),
    "DualCG": Implicit(bilevel.DualCG(5), GAUSS_NEWTON),
    "Woodbury": Implicit(bilevel.Woodbury(), GAUSS_NEWTON),
    "Woodbury(rows)": Implicit(bilevel.Woodbury(structured=False), GAUSS_NEWTON),
    "FiniteDifference": bilevel.FiniteDifference(TX),
}
STACKED = {
    **{f"Unroll({r})": Unroll(ADAM, 4, remat=r) for r in ("none", "sqrt", "log")},
    "Unroll(reverse)": Unroll(ADAM, 4, mode="reverse"),
    "Unroll(forward)": Unroll(ADAM, 4, mode="forward"),
    "Evolution": bilevel.Evolution(TX, 4, particles=2, sigma=0.1),
}
SERIES = Implicit(Neumann(3, 0.1))
THREE = valid, train, TX, TX, TX


def drawn(key, lam):
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key), lam)


LOOPS = {  # with the number of their training batches, and what the batches are wrapped in
    "alternate": (bilevel.alternate(valid, train, SERIES, ADAM, ADAM, 2), 2),
    "BestResponse": (
        bilevel.alternate(
            valid, train,
            bilevel.BestResponse(bilevel.StructuredResponse(gain_scale=0.3), TX, 1, groups=8),
            TX, TX, 2,
        ),
        2,
    ),
    "self_tuning": (bilevel.self_tuning(valid, train, TX, TX, 2, groups=8), 2),
    "f2sa": (bilevel.f2sa(valid, train, TX, TX, 2), 2),
    "pbgd": (bilevel.pbgd(valid, train, TX, TX, 2, penalized_tx=TX), 2),
    "bome": (bilevel.bome(valid, train, TX, TX, 2), 2),
    "hoag": (bilevel.hoag(valid, train, max_steps=30), 1),
    "bo_rep": (bilevel.bo_rep(valid, train, TX, 0.05, 2), 3),
    "global_response": (
        bilevel.global_response(valid, train, bilevel.Hypernetwork((3,)), drawn, TX, TX, 2,
                                draws=2),
        2,
    ),
    "soba": (bilevel.soba(*THREE), 1),
    "saba": (bilevel.saba(*THREE, 2, 2), 1),
    "fsla": (bilevel.fsla(*THREE, 0.5), 1),
    "mrbo": (bilevel.mrbo(valid, train, TX, TX, 0.5, 0.5, 2, 0.1), 4),
    "srba": (bilevel.srba(*THREE, 3), 1),
    "spaba": (bilevel.spaba(*THREE, 1e-6), 1),
    "stocbio": (bilevel.stocbio(valid, train, TX, TX, 2, 3, 0.1), 6),
    "amigo": (bilevel.amigo(*THREE, 2, 3), 6),
}  # fmt: skip


def data() -> dict[str, Any]:
    k = iter(jax.random.split(jax.random.key(0), 8))
    return {
        "w": {
            "a": jax.random.normal(next(k), (8, 16)) / 3,
            "b": jax.random.normal(next(k), (16, 8)) / 4,
        },
        "lam": {"a": jnp.array(-3.0), "b": jnp.array(-2.0)},
        "stack": (
            jax.random.normal(next(k), (8, EXAMPLES, 8)),
            jax.random.normal(next(k), (8, EXAMPLES, 8)),
        ),
        "key": jax.random.key(1),
    }


def wrapped(name: str, inner: Any, outer: Any, all_of: Any) -> tuple[Any, Any]:
    if name == "saba":
        return bilevel.Indexed(inner, jnp.zeros(1, jnp.int32)), bilevel.Indexed(outer, jnp.array(1))
    if name in ("srba", "spaba"):
        return bilevel.Anchored(inner, all_of), bilevel.Anchored(outer, all_of)
    return inner, outer


def one_product(name: str) -> Any:
    """The gradient of the inner loss, or one product with its Hessian alone."""

    def call(w: Any, lam: Any, inner: Any, outer: Any, key: Any) -> Any:
        if name == "gradient":
            found = jax.grad(train)(w, lam, inner)
        else:
            found = bilevel.Problem(valid, train).hvp(w, lam, inner, jax.tree.map(jnp.ones_like, w))
        return found, lam, jnp.zeros(())

    return call


def program(name: str) -> tuple[Any, Any]:
    """``call(w, lam, inner, outer, key)``, and how many training batches it reads (None: one)."""
    if name in UNITS:
        return one_product(name), None
    if name in LOOPS:
        algorithm, count = LOOPS[name]

        def call(w: Any, lam: Any, inner: Any, outer: Any, key: Any) -> Any:
            inner, outer = wrapped(name, inner, outer, outer)
            state, info = algorithm.step(
                algorithm.init(w, lam), inner_batches=inner, outer_batch=outer, key=key
            )
            return state.params, state.hparams, info.value

        return call, count
    response = {**SOLVERS, **STACKED}[name]
    count = None
    if name in STACKED:
        count = 8 if name == "Evolution" else 4

    def call(w: Any, lam: Any, inner: Any, outer: Any, key: Any) -> Any:
        found = bilevel.hypergrad_solve(
            valid, train, response, w, lam, inner_batch=inner, outer_batch=outer, key=key
        )
        return found.params, found.grads, found.value

    return call, count


def batches_of(d: dict[str, Any], count: int | None) -> tuple[Any, Any]:
    outer = jax.tree.map(lambda x: x[-1], d["stack"])
    if count is None:
        return jax.tree.map(lambda x: x[0], d["stack"]), outer
    return jax.tree.map(lambda x: x[:count], d["stack"]), outer


def cost(compiled: Any) -> tuple[float, float]:
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def row(name: str, mesh: Any, weights: bool) -> dict[str, Any]:
    """One program on one device and on all: how far apart, and what each costs."""
    global WHOLE

    def put(tree: Any, *axes: Any) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, P(*axes)))

    call, count = program(name)
    d = data()
    inner, outer = batches_of(d, count)
    WHOLE = False
    alone = jax.jit(call).lower(d["w"], d["lam"], inner, outer, d["key"]).compile()
    expected = alone(d["w"], d["lam"], inner, outer, d["key"])
    WHOLE = weights
    with jax.set_mesh(mesh):
        w = {"a": put(d["w"]["a"], None, "d"), "b": put(d["w"]["b"], "d")} if weights else d["w"]
        axes = ("d",) if count is None else (None, "d")
        args = (
            w if weights else put(w),
            put(d["lam"]),
            put(inner, *axes),
            put(outer, "d"),
            put(d["key"]),
        )
        together = jax.jit(call).lower(*args).compile()
        got = together(*args)
    far = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        error = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        far = max(far, error if np.isfinite(error) else np.inf)
    kept = all(
        x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(jax.tree.leaves(got[0]), jax.tree.leaves(args[0]), strict=True)
    )
    (flops, bytes_), (flops_1, bytes_1) = cost(together), cost(alone)
    return {
        "far": far,
        "kept": kept,
        "flops": round(flops / flops_1, 3),
        "bytes": round(bytes_ / bytes_1, 3),
        "moves": moves(together.as_text()),
    }


def main(kind: str, placement: str, names: list[str]) -> None:
    on_eight_devices()
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(getattr(AxisType, kind),))
    for name in names or [*UNITS, *SOLVERS, *STACKED, *LOOPS]:
        try:
            found = row(name, mesh, placement == "weights")
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        sys.stdout.write(json.dumps({"name": name, **found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
