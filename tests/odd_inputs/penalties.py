"""Penalty methods, hyper-optimizers and the carried Krylov subspace: settings, states, steps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.case import ANY, REFUSE, Case, Number, evaluate
from odd_inputs.odd import choices, counts, objects, reals

K = 2
LOOPS = {"f2sa": b.f2sa, "pbgd": b.pbgd, "bome": b.bome}


def _loop(door: str, **settings: Any) -> Any:
    given = dict(outer=p.outer, inner=p.inner, inner_tx=optax.sgd(0.125),
                 outer_tx=optax.sgd(0.125), inner_steps=K)  # fmt: skip
    return LOOPS[door](**(given | settings))


def run(door: str, settings: Any = None, **given: Any) -> Number:
    """One step; the hyperparameters it leaves, and its status."""
    algorithm = _loop(door, **(settings or {}))
    arguments = dict(inner_batches=p.stacked(K), outer_batch=p.VALID) | given
    state = algorithm.init(p.W + 0.125, p.LAM)

    def step(state: Any) -> Any:
        new, info = algorithm.step(state, **arguments)
        return new.hparams, info.result

    value, result = evaluate(step, state)
    # One step from a point that is no minimum: the difference is not to be trusted, which the
    # status says. Here the question is the number.
    return Number(value, 0 if int(result) < int(b.Status.invalid_setting) else result)


@functools.cache
def usual(door: str) -> Any:
    """What a step of the usual settings gives: the oracle for other spellings of them."""
    return run(door).value


OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "hypergradient_descent": (b.hypergradient_descent, {"learning_rate": 0.5}),
    "fedhyper_global": (b.fedhyper_global, {}),
    "fedhyper_server": (b.fedhyper_server, {"learning_rate": 0.03125}),
    "fedhyper_client": (b.fedhyper_client, {"learning_rate": 0.5}),
    "complex_momentum": (b.complex_momentum, {"learning_rate": 0.5}),
}
GRADS = (np.array([1.0, -2.0, 0.5]), np.array([0.75, -1.0, 1.0]))


def updated(door: str, **settings: Any) -> Number:
    """Three updates, and the state they leave."""
    make, given = OPTIMIZERS[door]
    tx = make(**(given | settings))

    def steps(grads: Any) -> Any:
        w = jnp.ones(3)
        state, updates = tx.init(w), w
        for g in (grads[0], grads[1], grads[0]):
            updates, state = tx.update(g, state, w)
        # The settings show in the numbers of the state.
        rates = [jnp.asarray(getattr(state, n, 0.0)) for n in ("rate", "factor", "score")]
        return jnp.concatenate([updates, jnp.stack(rates)]), jnp.zeros((), jnp.int32)

    return Number(*evaluate(steps, tuple(map(jnp.asarray, GRADS))))


@functools.cache
def optimized(door: str, field: str, value: Any) -> Any:
    return updated(door, **{field: value}).value


def carried(subspace: Any) -> Number:
    """Two systems in sequence."""
    solver, matrix = b.DynamicLanczos(subspace), jnp.asarray(p.hessian())

    def solve(rhs: Any) -> Any:
        _, state = solver.solve_from(lambda v: matrix @ v, rhs, solver.init_state(rhs))
        solution, _ = solver.solve_from(lambda v: matrix @ v, rhs, state)
        return solution.value, solution.result * 0

    return Number(*evaluate(solve, jnp.asarray(p.W)))


def cases() -> Iterator[Case]:
    for door in LOOPS:
        yield from _loop_cases(door)
    yield from _optimizer_cases()
    for kind, make, legal in counts(10):
        yield Case("penalties", kind, f"DynamicLanczos(subspace={kind})",
                   lambda m=make: carried(m()), ("subspace",),
                   (lambda: carried(10).value) if legal else REFUSE)  # fmt: skip


def _loop_cases(door: str) -> Iterator[Case]:
    def case(kind: str, where: str, call: Callable[[], Number], expect: Any,
             names: tuple[str, ...] = (), own: bool = False) -> Case:  # fmt: skip
        label = f"{door}({where}={kind})"
        return Case("penalties", kind, label, call, names or (where,), expect, 1e-5, own)

    truth = functools.partial(usual, door)
    fields: list[tuple[str, Any, Any]] = [("inner_steps", counts(K), truth)]
    if door == "f2sa":
        fields += [("order", counts(1), truth), ("growth", reals(2.0**-3), None)]
    if door == "bome":
        fields += [("eta", reals(0.5), truth), ("barrier", choices("value", "GAP"), None)]
    else:
        fields += [("penalty", reals(10.0, strict=True), truth)]
    for where, odd, oracle in fields:
        for kind, make, legal in odd:
            if where == "penalty" and kind == "function":
                continue  # a schedule
            expect = (oracle or ANY) if legal else REFUSE
            yield case(kind, where, lambda w=where, m=make: run(door, {w: m()}), expect)
    if door != "bome":
        for kind, schedule in (
            ("an array", lambda k: jnp.ones(2)), ("nothing", lambda k: None),
            ("negative", lambda k: -1.0), ("nan", lambda k: jnp.nan),
            ("complex", lambda k: 1j), ("no argument", lambda: 1.0),
        ):  # fmt: skip
            yield case(f"schedule: {kind}", "penalty",
                       lambda s=schedule: run(door, {"penalty": s}), REFUSE,
                       own=kind == "no argument")  # fmt: skip
    for where in ("inner_tx", "outer_tx", "penalized_tx"):
        for kind, make, _ in objects(("optax factory", lambda: optax.sgd)):
            legal = kind == "none" and where == "penalized_tx"
            yield case(kind, where, lambda w=where, m=make: run(door, {w: m()}),
                       truth if legal else REFUSE)  # fmt: skip
    for where in ("outer", "inner"):
        yield case("vector returned", where,
                   lambda w=where: run(door, {w: lambda w, lam, b: w}), REFUSE)  # fmt: skip
        yield case("none returned", where,
                   lambda w=where: run(door, {w: lambda w, lam, b: None}), REFUSE)  # fmt: skip
    x, y = p.stacked(K)
    for kind, batches in (
        ("not stacked", p.TRAIN), ("none", None), ("one short", (x[:-1], y[:-1])),
        ("one long", p.stacked(K + 1)), ("nan", (x * np.nan, y)),
    ):  # fmt: skip
        yield case(kind, "inner_batches", lambda v=batches: run(door, inner_batches=v), REFUSE,
                   ("inner_batches", "inner_batch"), own=kind == "none")  # fmt: skip
    for kind, state in (("none", None), ("params", p.W), ("another loop's", lambda: _other(door))):
        yield case(f"state: {kind}", "state", lambda s=state: _stepped(door, s), REFUSE)

    def unbounded(w: Any, lam: Any, batch: Any) -> Any:
        return -1e3 * jnp.sum(w**2)

    yield case("unbounded below", "outer", lambda: _many(door, unbounded), REFUSE)


def _other(door: str) -> Any:
    return b.alternate(
        p.outer, p.inner, b.Implicit(b.Dense()), optax.sgd(0.1), optax.sgd(0.1), K
    ).init(p.W, p.LAM)


def _stepped(door: str, state: Any) -> Number:
    state = state() if callable(state) else state
    new, info = _loop(door).step(state, inner_batches=p.stacked(K), outer_batch=p.VALID)
    return Number(new.hparams, info.result)


def _many(door: str, outer: Any) -> Number:
    algorithm = _loop(door, outer=outer)

    def steps(state: Any) -> Any:
        def step(s: Any, _: Any) -> Any:
            s, info = algorithm.step(s, inner_batches=p.stacked(K), outer_batch=p.VALID)
            return s, info.result

        state, results = jax.lax.scan(step, state, length=400)
        return state.hparams, results[-1]

    return Number(*evaluate(steps, algorithm.init(p.W, p.LAM)))


def _optimizer_cases() -> Iterator[Case]:
    numbers: dict[str, list[tuple[str, float, float | None, bool]]] = {
        # name, usual value, least, strictly above it
        "hypergradient_descent": [
            ("learning_rate", 0.5, 0.0, True), ("hyper_rate", 0.25, 0.0, False),
            ("min_rate", 0.125, 0.0, False),
        ],
        "fedhyper_global": [
            ("hyper_rate", 0.25, 0.0, False), ("momentum", 0.5, 0.0, False),
            ("min_rate", 0.5, 0.0, False),
        ],
        "fedhyper_server": [
            ("learning_rate", 0.03125, 0.0, True), ("hyper_rate", 0.25, 0.0, False),
        ],
        "fedhyper_client": [
            ("learning_rate", 0.5, 0.0, True), ("hyper_rate", 0.25, 0.0, False),
            ("global_weight", 0.25, 0.0, False), ("max_growth", 1.5, 1.0, True),
        ],
        "complex_momentum": [
            ("learning_rate", 0.5, 0.0, True), ("beta", 0.5, 0.0, False),
            ("angle", 0.125, None, False),
        ],
    }  # fmt: skip
    for door, fields in numbers.items():
        for where, value, low, strict in fields:
            truth = functools.partial(optimized, door, where, value)
            for kind, make, legal in reals(value, low=low, strict=strict):
                if door == "complex_momentum" and where == "learning_rate" and kind == "function":
                    continue  # a schedule
                yield Case("penalties", kind, f"{door}({where}={kind})",
                           lambda d=door, w=where, m=make: updated(d, **{w: m()}), (where,),
                           truth if legal else REFUSE, 1e-5)  # fmt: skip
    for kind, make, legal in counts(3):
        truth = functools.partial(optimized, "fedhyper_client", "clients", 3)
        yield Case("penalties", kind, f"fedhyper_client(clients={kind})",
                   lambda m=make: updated("fedhyper_client", clients=m()), ("clients",),
                   truth if legal else REFUSE, 1e-5)  # fmt: skip
    for kind, make, _ in objects():
        legal = kind == "none"
        yield Case("penalties", kind, f"hypergradient_descent(direction={kind})",
                   lambda m=make: updated("hypergradient_descent", direction=m()), ("direction",),
                   ANY if legal else REFUSE)  # fmt: skip
