"""What `hoag` is judged by: the exact value function in float64, and a bound on its errors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds

import bilevel
from bilevel.outer.inexact.certificate import error_bound
from experiments.hoag import problem
from experiments.hoag.problem import Task

RELATIVE = 1e-5  # of the solves: far below the errors that are measured


class Truth(NamedTuple):
    """One regression in float64, and the two constants of its loss that the bound reads."""

    train: Any
    valid: Any
    outer_smoothness: float
    hessian_lipschitz: float


def of(task: Task) -> Truth:
    """For a logistic loss: a quarter of the squared norm of X, and sum |x|^3 / (6 sqrt 3)."""
    found: Any = svds(_matrix(task.valid), k=1, return_singular_vectors=False)
    longest = float(found[0])
    rows = np.sqrt(np.asarray(_matrix(task.train).power(2).sum(1))).ravel()
    with jax.enable_x64(True):
        train, valid = jax.tree.map(_wide, (task.train, task.valid))
    # One part in a thousand for the iterations that found the norm.
    return Truth(train, valid, 1.001 * longest**2 / 4, float(np.sum(rows**3)) / (6 * 3**0.5))


def at(truth: Truth, params: Any, response: Any, hparams: Any) -> dict[str, float]:
    """At ``hparams``: F, its derivative, and the bound on the error of a computed one.

    ``params`` and ``response`` are what two inexact solves returned.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(_wide, (params, response, hparams))
        found = _measured()(*wide, *truth)
        return {name: float(x) for name, x in found.items()}


@functools.cache
def _measured() -> Any:
    exact = bilevel.Implicit(bilevel.CG(5_000, rtol=RELATIVE))

    @jax.jit
    def measured(w: Any, q: Any, lam: Any, train: Any, valid: Any, l_f: Any, l_h: Any) -> Any:
        scale = jnp.linalg.norm(jax.grad(problem.inner)(jnp.zeros_like(w), lam, train))
        best = bilevel.minimize(problem.inner, w, lam, train, tol=RELATIVE * scale, max_steps=5_000)
        solution = bilevel.hypergrad_solve(
            problem.outer, problem.inner, exact, best.params, lam,
            inner_batch=train, outer_batch=valid, state=q,
        )  # fmt: skip
        gradient = jax.grad(problem.inner)
        slope, product = jax.jvp(lambda w: gradient(w, lam, train), (w,), (q,))
        g = jax.grad(problem.outer)(w, lam, valid)
        constants = bilevel.Certificate.of_log_decays(l_f, l_h).at(w, lam)
        distance = jnp.linalg.norm(slope) / constants.convexity
        bound = error_bound(constants, distance, jnp.linalg.norm(product - g), jnp.linalg.norm(g))
        return {"value": solution.value, "derivative": solution.grads, "bound": bound}

    return measured


def _matrix(part: Any) -> csr_matrix:
    if "x" in part:
        return csr_matrix(np.asarray(part["x"], np.float64))
    rows = part["rows"]
    value, minor = (np.asarray(rows[name]) for name in ("value", "minor"))
    major = np.repeat(np.asarray(rows["major"]), value.shape[1])
    return csr_matrix((value.ravel().astype(np.float64), (major, minor.ravel())))


def _wide(x: Any) -> jax.Array:
    array = np.asarray(x)
    return jnp.asarray(array, jnp.float64 if array.dtype.kind == "f" else array.dtype)
