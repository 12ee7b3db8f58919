"""Every argument of a hypergradient's call, with odd trees, odd leaves and odd objects in it."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.case import ANY, REFUSE, Case, Number
from odd_inputs.odd import Thing, things

# One of each family: a solve, a run in each direction, a population, a difference, a network.
FAMILIES = ("cg", "unroll", "evolution", "difference", "best_response")

Leaf = tuple[str, Callable[[Any], Any], str]
"""Kind, what it makes of a good array, and what must come back: bad, own, same, any."""


def leaves() -> Iterator[Leaf]:
    """In place of one array of floats. ``own``: the caller's loss may be what fails."""
    for kind, make, _ in things():
        if kind not in ("list", "tuple", "dict", "empty list"):  # these are trees
            yield kind, lambda x, make=make: make(), "bad"
    yield "none", lambda x: None, "own"
    yield "list of floats", lambda x: [float(v) for v in np.ravel(x)], "own"
    yield "integers", lambda x: np.ones(np.shape(x), np.int32), "bad"
    yield "booleans", lambda x: np.ones(np.shape(x), bool), "bad"
    yield "complex array", lambda x: np.asarray(x) + 0j, "bad"
    yield "scalar", lambda x: 1.0, "own"
    yield "python int", lambda x: 1, "bad"
    yield "python bool", lambda x: True, "bad"
    yield "extra axis", lambda x: np.asarray(x)[None], "own"
    yield "one short", lambda x: np.asarray(x)[:-1], "own"
    yield "no entries", lambda x: np.zeros((0,)), "own"
    yield "nan inside", lambda x: _put(x, np.nan), "bad"
    yield "inf inside", lambda x: _put(x, np.inf), "bad"
    yield "numpy", np.asarray, "same"
    yield "jax", jnp.asarray, "same"
    yield "fortran order", lambda x: np.asfortranarray(x), "same"
    yield "not contiguous", lambda x: np.repeat(np.asarray(x), 2, 0)[::2], "same"
    yield "float32", lambda x: np.asarray(x, np.float32), "near"


def _put(x: Any, value: float) -> np.ndarray:
    x = np.array(x)
    x.flat[0] = value
    return x


