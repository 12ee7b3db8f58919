"""``fit``, ``scan_run`` and ``HyperSchedule``: data, counts, folders, callbacks, keys."""

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as b
from odd_inputs.case import ANY, REFUSE, Case, Number
from odd_inputs.odd import Thing, counts, reals, things


class State(NamedTuple):
    params: Any
    hparams: Any
    step: Any


class Info(NamedTuple):
    value: Any
    inner_value: Any
    hypergrad_norm: Any
    result: Any
    stats: Any


def _step(state: State, *, inner_batches: Any, outer_batch: Any, key: Any = None, **_: Any) -> Any:
    value = jnp.mean((state.params - outer_batch) ** 2)
    new = State(state.params + jnp.mean(inner_batches), state.hparams * 0.5, state.step + 1)
    zero = jnp.zeros(())
    return new, Info(value, zero, zero, jnp.zeros((), jnp.int32), {})


def _init(params: Any, hparams: Any, model_state: Any = None) -> State:
    return State(jnp.asarray(params), jnp.asarray(hparams), jnp.zeros((), jnp.int32))


ALGORITHM = b.Algorithm(_init, _step)
INNER, OUTER = np.full((2, 3), 0.25), np.ones(3)


def _fit(**changes: Any) -> Number:
    call = dict(alg=ALGORITHM, state=_init(0.0, 1.0), inner_data=INNER, outer_data=OUTER,
                steps=3, progress=False) | changes  # fmt: skip
    # An odd name is a file like any other, and would be made where the tests run.
    with tempfile.TemporaryDirectory() as here, contextlib.chdir(here):
        result = b.fit(**call)
    return Number((result.state.params, result.best_value))


TRUTH = (np.asarray(0.75), np.asarray(0.25))


def _add(kind: str, where: str, call: Callable[[], Any], *names: str, expect: Any = REFUSE,
         own: bool = False, door: str = "fit") -> Case:  # fmt: skip
    return Case("runs", kind, f"{door}({where}={kind})", call, names or (where,), expect, own=own)


def cases() -> Iterator[Case]:
    for where, usual, low in (("steps", 3, 0), ("checkpoint_every", 3, 1), ("keep", 2, 1),
                              ("evaluate_every", 1, 1), ("patience", 3, 1)):  # fmt: skip
        optional = where == "patience"
        for kind, make, legal in counts(usual, low=low, optional=optional):
            if where == "keep":
                call = functools.partial(_in_folder, lambda d, m: _fit(checkpoint_dir=d, keep=m()),
                                         make)  # fmt: skip
            else:
                call = functools.partial(lambda w, m: _fit(**{w: m()}), where, make)
            yield _add(kind, where, call, expect=TRUTH if legal else REFUSE)
    for kind, make, legal in reals(0.125):
        yield _add(kind, "min_delta", lambda m=make: _fit(min_delta=m(), patience=3),
                   expect=ANY if legal else REFUSE)  # fmt: skip
    yield from _data()
    yield from _folders()
    yield from _objects()
    yield from _scans()
    yield from _schedules()


def _in_folder(call: Callable[[str, Any], Number], make: Any) -> Number:
    with tempfile.TemporaryDirectory() as folder:
        return call(folder, make)


def _data() -> Iterator[Case]:
    """Data that is no function of the step and no tree of arrays."""

    def raises(step: int) -> Any:
        raise KeyError("no such file")

    odd: dict[str, tuple[Callable[[], Any], Any]] = {
        "function": (lambda: lambda step: INNER, TRUTH),
        "numpy": (lambda: INNER, TRUTH),
        "list of arrays": (lambda: [INNER, INNER], REFUSE),
        "generator": (lambda: (INNER for _ in range(3)), REFUSE),
        "iterator": (lambda: iter([INNER] * 3), REFUSE),
        "range": (lambda: range(3), REFUSE),
        "string": (lambda: "train", REFUSE),
        "none": (lambda: None, REFUSE),
        "object": (Thing, REFUSE),
        "class": (lambda: Thing, REFUSE),
        "set": (lambda: {1.0}, REFUSE),
        "objects": (lambda: np.array([Thing()], object), REFUSE),
        "strings": (lambda: np.array(["a"]), REFUSE),
        "function of nothing": (lambda: lambda: INNER, REFUSE),
        "function of two": (lambda: lambda step, epoch: INNER, REFUSE),
        "function that raises": (lambda: raises, REFUSE),
        "function to none": (lambda: lambda step: None, REFUSE),
        "function to a string": (lambda: lambda step: "a", REFUSE),
        "function to a generator": (lambda: lambda step: (INNER for _ in range(2)), REFUSE),
        "another shape later": (
            lambda: lambda step: INNER if step < 2 else INNER[:1], ANY),
        "nan at step 1": (lambda: lambda step: INNER * (np.nan if step == 1 else 1), REFUSE),
        "empty": (lambda: np.zeros((0, 3)), REFUSE),
        "path": (lambda: Path("train.npz"), REFUSE),
    }  # fmt: skip
    for where in ("inner_data", "outer_data", "response_data"):
        for kind, (make, expect) in odd.items():
            if where == "response_data" and kind == "none":
                continue
            good = expect
            if where == "response_data" and kind not in ("function", "numpy"):
                # The algorithm here does not read it: only what is no data can be told.
                good = ANY if kind.startswith(("nan", "emp", "ano", "function to none")) else expect
            if where == "outer_data" and good is TRUTH:
                good = ANY
            own = kind in ("empty", "function to none")
            yield _add(kind, where, lambda w=where, m=make: _fit(**{w: m()}), where, expect=good,
                       own=own)  # fmt: skip


