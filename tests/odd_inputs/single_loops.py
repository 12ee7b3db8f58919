"""``single_loop``, its estimators and presets: settings, first states, batches."""

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
from odd_inputs.odd import Thing, counts, objects, reals

TX = optax.sgd(0.125)
ONE = jax.tree.map(lambda x: x[None], p.TRAIN)


def run(estimator: Any = None, *, init: Any = None, step: Any = None, **settings: Any) -> Number:
    """One step; the hyperparameters it leaves, and its status."""
    given = dict(outer=p.outer, inner=p.inner, inner_tx=TX, linear_tx=TX, outer_tx=TX)
    algorithm = b.single_loop(**(given | settings), estimator=estimator)
    first = algorithm.init(**(dict(params=p.W, hparams=p.LAM) | (init or {})))
    inner, outer = ONE, p.VALID
    if isinstance(estimator, b.Saga):
        inner, outer = b.Indexed(inner, np.zeros(1, int)), b.Indexed(outer, 0)
    if isinstance(estimator, (b.Spider, b.Page)):
        inner, outer = b.Anchored(inner, p.TRAIN), b.Anchored(outer, p.VALID)
    arguments = dict(inner_batches=inner, outer_batch=outer, key=p.KEY) | (step or {})

    def step_(state: Any) -> Any:
        new, info = algorithm.step(state, **arguments)
        return new.hparams, info.result

    return Number(*evaluate(step_, first))


@functools.cache
def usual() -> Any:
    """What a first step gives, whichever the estimator."""
    return run().value


def _case(kind: str, where: str, call: Callable[[], Number], expect: Any = REFUSE, *,
          names: tuple[str, ...] = (), own: bool = False, rtol: float = 1e-5) -> Case:  # fmt: skip
    label = f"single_loop({where}={kind})"
    return Case("single_loops", kind, label, call, names or (where,), expect, rtol, own)


def cases() -> Iterator[Case]:
    yield from _estimators()
    yield from _settings()
    yield from _steps()


def _estimators() -> Iterator[Case]:
    numbers: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "num_inner": (lambda x: b.Saga(x, 2), counts(2)),
        "num_outer": (lambda x: b.Saga(2, x), counts(2)),
        "max_bytes": (lambda x: b.Saga(2, 2, x), counts(10**6)),
        "period": (b.Spider, counts(3)),
        "probability": (b.Page, reals(0.5, strict=True)),
    }
    for rate in ("inner", "linear", "outer"):
        numbers[rate] = lambda x, rate=rate: b.Storm(**{rate: x}), reals(0.5, strict=True)
    for where, (make, odd) in numbers.items():
        for kind, value, legal in odd:
            legal |= kind == "none" and where in ("inner", "linear", "outer")
            if kind in ("numpy unsigned",) and where == "max_bytes":
                continue  # too small a number for these tables
            yield _case(kind, where, lambda m=make, v=value: run(m(v())), usual if legal else
                        REFUSE, names=(where, where + "(step)"))  # fmt: skip
    for kind, make, _ in objects(("a class", lambda: b.Saga), ("a solver", b.CG)):
        yield _case(kind, "estimator", lambda m=make: run(m()), ANY if kind == "none" else REFUSE)


def _settings() -> Iterator[Case]:
    for where in ("inner_tx", "linear_tx", "outer_tx"):
        for kind, make, _ in objects(("optax factory", lambda: optax.sgd)):
            yield _case(kind, where, lambda w=where, m=make: run(**{w: m()}))
    for where in ("outer", "inner"):
        for kind, make, _ in objects():
            if kind not in ("function", "class"):
                yield _case(kind, f"loss {where}", lambda w=where, m=make: run(**{w: m()}),
                            names=(where,))  # fmt: skip
        yield _case("vector returned", f"loss {where}",
                    lambda w=where: run(**{w: lambda w, lam, b: w}), names=(where,))  # fmt: skip
    for where in ("independent", "has_aux", "has_state"):
        for kind, make, _ in objects():
            if kind != "bool":
                yield _case(kind, where, lambda w=where, m=make: run(**{w: m()}))
    for kind, make, _ in objects(("a bound", b.Positive)):
        yield _case(kind, "constrain", lambda m=make: run(constrain=m()),
                    ANY if kind == "none" else REFUSE)  # fmt: skip
    for where, good in (("params", p.W), ("hparams", p.LAM)):
        for kind, change, verdict in leaves():
            expect = usual if verdict == "same" else ANY if verdict in ("own", "near") else REFUSE
            yield _case(kind, where, lambda w=where, c=change, g=good: run(init={w: c(g)}), expect,
                        own=verdict == "own")  # fmt: skip


