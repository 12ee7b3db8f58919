"""``alternate``, ``self_tuning`` and ``global_response``: settings, first states, steps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.calls import leaves
from odd_inputs.case import ANY, REFUSE, Case, Number, evaluate
from odd_inputs.odd import Thing, counts, flags, objects, reals

K = 2


def _alternate(**settings: Any) -> Any:
    given = dict(outer=p.outer, inner=p.inner, response=b.Implicit(b.Dense()),
                 inner_tx=optax.sgd(0.125), outer_tx=optax.sgd(0.125), inner_steps=K)  # fmt: skip
    return b.alternate(**(given | settings))


def _self_tuning(**settings: Any) -> Any:
    given = dict(outer=p.outer, inner=p.inner, inner_tx=optax.sgd(0.125), groups=2,
                 outer_tx=optax.sgd(0.125), inner_steps=K)  # fmt: skip
    return b.self_tuning(**(given | settings))


def _global(**settings: Any) -> Any:
    given = dict(outer=p.outer, inner=p.inner, network=b.StructuredResponse(centred=False),
                 sample=lambda key, lam: lam, inner_tx=optax.sgd(0.125),
                 outer_tx=optax.sgd(0.125), inner_steps=K, draws=2)  # fmt: skip
    return b.global_response(**(given | settings))


MAKERS = {"alternate": _alternate, "self_tuning": _self_tuning, "global_response": _global}
OUTER = {"alternate": p.VALID, "self_tuning": (p.XV[:4], p.YV[:4]), "global_response": p.VALID}


def run(
    door: str, settings: Any = None, *, init: Any = None, step: Any = None, state: Any = None
) -> Number:
    """One step, compiled; the hyperparameters it leaves, and its status."""
    algorithm = MAKERS[door](**(settings or {}))
    start = dict(params=p.W, hparams=p.LAM) | (init or {})
    first = algorithm.init(**start) if state is None else state
    steps = (settings or {}).get("inner_steps", K)
    count = int(steps) if isinstance(steps, (int, np.integer)) and 0 <= steps < 100 else K
    given = dict(inner_batches=p.stacked(max(count, 1)), outer_batch=OUTER[door], key=p.KEY)
    given |= step or {}

    def step_(state: Any) -> Any:
        new, info = algorithm.step(state, **given)
        return new.hparams, info.result

    return Number(*evaluate(step_, first))


@functools.cache
def usual(door: str) -> Any:
    """What a step of the usual settings gives: the oracle for other spellings of them."""
    return run(door).value


def cases() -> Iterator[Case]:
    for door in MAKERS:
        yield from _settings(door)
        yield from _first(door)
        yield from _steps(door)


def _case(door: str, kind: str, where: str, call: Callable[[], Number], *, expect: Any = REFUSE,
          names: tuple[str, ...] = (), own: bool = False, rtol: float = 1e-5) -> Case:  # fmt: skip
    label = f"{door}({where}={kind})"
    return Case("loops", kind, label, call, names or (where,), expect, rtol, own)


def _settings(door: str) -> Iterator[Case]:
    def case(kind: str, where: str, make: Any, expect: Any, own: bool = False) -> Case:
        return _case(door, kind, where, lambda: run(door, {where: make()}), expect=expect, own=own)

    truth = functools.partial(usual, door)
    whole = {"inner_steps": (K, 0 if door == "alternate" else 1)}
    if door == "self_tuning":
        whole |= {"outer_steps": (1, 1), "groups": (2, 1), "warm_up": (1, 0), "seed": (0, 0)}
    if door == "global_response":
        whole |= {"draws": (2, 1), "seed": (0, 0)}
    for where, (value, low) in whole.items():
        for kind, make, legal in counts(value, low=low):
            if where == "seed" and kind in ("negative", "zero"):
                continue
            expect = (ANY if where == "warm_up" else truth) if legal else REFUSE
            yield case(kind, where, make, expect)
    transformations = ["inner_tx", "outer_tx"]
    if door == "self_tuning":
        transformations += ["response_tx", "scale_tx"]
        for kind, make, legal in reals(0.5, strict=True):
            yield case(kind, "scale", make, truth if legal else REFUSE)
        for kind, make, legal in reals(2.0**-10):
            yield case(kind, "entropy", make, ANY if legal else REFUSE)
        for kind, make, _ in objects():
            if kind not in ("none", "list", "tuple", "empty list", "set", "dict"):
                yield case(kind, "shared", make, ANY if kind == "empty string" else REFUSE)
        for kind, make, _ in flags():
            yield case(kind, "tune_scales", make, ANY)
        for kind, make, _ in objects():
            yield case(kind, "linearize", make, ANY if kind == "none" else REFUSE)
    for where in transformations:
        for kind, make, _ in objects(
            ("optax factory", lambda: optax.sgd),
            ("optimizer's update", lambda: optax.sgd(0.1).update),
        ):
            legal = kind == "none" and where in ("response_tx", "scale_tx")
            legal |= kind == "optax factory" and where == "inner_tx" and door == "alternate"
            yield case(kind, where, make, ANY if legal else REFUSE)
    for where in ("outer", "inner"):
        for kind, make, _ in objects():
            if kind not in ("function", "class"):
                yield case(kind, where, make, REFUSE)
        yield case("vector returned", where, lambda: lambda w, lam, b: w, REFUSE)
        yield case("python float returned", where, lambda: lambda w, lam, b: 1.0, REFUSE)
        yield case("none returned", where, lambda: lambda w, lam, b: None, REFUSE)
        yield case("two arguments", where, lambda: lambda w, lam: jnp.sum(w), REFUSE, own=True)
    networks = {"alternate": "response", "self_tuning": "network", "global_response": "network"}
    for kind, make, _ in objects(("a class", lambda: b.Implicit), ("a solver", b.CG)):
        where = networks[door]
        legal = kind == "none" and door == "self_tuning"
        yield case(kind, where, make, ANY if legal else REFUSE)
    if door != "global_response":
        for kind, make, _ in objects(("a bound", b.Positive), ("a dict", lambda: {"a": b.Free()})):
            yield case(kind, "constrain", make, ANY if kind == "none" else REFUSE)
    if door == "global_response":
        for kind, make, _ in objects():
            if kind != "function":
                yield case(kind, "sample", make, REFUSE)
        yield case("another tree", "sample", lambda: lambda key, lam: {"a": lam}, REFUSE)
        yield case("another shape", "sample", lambda: lambda key, lam: lam[:2], REFUSE)
        yield case("none returned", "sample", lambda: lambda key, lam: None, REFUSE)


def _first(door: str) -> Iterator[Case]:
    for where, good in (("params", p.W), ("hparams", p.LAM)):
        for kind, change, verdict in leaves():
            expect = functools.partial(usual, door) if verdict == "same" else (
                ANY if verdict in ("own", "near") else REFUSE)  # fmt: skip
            yield _case(
                door, f"init: {kind}", where,
                lambda w=where, c=change, g=good: run(door, init={w: c(g)}), expect=expect,
                own=verdict == "own",
            )  # fmt: skip


def _steps(door: str) -> Iterator[Case]:
    x, y = p.stacked(K)
    ox, oy = OUTER[door]
    stacks: dict[str, tuple[Any, Any]] = {
        "good": ((x, y), functools.partial(usual, door)),
        "not stacked": (p.TRAIN, REFUSE), "none": (None, REFUSE), "string": ("data", REFUSE),
        "x stacked, y not": ((x, p.Y), REFUSE), "one short": ((x[:-1], y[:-1]), REFUSE),
        "one long": (p.stacked(K + 1), REFUSE), "empty": ((x[:, :0], y[:, :0]), REFUSE),
        "y one batch short": ((x, y[:-1]), REFUSE), "a list of batches": ([p.TRAIN] * K, REFUSE),
        "nan": ((x * np.nan, y), REFUSE), "string beside": ((x, y, "a"), REFUSE),
        "objects beside": ((x, y, np.array([Thing()] * K, object)), REFUSE),
        "generator": ((p.TRAIN for _ in range(K)), REFUSE), "function": (lambda i: p.TRAIN, REFUSE),
        "float32": ((x.astype("f4"), y.astype("f4")), ANY),
    }  # fmt: skip
    for kind, (batches, expect) in stacks.items():
        own = kind in ("none", "a list of batches", "string beside", "objects beside")
        yield _case(door, kind, "inner_batches",
                    lambda v=batches: run(door, step={"inner_batches": v}), expect=expect,
                    names=("inner_batches", "inner_batch"), own=own)  # fmt: skip
    for kind, batch, expect in (
        ("none", None, REFUSE), ("string", "data", REFUSE), ("empty", (ox[:0], oy[:0]), REFUSE),
        ("nan", (ox * np.nan, oy), REFUSE), ("x only", (ox,), REFUSE),
        ("lengths that differ", (ox, oy[:-1]), REFUSE), ("string beside", (ox, oy, "a"), REFUSE),
        ("float32", (ox.astype("f4"), oy.astype("f4")), ANY), ("list", [ox, oy], ANY),
    ):  # fmt: skip
        yield _case(door, kind, "outer_batch",
                    lambda v=batch: run(door, step={"outer_batch": v}), expect=expect,
                    own=True)  # fmt: skip
    draws = door != "alternate"
    for kind, make in (
        ("none", lambda: None), ("number", lambda: 0), ("string", lambda: "seed"),
        ("float", lambda: 0.5), ("two keys", lambda: jax.random.split(p.KEY)), ("object", Thing),
        ("floats", lambda: np.zeros(2)),
    ):  # fmt: skip
        yield _case(door, kind, "key", lambda m=make: run(door, step={"key": m()}),
                    expect=REFUSE if draws else ANY)  # fmt: skip
    for kind, make in (
        ("none", lambda: None), ("params", lambda: p.W), ("string", lambda: "s"), ("dict", dict),
        ("object", Thing), ("another loop's", lambda: _other_state(door)),
        ("another tree's", lambda: MAKERS[door]().init(np.ones(2), p.LAM)),
    ):  # fmt: skip
        yield _case(door, f"state: {kind}", "state", lambda m=make: _stepped(door, m()),
                    own=kind == "another tree's")  # fmt: skip


def _stepped(door: str, state: Any) -> Number:
    algorithm = MAKERS[door]()
    new, info = algorithm.step(state, inner_batches=p.stacked(K), outer_batch=OUTER[door],
                               key=p.KEY)  # fmt: skip
    return Number(new.hparams, info.result)


def _other_state(door: str) -> Any:
    other = "global_response" if door != "global_response" else "alternate"
    return MAKERS[other]().init(p.W, p.LAM)
