"""Bounds: ends that are none, values at and beyond them, raw values from anywhere, odd trees."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import bilevel as b
from odd_inputs.case import ANY, REFUSE, Case, Number
from odd_inputs.odd import Thing, objects, reals, things


def _add(
    kind: str, label: str, call: Callable[[], Any], *names: str, expect: Any = REFUSE,
    rtol: float = 1e-6,
) -> Case:  # fmt: skip
    return Case("bounds", kind, label, lambda: Number(call()), names, expect, rtol)


def cases() -> Iterator[Case]:
    yield from _ends()
    yield from _spaces()
    yield from _values()
    yield from _raw()


def _ends() -> Iterator[Case]:
    """Ends of an interval; legal ones give the middle for a raw zero."""
    for end, base, make_bound in (
        ("lo", 0.25, lambda v: b.Interval(v, 2.25)),
        ("hi", 2.25, lambda v: b.Interval(0.25, v)),
    ):
        for kind, make, legal in reals(base, low=None):
            yield _add(kind, f"Interval({end}={kind})",
                       lambda m=make, f=make_bound: f(m()).constrain(jnp.zeros(())), end,
                       expect=1.25 if legal else REFUSE, rtol=1e-2)  # fmt: skip
    for end, make_int in (("lo", lambda v: b.Integer(v, 5)), ("hi", lambda v: b.Integer(1, v))):
        base = 1 if end == "lo" else 5
        odd = {k: m() for k, m, _ in things()} | {
            "none": None, "float": base + 0.5, "whole float": float(base), "nan": np.nan,
            "inf": np.inf, "bool": True, "array": np.array([base]), "numpy float": np.float64(base),
            "beyond float64": 2**60 if end == "hi" else -(2**60),
        }  # fmt: skip
        for kind, value in [*odd.items(), ("numpy int", np.int64(base))]:
            yield _add(kind, f"Integer({end}={kind})",
                       lambda v=value, f=make_int: f(v).constrain(jnp.zeros(())), end,
                       expect=3.0 if kind == "numpy int" else REFUSE)  # fmt: skip
    for kind, make in (
        ("equal", lambda: b.Interval(1, 1)), ("swapped", lambda: b.Interval(2, 1)),
        ("integers swapped", lambda: b.Integer(5, 1)), ("one integer", lambda: b.Integer(3, 3)),
        ("no float between", lambda: b.Interval(1.0, float(np.nextafter(1.0, 2.0)))),
    ):  # fmt: skip
        yield _add(
            kind,
            f"ends {kind}",
            lambda m=make: m().constrain(jnp.zeros(())),
            "lo",
            "hi",
            "Interval",
            "Integer",
            "the hyperparameter",
        )


def _spaces() -> Iterator[Case]:
    """What is not a bound, and trees that do not fit."""
    for kind, make, _ in objects(("class of a bound", lambda: b.Positive)):
        for place, wrap in (
            ("bounds", lambda v: v), ("leaf", lambda v: {"a": v}), ("deep", lambda v: {"a": [v]}),
        ):  # fmt: skip
            yield _add(kind, f"Space({place}={kind}, {place})",
                       lambda m=make, w=wrap: b.Space(w(m())).unconstrain({"a": jnp.ones(())}),
                       "bounds", "Space", "hparams")  # fmt: skip
    space = b.Space({"a": b.Positive(), "b": b.Interval(0, 1)})
    good = {"a": 1.0, "b": 0.5}
    for kind, value in (
        ("missing", {"a": 1.0}), ("extra", {**good, "c": 1.0}), ("list", [1.0, 0.5]),
        ("scalar", 1.0), ("none", None), ("empty", {}), ("string", "a"),
        ("integer", {**good, "a": 1}), ("bool", {**good, "a": True}),
        ("string leaf", {**good, "a": "1"}), ("complex", {**good, "a": 1j}),
        ("none leaf", {**good, "a": None}), ("object", {**good, "a": Thing()}),
        ("deeper", {**good, "a": {"x": 1.0}}), ("object array", {**good, "a": np.array(["1"])}),
    ):  # fmt: skip
        for door in ("unconstrain", "constrain", "round"):
            legal = kind == "deeper"
            yield _add(f"tree: {kind}", f"Space.{door}({kind})",
                       lambda d=door, v=value: getattr(space, d)(v), "hparams", "Space",
                       expect=ANY if legal else REFUSE)  # fmt: skip


BOUNDS = {
    "Positive": (b.Positive(), (0.0, np.inf)),
    "Interval": (b.Interval(-1.0, 2.0), (-1.0, 2.0)),
    "Interval tiny": (b.Interval(0.0, 1e-30), (0.0, 1e-30)),
    "Interval wide": (b.Interval(-3e38, 3e38), (-3e38, 3e38)),
    "Interval far": (b.Interval(1e6, 1e6 + 8), (1e6, 1e6 + 8)),
    "Integer": (b.Integer(1, 4), (0.5, 4.5)),
    "Integer large": (b.Integer(2**25, 2**25 + 7), (2**25 - 0.5, 2**25 + 7.5)),
}
DTYPES = ("float64", "float32", "bfloat16", "float16")


def _values() -> Iterator[Case]:
    """Start values outside, at the ends, not finite."""
    for name, (bound, (lo, hi)) in BOUNDS.items():
        for kind, value in (
            ("lower end", lo), ("upper end", hi), ("below", lo - abs(lo) - 1.0),
            ("above", hi + abs(hi) + 1.0), ("nan", np.nan), ("inf", np.inf), ("minus inf", -np.inf),
        ):  # fmt: skip
            yield _add(f"value: {kind}", f"{name}.unconstrain({kind})",
                       lambda f=bound, v=value: b.Space(f).unconstrain(jnp.asarray(v)), "hparams",
                       )  # fmt: skip
    simplex = b.Space(b.Simplex())
    for kind, value in (
        ("scalar", 1.0), ("one weight", np.ones(1)), ("sums to two", np.ones(2)),
        ("a zero", np.array([0.0, 1.0])), ("a negative", np.array([-0.5, 1.5])),
        ("nan", np.array([np.nan, 1.0])), ("empty", np.zeros(0)),
    ):  # fmt: skip
        yield _add(f"value: {kind}", f"Simplex.unconstrain({kind})",
                   lambda v=value: simplex.unconstrain(jnp.asarray(v)), "hparams")  # fmt: skip


def _raw() -> Iterator[Case]:
    """Any raw value maps strictly inside, in every dtype; the inverse is finite again."""
    for name, (bound, (lo, hi)) in BOUNDS.items():
        for dtype in DTYPES:
            for raw in (-1e30, -1e4, -200.0, -40.0, -17.0, 0.0, 17.0, 40.0, 88.0, 200.0, 1e4, 1e30):
                if abs(raw) > float(jnp.finfo(dtype).max):
                    continue
                yield Case(
                    "bounds", f"raw in {dtype}", f"{name}({dtype} {raw:g})",
                    lambda f=bound, d=dtype, v=raw, lo=lo, hi=hi: _inside(f, d, v, lo, hi),
                    ("hparams", "raw", name.split()[0], "lo", "hi", "Integer", "Interval"), 1.0,
                )  # fmt: skip
    for dtype in DTYPES:
        for raw in ([0.0, 1e4], [-1e4, 1e4], [60000.0, -60000.0], [0.0, 20.0], [0.0, 100.0]):
            yield Case(
                "bounds", f"raw in {dtype}", f"Simplex({dtype} {raw})",
                lambda d=dtype, v=raw: _on_simplex(d, v), ("hparams", "Simplex"), 1.0,
            )  # fmt: skip


def _inside(bound: Any, dtype: str, raw: float, lo: float, hi: float) -> Number:
    """One if the value is strictly inside and comes back finite, else zero."""
    space = b.Space(bound)
    value = space.constrain(jnp.asarray(raw, dtype))
    number = float(value)
    inside = lo < number < hi and np.isfinite(number)
    if not inside:
        return Number(0.0)
    back = float(space.unconstrain(value))
    return Number(1.0 if np.isfinite(back) else 0.5)


def _on_simplex(dtype: str, raw: list[float]) -> Number:
    weights = b.Space(b.Simplex()).constrain(jnp.asarray(raw, dtype))
    number = np.asarray(weights, np.float64)
    return Number(1.0 if np.all(number > 0) and abs(number.sum() - 1) < 0.02 else 0.0)