def _steps() -> Iterator[Case]:
    x, y = ONE
    stacks: dict[str, tuple[Any, Any]] = {
        "good": (ONE, usual), "not stacked": (p.TRAIN, REFUSE), "none": (None, REFUSE),
        "string": ("data", REFUSE), "two": (p.stacked(2), REFUSE),
        "empty": ((x[:, :0], y[:, :0]), REFUSE), "nan": ((x * np.nan, y), REFUSE),
        "a list of batches": ([p.TRAIN], REFUSE), "objects": ((x, y, np.array([Thing()], object)),
        REFUSE), "with a number": (b.Indexed(ONE, np.zeros(1, int)), REFUSE),
        "with all data": (b.Anchored(ONE, p.TRAIN), REFUSE),
    }  # fmt: skip
    for kind, (batches, expect) in stacks.items():
        yield _case(kind, "inner_batches", lambda v=batches: run(step={"inner_batches": v}), expect,
                    names=("inner_batches", "inner_batch"),
                    own=kind in ("none", "a list of batches", "objects"))  # fmt: skip
    indices: dict[str, Any] = {
        "none": None, "string": "a", "float": 0.0, "floats": np.zeros(1), "no axis": 0,
        "two": np.zeros(2, int), "bool": np.zeros(1, bool), "list": [0], "object": Thing(),
        "negative": -np.ones(1, int), "too large": np.full(1, 2), "key": jax.random.key(0),
    }  # fmt: skip
    for kind, index in indices.items():
        given = {"inner_batches": b.Indexed(ONE, index)}
        yield _case(kind, "index", lambda v=given: run(b.Saga(2, 2), step=v))
        if kind == "no axis":
            continue
        value = index[0] if kind in ("bool", "negative", "too large") else index
        given = {"outer_batch": b.Indexed(p.VALID, value)}
        yield _case(kind, "outer index", lambda v=given: run(b.Saga(2, 2), step=v),
                    names=("index",))  # fmt: skip
    full: dict[str, Any] = {
        "none": None, "string": "a", "empty": (p.X[:0], p.Y[:0]), "x only": (p.X,),
        "nan": (p.X * np.nan, p.Y), "object": Thing(), "lengths that differ": (p.X, p.Y[:-1]),
    }  # fmt: skip
    for kind, batch in full.items():
        given = {"inner_batches": b.Anchored(ONE, batch)}
        yield _case(kind, "full", lambda v=given: run(b.Spider(3), step=v), own=True,
                    names=("full", "inner_batches"))  # fmt: skip
    keys: dict[str, Callable[[], Any]] = {
        "none": lambda: None, "number": lambda: 0, "string": lambda: "seed", "object": Thing,
        "two keys": lambda: jax.random.split(p.KEY),
    }  # fmt: skip
    for kind, make in keys.items():
        yield _case(kind, "key", lambda m=make: run(b.Page(0.5), step={"key": m()}))
    for kind, state in (("none", None), ("params", p.W), ("dict", {})):
        yield _case(kind, "state", lambda s=state: _stepped(s))


def _stepped(state: Any) -> Number:
    algorithm = b.soba(p.outer, p.inner, TX, TX, TX)
    new, info = algorithm.step(state, inner_batches=ONE, outer_batch=jnp.asarray(p.VALID[1]))
    return Number(new.hparams, info.result)
