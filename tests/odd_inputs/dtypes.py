"""Mixtures of floating-point types, with JAX's wide types on and off."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.case import ANY, Case, Number

EPS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


def mixtures() -> list[tuple[str, str, str]]:
    """Of parameters, hyperparameters and batch: all alike, or one unlike the others."""
    found = [(d, d, d) for d in EPS]
    for usual in ("float64", "float32"):
        for other in EPS:
            if other != usual:
                found += [(other, usual, usual), (usual, other, usual), (usual, usual, other)]
    return found


def cases() -> Iterator[Case]:
    """A rounding error for every narrow type, or a status."""
    for name in ("cg", "dense", "neumann_auto", "unroll", "unroll_forward", "evolution",
                 "difference", "best_response"):  # fmt: skip
        for mixture in mixtures():
            tolerance = max(EPS[d] for d in mixture)
            if name == "difference":
                tolerance = max(tolerance, 0.02)  # cancellation, as its docstring says
            yield Case(
                "dtypes", "/".join(mixture), f"{name}: {', '.join(mixture)}",
                lambda name=name, mixture=mixture: _call(name, mixture),
                ("params", "hparams", "inner_batch"), p.truths().get(name, ANY), rtol=tolerance,
            )  # fmt: skip
        for dtype in ("float64", "float32", "bfloat16"):
            yield Case(
                "dtypes", f"x64 off, {dtype}", f"{name}: x64 off, {dtype}",
                lambda name=name, dtype=dtype: _narrow(name, dtype),
                ("params", "hparams", "inner_batch"), p.truths().get(name, ANY),
                rtol=max(EPS[dtype], 0.02 if name == "difference" else 1e-3),
            )  # fmt: skip


def _call(name: str, dtypes: tuple[str, str, str]) -> Number:
    w, lam, batch = (jnp.dtype(d) for d in dtypes)
    response = p.responses()[name]
    cast = lambda tree, d: jax.tree.map(lambda x: jnp.asarray(x, d), tree)  # noqa: E731
    return p.solve(
        response, shared=False, params=cast(p.W, w), hparams=cast(p.LAM, lam),
        inner_batch=cast(p.batch_of(response), batch), outer_batch=cast(p.VALID, batch),
    )  # fmt: skip


def _narrow(name: str, dtype: str) -> Number:
    """As most users run JAX; NumPy's float64 arrays come in all the same."""
    jax.clear_caches()  # what was traced with wide types must not serve here
    with jax.enable_x64(False):
        if name == "unroll":
            response: Any = b.Unroll(__import__("optax").sgd(p.RATE), p.STEPS)
        else:
            response = p.responses()[name]
        if dtype == "float64":
            return p.solve(response, shared=False, key=jax.random.key(0),
                           inner_batch=p.batch_of(response))  # fmt: skip
        return _call(name, (dtype, "float32", "float32"))
