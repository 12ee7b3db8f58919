"""Every response with its solvers and every loop, on eight devices and on one.

    python tests/sharding_table.py Auto examples      one mesh and one placement, a line per row

`library/test_sharding.py` reads the lines. Placements: `examples` divides the batches alone (and
hyperparameters of which each example has one), `weights` the parameters too (and what is shaped
like them: optimizer states, adjoints, warm starts); the loss then gathers each weight where it
reads it, as fully sharded training does. `seeds` maps the program over a population of starts,
hyperparameters and keys, and divides that.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import optimistix
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from program_costs import moves, on_eight_devices

import bilevel
from bilevel import CG, Implicit, Neumann, Unroll

EXAMPLES, SEEDS, DEVICES = 256, 16, 8
WHOLE = False  # whether a loss gathers the weights that it reads


def lying(x: Any, *axes: Any) -> Any:
    """``x`` divided in this way, inside a program."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    move = jax.reshard if explicit else jax.lax.with_sharding_constraint
    return jax.tree.map(lambda leaf: move(leaf, P(*axes)), x)


def whole(w: Any) -> Any:
    return lying(w) if WHOLE else w


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
    "Lineax": Implicit(bilevel.Lineax(lineax.CG(0.0, 0.0, max_steps=5)), HESSIAN),
    "FiniteDifference": bilevel.FiniteDifference(TX),
}
STACKED = {
    **{f"Unroll({r})": Unroll(ADAM, 4, remat=r) for r in ("none", "step", "sqrt", "log")},
    "Unroll(truncate)": Unroll(ADAM, 4, truncate=2),
    "Unroll(reverse)": Unroll(ADAM, 4, mode="reverse"),
    "Unroll(forward)": Unroll(ADAM, 4, mode="forward"),
    "Evolution": bilevel.Evolution(TX, 4, particles=2, sigma=0.1),
}


def rate_step(w, lam, batch, t):
    """A gradient step on slice ``t`` of the batches."""
    grads = jax.grad(train)(w, lam, jax.tree.map(lambda x: x[t], batch))
    return jax.tree.map(lambda x, g: x - 0.05 * g, w, grads)


STACKED["UnrollMap"] = bilevel.UnrollMap(rate_step, 4)
SERIES = Implicit(Neumann(3, 0.1))
THREE = valid, train, TX, TX, TX


def drawn(key, lam):
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key), lam)


# Constants by which maid certifies, tries, tightens and accepts within three steps. They are no
# bounds of this loss: where they never certify, hundreds of steps magnify the rounding.
CERTIFICATE = bilevel.Certificate(0.5, 0.2, 0.02)
MAID = {"max_steps": 30, "trials": 2, "accuracy": 0.05, "first_step": 0.05}
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
    "maid": (bilevel.maid(valid, train, CERTIFICATE, **MAID), 1),
    "maid(smoothness)": (
        bilevel.maid(valid, train, CERTIFICATE, smoothness=4.0, **MAID), 1,
    ),
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


def soft(w, lam, step):
    return jax.tree.map(lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.01 * step, 0), w)


def gradient_step(w, lam, batch):
    return jax.tree.map(lambda x, g: x - 0.2 * g, w, jax.grad(train)(w, lam, batch))


def hypergradient(inner: Any, response: Any) -> Any:
    """``call(w, lam, inner, outer, key)``: a hypergradient."""

    def call(w: Any, lam: Any, batch: Any, outer: Any, key: Any) -> Any:
        solved = bilevel.hypergrad_solve(
            valid, inner, response, w, lam, inner_batch=batch, outer_batch=outer, key=key
        )
        return solved.params, solved.grads, solved.value

    return call


def minimized(**settings: Any) -> Any:
    def call(w: Any, lam: Any, batch: Any, outer: Any, key: Any) -> Any:
        end = bilevel.minimize(train, w, lam, batch, tol=0.0, max_steps=12, **settings)
        return end.params, end.stats["value"], end.stats["stationarity"]

    return call


def through_a_solve(w: Any, lam: Any, batch: Any, outer: Any, key: Any) -> Any:
    solve = bilevel.with_response(
        lambda w, lam, batch: bilevel.minimize(train, w, lam, batch, max_steps=60).params,
        train, Implicit(CG(5), HESSIAN),
    )  # fmt: skip

    def value(lam: Any) -> Any:
        end = solve(w, lam, batch)
        return valid(end, lam, outer), end

    (found, end), grads = jax.value_and_grad(value, has_aux=True)(lam)
    return end, grads, found


def whole_run(w: Any, lam: Any, batch: Any, outer: Any, key: Any) -> Any:
    algorithm = LOOPS["alternate"][0]

    def sample(key: Any) -> Any:
        noise = 0.1 * jax.random.normal(key, (2, 1, 1))
        return jax.tree.map(lambda x: x[None] + noise, batch), outer

    run = bilevel.scan_run(algorithm, algorithm.init(w, lam), sample, 3, key=key)
    return run.state.params, run.state.hparams, run.infos.value


