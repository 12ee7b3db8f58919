"""What theory says of the errors of `inverse`, as numbers that must stay below one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.ground.linear_map import LinearMap
from experiments.inverse.config import Config
from experiments.inverse.problem import Case, Exact

# An error cannot be smaller than rounding makes it, however small its bound: float64 keeps 16
# digits and the condition numbers here cost up to four of them.
ROUNDING = 1e-12

Solved = dict[tuple[str, int], Any]


def _cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _ratio(error: Any, bound: Any, size: Any) -> float:
    return float(error / (bound + ROUNDING * size))


def ordering(solved: Solved, hypergradient: Any, q: Any) -> dict[str, float]:
    """The order of the errors: longer series are better, and CG is better than the series."""
    truth = np.asarray(hypergradient)

    def error(method: str, k: int) -> float:
        return float(np.linalg.norm(np.asarray(solved[method, k]["hypergradient"]) - truth))

    cosines = {k: _cosine(solved["neumann", k]["hypergradient"], truth) for k in (0, 5, 20)}
    same = np.asarray(solved["identity", 0]["q"]) - np.asarray(solved["neumann", 0]["q"])
    return {
        "cosine_gain_0_to_5": cosines[5] - cosines[0],
        "cosine_gain_5_to_20": cosines[20] - cosines[5],
        "cg_over_neumann_5": error("cg", 5) / error("neumann", 5),
        "cg_over_neumann_20": error("cg", 20) / error("neumann", 20),
        "identity_less_neumann_0": float(np.linalg.norm(same) / np.linalg.norm(q)),
    }


def linear(case: Case, exact: Exact, solved: Solved) -> dict[str, float]:
    r"""The bounds proven for a quadratic with :math:`\mu I \preceq H \preceq L I`.

    Neumann with :math:`a = 1/L`: :math:`\|B^\top(q_K - q)\| \le \|B\| (1-a\mu)^{K+1}\|g\|/\mu`,
    and in the eigenbasis of H no coordinate of the error of q ever grows. CG:
    :math:`\|q_K - q\|_H \le 2\rho^K\|q\|_H`, :math:`\rho = (\sqrt\kappa-1)/(\sqrt\kappa+1)`.
    """
    eigenvalues, basis = np.linalg.eigh(exact.hessian)
    low, high = eigenvalues[0], eigenvalues[-1]
    q, hypergradient = exact.inverse_times_g, exact.hypergradient
    # B is diagonal here, e^lambda_j w_j: its norm is its largest entry.
    mixed = float(np.max(np.abs(np.exp(case.hparams) * np.asarray(case.params))))
    rate = (np.sqrt(high / low) - 1) / (np.sqrt(high / low) + 1)
    bounds, energies, coordinates = [], [], []
    for (method, k), got in sorted(solved.items()):
        apart = np.asarray(got["q"]) - q
        if method == "neumann":
            error = np.linalg.norm(np.asarray(got["hypergradient"]) - hypergradient)
            bound = mixed * (1 - low / high) ** (k + 1) * np.linalg.norm(exact.g) / low
            bounds.append(_ratio(error, bound, np.linalg.norm(hypergradient)))
            coordinates.append(np.abs(basis.T @ apart) / np.linalg.norm(q))
        if method == "cg":
            energy = np.sqrt(q @ exact.hessian @ q)
            error = np.sqrt(apart @ exact.hessian @ apart)
            energies.append(_ratio(error, 2 * rate**k * energy, energy))
    (divergent,) = (np.asarray(got["q"]) for key, got in solved.items() if key[0] == "divergent")
    return {
        **ordering(solved, hypergradient, q),
        "neumann_bound": max(bounds),
        "neumann_growth": float(np.max(np.diff(coordinates, axis=0))),
        "cg_bound": max(energies),
        "divergence": float(np.linalg.norm(divergent) / np.linalg.norm(q)),
        "condition": float(high / low),
        "size": len(q),
    }


def nystrom(exact: Exact, damping: float, solved: Solved, config: Config, key: Any) -> float:
    r"""The largest :math:`\|q_k - q_\rho\| \Big/ \tfrac{\|g\|}{\rho}\tfrac{e}{\rho+e}` over ranks.

    :math:`q_\rho` solves the damped equation and :math:`e = \|H - H_k\|`, both dense; the sketch
    :math:`H_k` is read off the inverse that the solver applies to every unit vector.
    """
    size = len(exact.g)
    damped = exact.hessian + damping * np.eye(size)
    truth = np.linalg.solve(damped, exact.g)
    hessian = jnp.asarray(exact.hessian)

    def inverse(rank: int) -> np.ndarray:
        solver = bilevel.Nystrom(rank=rank, gaussian=True)
        product = LinearMap(lambda v: hessian @ v, damping)
        columns = jax.vmap(lambda e: solver.solve(product, e, key=key).value)
        return np.asarray(jax.jit(columns)(jnp.eye(size)))

    ratios = []
    for (method, k), got in solved.items():
        if method != "nystrom" or k not in (5, 20):
            continue
        sketch = np.linalg.inv(inverse(k)) - damping * np.eye(size)
        e = np.linalg.norm(exact.hessian - sketch, 2)
        bound = np.linalg.norm(exact.g) / damping * e / (damping + e)
        ratios.append(_ratio(np.linalg.norm(np.asarray(got["q"]) - truth), bound, 1.0))
    return max(ratios)
