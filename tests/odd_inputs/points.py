"""Points where the implicit function theorem does not hold, or hardly: right, or marked."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.case import REFUSE, Case, Number


class Point(NamedTuple):
    """Losses and a point, and the true indirect part there (``None``: there is none)."""

    inner: Callable[..., Any]
    outer: Callable[..., Any]
    params: Any
    hparams: Any
    truth: Any


def _outer(w: Any, lam: Any, batch: Any) -> Any:
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def _resolved(solve: Callable[[np.ndarray], np.ndarray], lam: np.ndarray) -> np.ndarray:
    """Central differences of the validation loss of the re-solved problem."""

    def value(lam: np.ndarray) -> float:
        return 0.5 * np.mean((p.XV @ solve(lam) - p.YV) ** 2)

    step = 1e-5
    eyes = step * np.eye(lam.size).reshape(lam.size, *lam.shape)
    slopes = [(value(lam + e) - value(lam - e)) / (2 * step) for e in eyes]
    return np.reshape(slopes, lam.shape)


def _ista(lam: np.ndarray, nonnegative: bool = False) -> np.ndarray:
    """Proximal gradient to rounding: lasso, or non-negative ridge."""
    rate = 1 / np.linalg.eigvalsh(p.X.T @ p.X / p.M + np.exp(lam) * np.eye(p.N))[-1]
    w = np.zeros(p.N)
    for _ in range(3000):
        gradient = p.X.T @ (p.X @ w - p.Y) / p.M + (np.exp(lam) * w if nonnegative else 0)
        w = w - rate * gradient
        if nonnegative:
            w = np.maximum(w, 0)
        else:
            w = np.sign(w) * np.maximum(np.abs(w) - rate * np.exp(lam), 0)
    return w


def _scaled(factor: float) -> Point:
    return Point(lambda w, lam, batch: factor * p.inner(w, lam, batch), _outer, p.W, p.LAM,
                 p.exact() - 0.25 * p.LAM)  # fmt: skip


def _weighted(w: Any, lam: Any, batch: Any, curvature: Any) -> Any:
    """A quadratic with these curvatures, minimal at lam (its response is the identity matrix)."""
    return 0.5 * jnp.sum(jnp.asarray(curvature) * (w - lam) ** 2)


@functools.cache
def points() -> dict[str, Point]:
    """By what is odd about them."""
    truth = p.exact() - 0.25 * p.LAM
    strength = np.asarray(-2.0)
    lasso = _ista(np.asarray(-2.5))
    bounded = _ista(strength, nonnegative=True)
    flat = np.array([1.0, 1.0, 0.0])
    blind = np.array([1.0, 1.0, 0.0])  # validation that does not look where training is flat

    def only_seen(w: Any, lam: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum(blind * (w - 1) ** 2)

    def target(w: Any, lam: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum((w - 1) ** 2)

    def frozen(w: Any, lam: Any, batch: Any) -> Any:
        return p.inner(jnp.append(w["a"], jax.lax.stop_gradient(w["b"])), lam, batch)

    def frozen_outer(w: Any, lam: Any, batch: Any) -> Any:
        return _outer(jnp.append(w["a"], w["b"]), lam, batch)

    def quadratic(curvature: Any, outer: Any = target, truth: Any = None) -> Point:
        inner = functools.partial(_weighted, curvature=curvature)
        return Point(inner, outer, p.LAM, p.LAM, truth)

    # Only the first two weights respond; the third is where it is.
    h = p.hessian()[:2, :2]
    free = np.append(-np.exp(p.LAM[:2]) * p.W[:2] * np.linalg.solve(h, p.G[:2]), 0.0)
    return {
        "at the minimum": Point(p.inner, _outer, p.W, p.LAM, truth),
        "untrained": Point(p.inner, _outer, p.W + 1.0, p.LAM, truth),
        "far away": Point(p.inner, _outer, 1e3 * p.W + 1e3, p.LAM, truth),
        "at zero": Point(p.inner, _outer, np.zeros(p.N), p.LAM, truth),
        "after few steps": Point(p.inner, _outer, 0.6 * p.W, p.LAM, truth),
        "nearly there": Point(p.inner, _outer, p.W * (1 + 1e-4), p.LAM, truth),
        "loss times 1e8": _scaled(1e8),
        "loss times 1e-8": _scaled(1e-8),
        "loss times 1e-150": _scaled(1e-150),
        "lasso": Point(
            lambda w, lam, bt: _outer(w, lam, bt) + jnp.exp(lam) * jnp.sum(jnp.abs(w)),
            _outer, lasso, np.asarray(-2.5), lambda: _resolved(_ista, np.asarray(-2.5)),
        ),
        "non-negative": Point(
            lambda w, lam, bt: _outer(w, lam, bt) + 0.5 * jnp.exp(lam) * jnp.sum(w**2),
            _outer, bounded, strength,
            lambda: _resolved(lambda lam: _ista(lam, True), strength),
        ),
        "hinge": Point(
            lambda w, lam, bt: jnp.mean(jax.nn.relu(1 - jnp.sign(bt[1]) * (bt[0] @ w)))
            + 0 * jnp.sum(jnp.exp(lam) * w**2),
            _outer, p.W, p.LAM, None,
        ),
        "linear loss": Point(
            lambda w, lam, bt: jnp.sum(lam * w), _outer, p.W, p.LAM, None,
        ),
        "saddle": quadratic([1.0, 1.0, -0.5]),
        "maximum": quadratic([-1.0, -1.0, -1.0]),
        "barely indefinite": quadratic([1.0, 1.0, -1e-3]),
        "flat where the outer loss looks": quadratic(flat),
        "flat where it does not": quadratic(flat, only_seen, blind * (p.LAM - 1)),
        "nearly flat": quadratic([1.0, 1.0, 1e-12], target, p.LAM - 1),
        "ill conditioned": quadratic([1.0, 1e-3, 1e-5], target, p.LAM - 1),
        "frozen leaf": Point(
            frozen, frozen_outer, {"a": _partial_minimum(), "b": p.W[2:]}, p.LAM, free
        ),
    }  # fmt: skip


def _partial_minimum() -> np.ndarray:
    return p.W[:2]  # the minimum over all is one over the first two at the same third


def solvers() -> dict[str, Any]:
    """Cheap, exact and truncated ones."""
    return {
        "cg": b.CG(),
        "cg rtol": b.CG(rtol=1e-6),
        "cg 1": b.CG(1),
        "cg 2": b.CG(2),
        "cg diagonal": b.CG(preconditioner=b.Diagonal()),
        "dense": b.Dense(),
        "neumann 5": b.Neumann(5, 0.25),
        "neumann auto": b.Neumann(200),
        "neumann 0": b.Neumann(0, 0.25),
        "stochastic": b.Stochastic(optax.sgd(0.25), 200),
        "identity": b.Identity(),
    }


def cases() -> Iterator[Case]:
    """Every point with every solver, cold, warm and damped; the indirect part alone is judged."""
    for kind, point in points().items():
        for name, solver in solvers().items():
            for start in ("cold", "bad warm start"):
                if start != "cold" and name not in ("cg", "cg rtol", "stochastic", "cg 2"):
                    continue
                yield Case(
                    "points", kind, f"{name}, {start}: {kind}",
                    functools.partial(_call, point, b.Implicit(solver), start),
                    ("params", "inner", "hparams"),
                    REFUSE if point.truth is None else point.truth,
                    # `ok` allows a residual of a tenth, which leaves an error of a few of them.
                    rtol=0.35,
                )  # fmt: skip
        yield Case(
            "points", kind, f"with_response: {kind}",
            functools.partial(_through, point), ("params", "inner", "hparams"),
            REFUSE if point.truth is None else point.truth, rtol=0.35,
        )  # fmt: skip


def _call(point: Point, response: Any, start: str) -> Number:
    state = None if start == "cold" else jax.tree.map(lambda x: 1e4 * jnp.ones_like(x),
                                                      point.params)  # fmt: skip

    @jax.jit
    def run(params: Any, hparams: Any) -> Any:
        solution = b.hypergrad_solve(
            point.outer, point.inner, response, params, hparams,
            inner_batch=p.TRAIN, outer_batch=p.VALID, state=state, key=p.KEY,
        )  # fmt: skip
        return solution.indirect, solution.result

    return Number(*run(point.params, point.hparams))


def _through(point: Point) -> Number:
    """The same through a solver of the user's own, which returns the point."""
    solve = b.with_response(lambda w, lam, bt: w, point.inner, b.Implicit(b.CG()))
    value = jax.grad(
        lambda lam: point.outer(solve(point.params, lam, p.TRAIN), lam, p.VALID)
    )(point.hparams)  # fmt: skip
    return Number(value)