OTHERS = {
    "scan_run": whole_run,
    "accumulate": hypergradient(bilevel.accumulate(train, 4), Implicit(CG(5), HESSIAN)),
    "Composite": hypergradient(bilevel.Composite(train, soft, 1.0), Implicit(CG(5))),
    "FixedPoint": hypergradient(bilevel.FixedPoint(gradient_step), Implicit(Neumann(5, 1.0))),
    "Root": hypergradient(bilevel.Root(jax.grad(train)), Implicit(Neumann(5, 0.1))),
    "minimize": minimized(),
    "minimize(curvatures)": minimized(curvatures=(0.05, 4.0)),
    "minimize(prox)": minimized(prox=soft),
    "minimize(optimistix)": minimized(solver=optimistix.BFGS(1e-9, 1e-9)),
    "with_response": through_a_solve,
}


def per_example(w, batch):
    return 0.5 * jnp.sum((model(w, batch[0]) - batch[1]) ** 2, -1)


def weighted(w, lam, batch):
    return jnp.mean(jnp.exp(lam["e"]) * per_example(w, batch)) + penalty(w, lam)


def influences(response: Any, rows: Any = None, **settings: Any) -> Any:
    def call(w: Any, lam: Any, batch: Any, outer: Any, key: Any) -> Any:
        if rows is not None:
            on_a_mesh = not jax.sharding.get_abstract_mesh().empty
            settings["batches"] = lying(jnp.asarray(rows), None, "d") if on_a_mesh else rows
        got = bilevel.influence(
            per_example, response, w, batch, outer,
            penalty=lambda w: penalty(w, lam), key=key, **settings,
        )  # fmt: skip
        return got.params, got.scores, got.value

    return call


OF_STEPS = np.random.default_rng(0).permutation(EXAMPLES).reshape(2, -1)[:, :64]
WEIGHTS = {  # a hyperparameter per example, divided as the examples
    **{
        f"weights of examples, {name}": hypergradient(weighted, response)
        for name, response in {
            "CG": SOLVERS["CG"], "Neumann": SOLVERS["Neumann"],
            "FiniteDifference": SOLVERS["FiniteDifference"],
        }.items()
    },
    "weights of examples, Unroll": hypergradient(weighted, Unroll(ADAM, 2, remat="sqrt")),
    "influence(CG)": influences(SOLVERS["CG"]),
    "influence(CG, per query)": influences(SOLVERS["CG"], per_query=True),
    "influence(Unroll)": influences(Unroll(ADAM, 2)),
    "influence(Unroll, rows)": influences(Unroll(ADAM, 2), OF_STEPS),
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
        "weights": 0.3 * jax.random.normal(next(k), (EXAMPLES,)),
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

            def step(state: Any, _: None) -> Any:
                state, info = algorithm.step(state, inner_batches=inner, outer_batch=outer, key=key)
                return state, info.value

            # More than one: adjoints and warm starts begin at zero.
            state, values = jax.lax.scan(step, algorithm.init(w, lam), length=3)
            return state.params, state.hparams, values

        return call, count
    if name in WEIGHTS:
        return WEIGHTS[name], 2 if name == "weights of examples, Unroll" else None
    if name in OTHERS:
        return OTHERS[name], None
    return hypergradient(train, {**SOLVERS, **STACKED}[name]), 4 if name in STACKED else None


def batches_of(d: dict[str, Any], count: int | None) -> tuple[Any, Any]:
    outer = jax.tree.map(lambda x: x[-1], d["stack"])
    if count is None:
        return jax.tree.map(lambda x: x[0], d["stack"]), outer
    return jax.tree.map(lambda x: x[:count], d["stack"]), outer


def cost(compiled: Any) -> tuple[float, float]:
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def placed(name: str, placement: str) -> tuple[Any, Any, Any]:
    """A program, what it reads, and how a placement divides that."""
    call, count = program(name)
    d = data()
    inner, outer = batches_of(d, count)
    lam = d["lam"] | ({"e": d["weights"]} if name in WEIGHTS else {})
    if placement == "seeds":
        k = jax.random.split(d["key"], SEEDS)
        w, lam = jax.vmap(lambda k: drawn(k, (d["w"], lam)))(k)
        call = jax.vmap(call, in_axes=(0, 0, None, None, 0))
        return call, (w, lam, inner, outer, k), (P("d"), P("d"), P(), P(), P("d"))
    of_w = {"a": P(None, "d"), "b": P("d")} if placement == "weights" else P()
    of_lam = {k: P("d") if k == "e" else P() for k in lam}
    of_batch = P("d") if count is None else P(None, "d")
    return call, (d["w"], lam, inner, outer, d["key"]), (of_w, of_lam, of_batch, P("d"), P())


def row(name: str, mesh: Any, placement: str) -> dict[str, Any]:
    """One program on one device and on all: how far apart, and what each costs."""
    global WHOLE
    call, args, specs = placed(name, placement)
    WHOLE = False
    alone = jax.jit(call).lower(*args).compile()
    expected = alone(*args)
    WHOLE = placement == "weights"
    with jax.set_mesh(mesh):
        args = jax.device_put(args, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        if placement == "seeds" and AxisType.Explicit in mesh.axis_types:
            # JAX maps no loop over an explicit axis whose carry begins with a constant.
            call = jax.shard_map(call, in_specs=specs, out_specs=P("d"), check_vma=False)
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
    for name in names or [*UNITS, *SOLVERS, *STACKED, *LOOPS, *OTHERS, *WEIGHTS]:
        try:
            found = row(name, mesh, placement)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        sys.stdout.write(json.dumps({"name": name, **found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