def _case(
    kind: str, where: str, name: str, changes: dict[str, Callable[[], Any]], *,
    expect: Any = REFUSE, rtol: float = 1e-6, own: bool = False, names: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    def call() -> Number:
        return p.solve(p.responses()[name], **{k: make() for k, make in changes.items()})

    label = f"{name}: {where}={kind}"
    return Case("calls", kind, label, call, names or (where,), expect, rtol, own)


def _trees() -> Iterator[Case]:
    for name in FAMILIES:
        truth = p.truths().get(name, ANY)
        response = p.responses()[name]
        for kind, change, verdict in leaves():
            expect = {"same": truth, "near": truth, "own": ANY}.get(verdict, REFUSE)
            rtol = 1e-3 if verdict == "near" else 1e-5
            shared = dict(expect=expect, rtol=rtol, own=verdict == "own")
            for where, good in (("params", p.W), ("hparams", p.LAM)):
                yield _case(kind, where, name, {where: lambda c=change, g=good: c(g)}, **shared)
            # A leaf of a batch may be integers, a scalar or a key: the loss decides.
            batch_expect = {**shared, "own": True, "names": ("inner_batch", "outer_batch",
                                                             "inner", "outer")}  # fmt: skip
            if verdict == "bad" and kind in ("integers", "booleans", "python int", "python bool",
                                             "key", "complex", "complex array"):  # fmt: skip
                batch_expect["expect"] = ANY
            good = p.batch_of(response)
            yield _case(
                kind, "inner_batch", name,
                {"inner_batch": lambda c=change, g=good: (c(g[0]), g[1])}, **batch_expect,
            )  # fmt: skip
            yield _case(
                kind, "outer_batch", name,
                {"outer_batch": lambda c=change: (c(p.XV), p.YV)}, **batch_expect,
            )  # fmt: skip


def _objects() -> Iterator[Case]:
    """Arguments that are not arrays."""
    wrong: dict[str, list[tuple[str, Callable[[], Any]]]] = {
        "outer": [("none", lambda: None), ("string", lambda: "mse"), ("number", lambda: 1.0),
                  ("python float", lambda: lambda *_: 1.0), ("none returned", lambda: _nothing),
                  ("vector", lambda: lambda w, lam, b: w), ("tuple", lambda: _pair),
                  ("complex", lambda: lambda w, lam, b: jnp.sum(w) * 1j),
                  ("integer", lambda: lambda w, lam, b: jnp.sum(w > 0)),
                  ("string returned", lambda: lambda *_: "loss"),
                  ("numpy", lambda: lambda w, lam, b: np.float64(1.0)),
                  ("two arguments", lambda: lambda w, lam: jnp.sum(w)),
                  ("four arguments", lambda: lambda w, lam, b, s: jnp.sum(w)),
                  ("converts", lambda: lambda w, lam, b: float(jnp.sum(w))),
                  ("branches", lambda: _branches)],
        "response": [("none", lambda: None), ("a solver", lambda: b.CG()),
                     ("an operator", lambda: b.Hessian()), ("class", lambda: b.Implicit),
                     ("string", lambda: "implicit"), ("function", lambda: lambda *_: None),
                     ("object", Thing), ("optimizer", lambda: __import__("optax").sgd(0.1))],
        "argnums": [("zero", lambda: 0), ("negative", lambda: -1), ("too high", lambda: 2),
                    ("float", lambda: 1.0), ("string", lambda: "1"), ("none", lambda: None),
                    ("empty", lambda: ()), ("bool", lambda: True), ("repeated", lambda: (1, 1)),
                    ("set", lambda: {1}), ("huge", lambda: 10**30), ("object", Thing),
                    ("array", lambda: np.array([1]))],
        "state": [("string", lambda: "warm"), ("number", lambda: 1.0),
                  ("short", lambda: np.ones(2)),
                  ("tree", lambda: {"a": np.ones(3)}), ("object", Thing), ("list", lambda: [1.0]),
                  ("matrix", lambda: np.ones((3, 3))), ("function", lambda: lambda: None)],
        "key": [("string", lambda: "seed"), ("float", lambda: 0.5), ("object", Thing),
                ("list", lambda: [0, 1]), ("two keys", lambda: jax.random.split(p.KEY, 2)),
                ("function", lambda: lambda: None),
                ("wrong shape", lambda: np.zeros(3, np.uint32))],
        "model_state": [("given", lambda: 1.0), ("string", lambda: "s"), ("array", lambda: p.W)],
    }  # fmt: skip
    wrong["inner"] = wrong["outer"]
    for where, values in wrong.items():
        for name in ("cg", "unroll", "evolution", "best_response"):
            for kind, make in values:
                needed = where != "key" or name in ("evolution", "best_response")
                names = (where, "argnums") if where == "argnums" else (where,)
                if where == "model_state":
                    names = ("model_state", "has_state")
                own = where in ("inner", "outer") and kind in (
                    "two arguments", "four arguments", "converts", "branches")  # fmt: skip
                expect = REFUSE if needed else ANY
                if where in ("outer", "inner") and kind in ("python float", "numpy"):
                    expect = ANY  # a constant, whose derivative is truly zero
                if where == "response":
                    if name != "cg":
                        continue

                    def call(make: Any = make) -> Number:
                        return p.solve(make(), inner_batch=p.TRAIN)

                    yield Case("calls", kind, f"response={kind}", call, ("response",))
                    continue
                if where == "state":
                    yield _state(kind, name, make)
                    continue
                yield _case(kind, where, name, {where: make}, expect=expect, own=own, names=names)


def _state(kind: str, name: str, make: Callable[[], Any]) -> Case:
    def call() -> Number:
        return p.solve(p.responses()[name], state=make(), shared=False)

    return Case("calls", kind, f"{name}: state={kind}", call, ("state",))


def _nothing(w: Any, lam: Any, batch: Any) -> None:
    return None


def _pair(w: Any, lam: Any, batch: Any) -> Any:
    return jnp.sum(w**2), jnp.sum(lam)


def _branches(w: Any, lam: Any, batch: Any) -> Any:
    return jnp.sum(w) if jnp.sum(w) > 0 else jnp.sum(lam)


def _flags() -> Iterator[Case]:
    """``has_aux`` and ``has_state`` that the losses do not keep, and the other way round."""

    def with_state(w: Any, lam: Any, batch: Any, state: Any) -> Any:
        return p.inner(w, lam, batch), state

    for name in ("cg", "unroll", "difference", "best_response"):
        for kind, changes in (
            ("aux promised", {"has_aux": True}),
            ("state promised", {"has_state": True, "model_state": 0.0}),
            ("state not told", {"inner": with_state}),
            ("state not told outside", {"outer": with_state}),
            ("state only inside", {"has_state": True, "model_state": 0.0, "inner": with_state}),
            ("aux not told", {"outer": _pair}),
            ("state without model_state",
             {"has_state": True, "inner": with_state,
              "outer": lambda w, lam, b, s: (p.outer(w, lam, b), 1.0)}),
        ):  # fmt: skip
            names = ("has_aux", "has_state", "inner", "outer", "model_state")
            yield _case(
                kind, "has_state", name, {k: lambda v=v: v for k, v in changes.items()},
                names=names,
            )  # fmt: skip


def _missing() -> Iterator[Case]:
    """Arguments left out, doubled or in the wrong place, through every door."""
    doors = {
        "hypergrad": lambda *a, **k: b.hypergrad(p.outer, p.inner)(*a, **k),
        "value_and_hypergrad": lambda *a, **k: b.value_and_hypergrad(p.outer, p.inner)(*a, **k)[1],
        "hypergrad_solve": lambda *a, **k: (
            b.hypergrad_solve(p.outer, p.inner, b.Implicit(), *a, **k).grads
        ),
    }
    batches = dict(inner_batch=p.TRAIN, outer_batch=p.VALID)
    for door, function in doors.items():
        for kind, args, kwargs, names in (
            ("no hparams", (p.W,), batches, ("hparams",)),
            ("no params", (), batches, ("params",)),
            ("no inner_batch", (p.W, p.LAM), {"outer_batch": p.VALID}, ("inner_batch",)),
            ("no outer_batch", (p.W, p.LAM), {"inner_batch": p.TRAIN}, ("outer_batch",)),
            ("positional batches", (p.W, p.LAM, p.TRAIN, p.VALID), {}, ("inner_batch", "hparams")),
            ("unknown keyword", (p.W, p.LAM), {**batches, "batch": 1}, ("batch",)),
            ("argnums too high", (p.W, p.LAM), {**batches, "argnums": 3}, ("argnums",)),
        ):

            def call(f: Any = function, a: Any = args, k: Any = kwargs) -> Number:
                return Number(f(*a, **k))

            yield Case("calls", kind, f"{door}: {kind}", call, names)


def _conditions() -> Iterator[Case]:
    """A fixed point or a root in place of the inner loss, right, odd and of no such form."""

    def step(w: Any, lam: Any, batch: Any) -> Any:
        return w - p.RATE * jax.grad(p.inner)(w, lam, batch)

    slope = jax.grad(p.inner)
    for name in p.responses():
        exact = name in ("dense",)  # a series of the map needs more terms than one of its matrix
        expect = p.truths()["dense"] if exact else ANY if "neumann" in name else REFUSE
        names = ("inner", "FixedPoint", "operator")
        for kind, make in (
            ("fixed point", lambda: b.FixedPoint(step)),
            ("root", lambda: b.Root(slope)),
        ):
            yield _case(kind, "inner", name, {"inner": make}, expect=expect, names=names)
    bad: dict[str, Callable[..., Any]] = {
        "none returned": _nothing,
        "short": lambda w, lam, batch: w[:2],
        "pair": lambda w, lam, batch: (w, w),
        "scalar": lambda w, lam, batch: jnp.sum(w),
        "strings": lambda w, lam, batch: "w",
        "complex": lambda w, lam, batch: w + 0j,
        "unread": lambda w, lam, batch: 0.5 * w,
        "two arguments": lambda w, lam: w,
    }
    for kind, function in bad.items():
        for condition in (b.FixedPoint, b.Root):
            where = "step" if condition is b.FixedPoint else "equation"
            yield _case(
                kind, f"inner={condition.__name__}", "dense",
                {"inner": lambda c=condition, f=function: c(f)}, names=("inner", where, "hparams"),
            )  # fmt: skip
    for kind, value in (("none", None), ("class", dict), ("string", "T"), ("number", 1.0)):
        for condition in (b.FixedPoint, b.Root):
            where = "step" if condition is b.FixedPoint else "equation"
            yield _case(
                kind, condition.__name__, "dense",
                {"inner": lambda c=condition, v=value: c(v)}, names=(where,),
            )  # fmt: skip
    yield from _composites()
    for kind, options in (("state", {"has_state": True, "model_state": 0.0}), ("nan", {"w": None})):
        changes = {k: lambda v=v: v for k, v in options.items() if k != "w"}
        if kind == "nan":
            changes = {"params": lambda: p.W * np.nan}
        yield _case(
            kind, "inner=FixedPoint", "dense", {"inner": lambda: b.FixedPoint(step), **changes},
            names=("has_state", "inner", "params"), expect=REFUSE,
        )  # fmt: skip


def _composites() -> Iterator[Case]:
    """The ridge in the proximal operator: the same minimum; and operators of no such form."""

    def error(w: Any, lam: Any, batch: Any) -> Any:
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def shrink(w: Any, lam: Any, s: Any) -> Any:
        return w / (1 + s * jnp.exp(lam))

    names = ("inner", "Composite", "operator", "solver", "prox", "hparams", "loss", "step_size")
    for name in p.responses():
        exact = name in ("dense", "cg")
        expect = p.truths()["dense"] if exact else ANY if "neumann" in name else REFUSE
        if name == "stochastic":
            expect = ANY
        yield _case(
            "composite", "inner", name, {"inner": lambda: b.Composite(error, shrink)},
            expect=expect, names=names,
        )  # fmt: skip
    bad: dict[str, Any] = {
        "none returned": _nothing,
        "short": lambda w, lam, s: w[:2],
        "scalar": lambda w, lam, s: jnp.sum(w),
        "strings": lambda w, lam, s: "w",
        "two arguments": lambda w, lam: w,
        "number": 1.0,
    }
    for kind, prox in bad.items():
        yield _case(
            kind, "prox", "dense", {"inner": lambda f=prox: b.Composite(error, f)}, names=names
        )
    for kind, step in (("zero", 0.0), ("negative", -1.0), ("nan", np.nan), ("infinite", np.inf),
                       ("array", np.ones(2)), ("string", "s")):  # fmt: skip
        yield _case(
            kind, "step_size", "dense",
            {"inner": lambda s=step: b.Composite(error, shrink, s)}, names=names,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    yield from _trees()
    yield from _conditions()
    yield from _objects()
    yield from _flags()
    yield from _missing()