def _folders() -> Iterator[Case]:
    """Logs and folders of the wrong type, or where none can be."""
    for where in ("log", "checkpoint_dir", "tensorboard"):
        for kind, make in (
            ("number", lambda d: 1), ("float", lambda d: 1.5), ("bytes", lambda d: b"x" + bytes(1)),
            ("list", lambda d: [d]), ("object", lambda d: Thing()), ("bool", lambda d: True),
            ("open file", lambda d: io.StringIO()),
            ("the other kind", lambda d, w=where: _other(d, w)), ("empty", lambda d: ""),
            ("null in it", lambda d: "a\0b"), ("below a file", lambda d: _other(d, "log2")),
        ):  # fmt: skip
            yield _add(kind, where, functools.partial(
                _in_folder, lambda d, m, w=where: _fit(**{w: m(d)}), make), where)  # fmt: skip
    for kind, make in (("object", Thing), ("array", lambda: np.ones(2)), ("set", lambda: {1}),
                       ("function", lambda: len), ("bytes", lambda: b"id")):  # fmt: skip
        call = functools.partial(
            _in_folder, lambda d, m: _fit(checkpoint_dir=d, run_id=m()), make)  # fmt: skip
        yield _add(kind, "run_id", call)


def _other(folder: str, where: str) -> str:
    """A folder where a file is wanted, a file where a folder is."""
    path = Path(folder) / "taken"
    if where == "log":
        path.mkdir()
        return str(path)
    path.write_text("taken")
    return str(path / "below") if where == "log2" else str(path)


def _objects() -> Iterator[Case]:
    """Algorithms, states, callbacks, evaluations and keys."""
    good = _init(0.0, 1.0)
    wrong: dict[str, list[tuple[str, Callable[[], Any], Any]]] = {
        "alg": [(k, m, REFUSE) for k, m, _ in things()] + [
            ("none", lambda: None, REFUSE), ("a response", lambda: b.Implicit(), REFUSE),
            ("init that is none", lambda: b.Algorithm(None, _step), ANY),
            ("step that is none", lambda: b.Algorithm(_init, None), REFUSE),
            ("step without info", lambda: b.Algorithm(_init, lambda s, **k: s), REFUSE)],
        "state": [(k, m, REFUSE) for k, m, _ in things()] + [
            ("none", lambda: None, REFUSE), ("params alone", lambda: jnp.zeros(3), REFUSE),
            ("strings", lambda: State("w", "lam", 0), REFUSE),
            ("float step", lambda: good._replace(step=0.5), REFUSE),
            ("step of three", lambda: good._replace(step=jnp.zeros(3, jnp.int32)), REFUSE),
            ("no step", lambda: good._replace(step=None), REFUSE),
            ("nan", lambda: good._replace(params=jnp.asarray(jnp.nan)), REFUSE)],
        "callbacks": [
            ("none", lambda: None, REFUSE), ("function", lambda: lambda i, r: None, REFUSE),
            ("string", lambda: "print", REFUSE), ("number", lambda: 1, REFUSE),
            ("list of none", lambda: [None], REFUSE),
            ("list of strings", lambda: ["print"], REFUSE),
            ("numpy true", lambda: [lambda i, r: np.True_], (0.25, 1.0)),
            ("jax true", lambda: [lambda i, r: jnp.asarray(True)], (0.25, 1.0)),
            ("true", lambda: [lambda i, r: True], (0.25, 1.0)),
            ("none returned", lambda: [lambda i, r: None], TRUTH),
            ("false", lambda: [lambda i, r: np.False_], TRUTH),
            ("string returned", lambda: [lambda i, r: "stop"], REFUSE),
            ("array returned", lambda: [lambda i, r: np.ones(2)], REFUSE),
            ("generator", lambda: (c for c in [lambda i, r: None]), ANY)],
        "evaluate": [(k, m, REFUSE) for k, m, _ in things() if k not in ("class", "function")] + [
            ("string returned", lambda: lambda p: "0.5", REFUSE),
            ("none returned", lambda: lambda p: None, REFUSE),
            ("array returned", lambda: lambda p: np.ones(2), REFUSE),
            ("complex returned", lambda: lambda p: 1j, REFUSE),
            ("nan returned", lambda: lambda p: np.nan, ANY),
            ("numpy returned", lambda: lambda p: np.float32(0.25), (0.75, 0.25)),
            ("jax returned", lambda: lambda p: jnp.asarray(0.25), (0.75, 0.25))],
        "key": [("string", lambda: "seed", REFUSE), ("number", lambda: 0, REFUSE),
                ("float", lambda: 0.5, REFUSE), ("object", Thing, REFUSE),
                ("list", lambda: [0, 1], REFUSE),
                ("two keys", lambda: jax.random.split(jax.random.key(0)), REFUSE),
                ("raw", lambda: jax.random.PRNGKey(0), TRUTH),
                ("typed", lambda: jax.random.key(0), TRUTH)],
    }  # fmt: skip
    for where, values in wrong.items():
        for kind, make, expect in values:
            yield _add(kind, where, lambda w=where, m=make: _fit(**{w: m()}), where, "alg.step",
                       expect=expect)  # fmt: skip


