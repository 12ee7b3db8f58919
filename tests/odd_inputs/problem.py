"""A small float64 problem whose every hypergradient is known in closed form.

Ridge regression with one log decay per weight: ``h = |xw - y|^2/2m + sum(e^lam w^2)/2``, and a
validation loss with a direct term. n = p = 3, and the point is the minimum.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from odd_inputs.case import Number, evaluate

_RNG = np.random.default_rng(0)
N, M = 3, 8
X, XV = _RNG.standard_normal((M, N)), _RNG.standard_normal((5, N))
Y, YV = _RNG.standard_normal(M), _RNG.standard_normal(5)
LAM = np.array([-1.0, -0.5, 0.25])
TRAIN, VALID = (X, Y), (XV, YV)
KEY = jax.random.key(0)
STEPS, RATE = 3, 0.25


def hessian(lam: Any = LAM, x: Any = X) -> np.ndarray:
    return x.T @ x / len(x) + np.diag(np.exp(lam))


def minimum(lam: Any = LAM, batch: Any = TRAIN) -> np.ndarray:
    x, y = batch
    return np.linalg.solve(hessian(lam, x), x.T @ y / len(x))


W = minimum()


def inner(w: Any, lam: Any, batch: Any) -> Any:
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def outer(w: Any, lam: Any, batch: Any) -> Any:
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.125 * jnp.sum(lam**2)


def model(w: Any, lam: Any, batch: Any) -> Any:
    return batch[0] @ w


def output_loss(z: Any, lam: Any, batch: Any) -> Any:
    return 0.5 * jnp.mean((z - batch[1]) ** 2)


def penalty(w: Any, lam: Any) -> Any:
    return 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def stacked(steps: int = STEPS, batch: Any = TRAIN) -> Any:
    return jax.tree.map(lambda x: np.broadcast_to(x, (steps, *np.shape(x))), batch)


G = XV.T @ (XV @ W - YV) / len(XV)


def grads_of(q: np.ndarray, w: np.ndarray = W, lam: np.ndarray = LAM) -> np.ndarray:
    """The hypergradient for an adjoint q."""
    return 0.25 * lam - np.exp(lam) * w * q


def exact(damping: float = 0.0) -> np.ndarray:
    return grads_of(np.linalg.solve(hessian() + damping * np.eye(N), G))


def series(count: int, step: float) -> np.ndarray:
    term = total = G
    for _ in range(count):
        term = term - step * hessian() @ term
        total = total + term
    return grads_of(step * total)


def unrolled(steps: int = STEPS, rate: float = RATE, last: int | None = None) -> np.ndarray:
    """At the minimum, SGD stays there: K differentiated steps make K terms of the series."""
    return series((steps if last is None else last) - 1, rate)


def batch_of(response: Any) -> Any:
    """One batch, or a stack for a response that reads one."""
    count = getattr(response, "num_inner_batches", lambda: None)()
    return TRAIN if not count else stacked(int(count))


def solve(response: Any, *, state: Any = None, shared: bool = True, **changes: Any) -> Number:
    """``hypergrad_solve`` on the problem, compiled; responses of one structure share a program."""
    call = dict(inner_batch=None, outer_batch=VALID, params=W, hparams=LAM, key=KEY)
    call |= dict(inner=inner, outer=outer) | changes
    if call["inner_batch"] is None and "inner_batch" not in changes:
        call["inner_batch"] = batch_of(response)
    params, hparams = call.pop("params"), call.pop("hparams")
    outer_, inner_ = call.pop("outer"), call.pop("inner")

    def run(response: Any) -> Any:
        solution = bilevel.hypergrad_solve(
            outer_, inner_, response, params, hparams, state=state, **call
        )
        return solution.grads, solution.result

    if shared and not changes and state is None and _is_argument(response):
        return Number(*_shared(response))
    return Number(*evaluate(lambda: run(response)))


@jax.jit
def _shared(response: Any) -> Any:
    solution = bilevel.hypergrad_solve(
        outer, inner, response, W, LAM,
        inner_batch=batch_of(response), outer_batch=VALID, key=KEY,
    )  # fmt: skip
    return solution.grads, solution.result


def _is_argument(response: Any) -> bool:
    leaves, treedef = jax.tree.flatten(response)
    try:
        hash(treedef)
    except TypeError:
        return False
    return all(isinstance(x, (float, np.floating, np.ndarray, jax.Array)) for x in leaves)


def responses() -> dict[str, Any]:
    """One of each kind, as a user would write them."""
    b = bilevel
    return {
        "cg": b.Implicit(b.CG(rtol=1e-10)),
        "dense": b.Implicit(b.Dense()),
        "neumann": b.Implicit(b.Neumann(200, 0.25)),
        "neumann_auto": b.Implicit(b.Neumann(200)),
        "stochastic": b.Implicit(b.Stochastic(optax.sgd(0.25), 200)),
        "nystrom": b.Implicit(b.Nystrom(N), b.Hessian(1e-9)),
        "woodbury": b.Implicit(b.Woodbury(), b.GaussNewton(model, output_loss, 0.0, penalty)),
        "unroll": b.Unroll(optax.sgd(RATE), STEPS),
        "unroll_reverse": b.Unroll(optax.sgd(RATE), STEPS, mode="reverse"),
        "unroll_forward": b.Unroll(optax.sgd(RATE), STEPS, mode="forward"),
        "evolution": b.Evolution(optax.sgd(RATE), STEPS, 2, 0.125),
        "difference": b.FiniteDifference(optax.sgd(RATE)),
        "best_response": b.BestResponse(tx=optax.sgd(0.1), steps=2),
    }


@functools.cache
def truths() -> dict[str, Any]:
    """The hypergradient that each of :func:`responses` promises here (``None``: a draw)."""
    return {
        **dict.fromkeys(
            ("cg", "dense", "neumann", "neumann_auto", "stochastic", "nystrom", "woodbury"),
            exact(),
        ),
        **dict.fromkeys(("unroll", "unroll_reverse", "unroll_forward"), unrolled()),
        "difference": unrolled(1),
    }
