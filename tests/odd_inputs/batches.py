"""Stacks of batches: the wrong number, some leaves without the axis, other containers."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.case import ANY, Case, Number

K = 4


def readers() -> dict[str, tuple[Any, int]]:
    """Responses that read a stack, and how many batches of it."""
    sgd = optax.sgd(p.RATE)
    return {
        "unroll": (b.Unroll(sgd, K), K),
        "unroll_reverse": (b.Unroll(sgd, K, mode="reverse"), K),
        "unroll_forward": (b.Unroll(sgd, K, mode="forward"), K),
        "truncated": (b.Unroll(sgd, K, truncate=2), K),
        "evolution": (b.Evolution(sgd, K, 2, 0.125), K),
        "fresh neumann": (b.Implicit(b.Neumann(K - 1, 0.25), fresh_batches=True), K),
        "fresh stochastic": (b.Implicit(b.Stochastic(sgd, K - 1), fresh_batches=True), K),
    }  # fmt: skip


def stacks() -> dict[str, tuple[Callable[[], Any], bool]]:
    """What comes in place of ``(K, 8, 3), (K, 8)``, and whether it is legal."""
    x, y = p.stacked(K)
    return {
        "good": (lambda: (x, y), True),
        "as a list": (lambda: [x, y], True),
        "not stacked": (lambda: p.TRAIN, False),
        "x stacked, y not": (lambda: (x, p.Y), False),
        "y stacked, x not": (lambda: (p.X, y), False),
        "x stacked, y one batch short": (lambda: (x, y[:-1]), False),
        "x stacked, y one batch long": (lambda: (x, np.concatenate([y, y[:1]])), False),
        "one short": (lambda: (x[:-1], y[:-1]), False),
        "one long": (lambda: p.stacked(K + 1), False),
        "twice as long": (lambda: p.stacked(2 * K), False),
        "a stack of one": (lambda: (x[:1], y[:1]), False),
        "an axis of one for y": (lambda: (x, y[:1]), False),
        "no batch": (lambda: (x[:0], y[:0]), False),
        "empty batches": (lambda: (x[:, :0], y[:, :0]), False),
        "a list of batches": (lambda: [p.TRAIN] * K, False),
        "a generator": (lambda: (p.TRAIN for _ in range(K)), False),
        "a function": (lambda: lambda step: p.TRAIN, False),
        "none": (lambda: None, False),
        "a number for y": (lambda: (x, 0.5), False),
        "stacked twice": (lambda: (x[None], y[None]), False),
        "stack on the second axis": (lambda: (np.swapaxes(x, 0, 1), y.T), False),
        "nan in the first": (lambda: (_nan(x, 0), y), False),
        "nan in the last": (lambda: (_nan(x, K - 1), y), False),
        "string": (lambda: "data", False),
        "string beside": (lambda: (x, y, "train"), False),
        "object beside": (lambda: (x, y, np.array([object()] * K, object)), False),
    }


def _nan(x: np.ndarray, i: int) -> np.ndarray:
    x = np.array(x)
    x[i, 0, 0] = np.nan
    return x


def cases() -> Iterator[Case]:
    for name, (response, _) in readers().items():
        for kind, (make, legal) in stacks().items():

            def call(response: Any = response, make: Any = make) -> Number:
                return p.solve(response, shared=False, inner_batch=make())

            # The mixed product reads the last batch, and a penalty reads none.
            legal |= kind == "nan in the last" and name.startswith("fresh")
            own = kind in ("none", "a list of batches", "stack on the second axis", "string beside",
                           "stacked twice", "a number for y")  # fmt: skip
            yield Case("batches", kind, f"{name}: {kind}", call, ("inner_batch",),
                       *([ANY] if legal else []), own=own)  # fmt: skip
        yield from _keys(name, response)
    yield from _single()


def _keys(name: str, response: Any) -> Iterator[Case]:
    """Randomness in the batch: one key for all steps is split, or one key per step."""

    def inner(w: Any, lam: Any, batch: Any) -> Any:
        (x, y), key = batch
        return p.inner(w, lam, (x + 0.1 * jax.random.normal(key, x.shape), y))

    keys: dict[str, tuple[Callable[[], Any], bool]] = {
        "a key per batch": (lambda: jax.random.split(p.KEY, K), True),
        "one typed key": (lambda: p.KEY, True),
        "one raw key": (lambda: jax.random.PRNGKey(0), False),
        "keys for other steps": (lambda: jax.random.split(p.KEY, K - 1), False),
        "a number": (lambda: 0, False),
        "none": (lambda: None, False),
        "string": (lambda: "seed", False),
    }
    for kind, (make, legal) in keys.items():

        def call(response: Any = response, make: Any = make) -> Number:
            return p.solve(response, shared=False, inner=inner,
                           inner_batch=(p.stacked(K), make()))  # fmt: skip

        if legal and name.startswith("fresh") and kind == "one typed key":
            legal = True
        yield Case("batches", f"key: {kind}", f"{name}: key, {kind}", call, ("inner_batch",),
                   *([ANY] if legal else []), own=not legal)  # fmt: skip


def _single() -> Iterator[Case]:
    """One batch: of one example, of none, with one example per class, in other containers."""
    one = (p.X[:1], p.Y[:1])
    at = p.minimum(p.LAM, one)
    g = p.XV.T @ (p.XV @ at - p.YV) / len(p.XV)
    truth = p.grads_of(np.linalg.solve(p.hessian(p.LAM, one[0]), g), at)
    for name in ("cg", "dense", "neumann", "neumann_auto", "stochastic", "nystrom", "woodbury"):

        def call(name: str = name) -> Number:
            return p.solve(p.responses()[name], shared=False, params=at, inner_batch=one)

        yield Case("batches", "batch of one", f"{name}: batch of one", call, ("inner_batch",),
                   truth, rtol=1e-4)  # fmt: skip
    for kind, batch, names in (
        ("no examples", (p.X[:0], p.Y[:0]), ("inner_batch",)),
        ("x without y", (p.X,), ("inner_batch",)),
        ("lengths that differ", (p.X, p.Y[:-1]), ("inner_batch",)),
        ("transposed", (p.X.T, p.Y), ("inner_batch",)),
    ):
        for name in ("cg", "difference", "best_response"):

            def call(name: str = name, batch: Any = batch) -> Number:
                return p.solve(p.responses()[name], shared=False, inner_batch=batch)

            yield Case("batches", kind, f"{name}: {kind}", call, names, own=True)
    for kind, column in (("y as a column", p.Y[:, None]),):
        # NumPy's broadcasting makes a matrix of residuals: the caller's own loss, seen by nobody.
        yield Case("batches", kind, f"cg: {kind}",
                   lambda c=column: p.solve(p.responses()["cg"], shared=False,
                                            inner_batch=(p.X, jnp.asarray(c))),
                   ("inner_batch",), ANY)  # fmt: skip