def _scans() -> Iterator[Case]:
    def scan(**changes: Any) -> Number:
        call = dict(algorithm=ALGORITHM, state=_init(0.0, 1.0), sample=lambda key: (INNER, OUTER),
                    steps=3, key=jax.random.key(0)) | changes  # fmt: skip
        return Number(b.scan_run(**call).state.params)

    for where, usual in (("steps", 3), ("score_every", 1)):
        for kind, make, legal in counts(usual):
            yield _add(kind, where, lambda w=where, m=make: scan(**{w: m()}), where,
                       expect=0.75 if legal else REFUSE, door="scan_run")  # fmt: skip
    for where, values in {
        "sample": [("none", None), ("string", "data"), ("batches", (INNER, OUTER)),
                   ("none returned", lambda key: None),
                   ("no argument", lambda: (INNER, OUTER))],
        "score": [("string", "loss"), ("number", 1.0), ("vector", lambda s: jnp.ones(2)),
                  ("none returned", lambda s: None)],
        "key": [("none", None), ("string", "seed"), ("float", 0.5)],
        "algorithm": [("none", None), ("string", "alg"), ("a response", b.Implicit())],
        "state": [("none", None), ("string", "s"), ("params", jnp.zeros(3))],
    }.items():  # fmt: skip
        for kind, value in values:
            yield _add(kind, where, lambda w=where, v=value: scan(**{w: v}), where,
                       door="scan_run")  # fmt: skip


def _schedules() -> Iterator[Case]:
    values = {"rate": np.array([0.25, 0.5])}

    increasing = np.array([0, 10])

    def at(steps: Any = increasing, values: Any = values, step: Any = 10) -> Number:
        return Number(b.HyperSchedule(steps, values)(step))

    for kind, steps in (
        ("none", None), ("string", "0"), ("list", [0, 10]), ("floats", np.array([0.0, 10.0])),
        ("decreasing", np.array([10, 0])), ("equal", np.array([3, 3])), ("scalar", np.array(0)),
        ("too many", np.array([0, 1, 2])), ("matrix", np.zeros((2, 2), int)), ("object", Thing()),
        ("nan", np.array([np.nan, 1.0])), ("empty", np.zeros(0, int)), ("tuple", (0, 10)),
        ("bools", np.array([False, True])),
    ):  # fmt: skip
        yield _add(kind, "steps", lambda s=steps: at(steps=s), "steps", "values",
                   door="HyperSchedule")  # fmt: skip
    for kind, given in (
        ("none", None), ("string", "rate"), ("another length", {"rate": np.ones(3)}),
        ("scalar", {"rate": np.float64(1)}), ("python float", {"rate": 0.5}),
        ("list", {"rate": [0.25, 0.5]}), ("object", Thing()), ("empty", {}),
        ("strings", {"rate": np.array(["a", "b"])}),
    ):  # fmt: skip
        yield _add(kind, "values", lambda v=given: at(values=v), "values", "steps",
                   door="HyperSchedule")  # fmt: skip
    for kind, step, expect in (
        ("none", None, REFUSE), ("string", "3", REFUSE), ("float", 3.5, ANY),
        ("nan", np.nan, REFUSE), ("complex", 1j, REFUSE),
        ("before the first", -5, 0.25), ("numpy", np.int64(10), 0.5),
        ("boundary less one", 9, 0.25), ("huge", 2**31 - 1, 0.5), ("object", Thing(), REFUSE),
        ("bool", True, ANY), ("list", [1, 10], ANY),
    ):  # fmt: skip
        yield _add(kind, "step", lambda s=step: at(step=s), "step", expect=expect,
                   door="HyperSchedule")  # fmt: skip
