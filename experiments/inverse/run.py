"""Runs `inverse`: each approximation of the inverse Hessian, at each budget, against the truth."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel
from experiments.common import budget, record
from experiments.inverse import checks, problem
from experiments.inverse.config import Config

TABLE = ("products", "relative_error", "cosine")
NETWORK = ("hessian", "gauss_newton")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All problems of one seed; a resumed run measures the seed again."""
    records = record.Records(out, seed)
    records.rewind()
    with jax.enable_x64(True):
        for name in config.regressions:
            _regression(name, name, config, seed, records)
        for name in config.conditioned:
            label = f"{name}_conditioned"
            _regression(label, name, config, seed, records, config.condition)
        _network(config, seed, records)


@functools.cache
def measurer(outer: Any, inner: Any) -> Callable[..., dict[str, Any]]:
    """`(solver, operator, case, key) -> q, hypergradient and what it took`, jitted."""
    losses = bilevel.Problem(outer, inner)

    @jax.jit
    def measure(solver: Any, operator: Any, case: problem.Case, key: Any) -> dict[str, Any]:
        bound = operator.bind(losses, case.params, case.hparams, case.train, fresh=False)
        g = jax.grad(outer)(case.params, case.hparams, case.valid)
        solution = solver.solve(bound.mv, g, key=key)
        mixed = losses.cross_vjp(case.params, case.hparams, case.train, solution.value)
        return {
            "q": ravel_pytree(solution.value)[0],
            "hypergradient": -ravel_pytree(mixed)[0],
            "stationarity": jnp.linalg.norm(ravel_pytree(bound.inner_grad)[0]),
            "g": ravel_pytree(g)[0],
            "stats": solution.stats,
            "result": solution.result,
        }

    return measure


def solvers(config: Config, step: float, size: int) -> Iterator[tuple[str, int, Any]]:
    """Names, budgets and solvers; every one of them reads the curvature by products alone.

    Step size and scale are the inverse of the largest curvature, which is known here; where it
    is not, `Neumann` finds it by ten products more.
    """
    yield "identity", 0, bilevel.Identity(step)
    for k in config.budgets:
        yield "neumann", k, bilevel.Neumann(num_matvecs=k, step_size=step)
        if k:
            yield "cg", k, bilevel.CG(max_steps=k)
        if 0 < k <= size:
            yield "nystrom", k, bilevel.Nystrom(rank=k, gaussian=True)


def compare(measured: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Relative distance and cosine of two vectors."""
    measured, truth = np.asarray(measured), np.asarray(truth)
    lengths = np.linalg.norm(measured) * np.linalg.norm(truth)
    # 1 - cosine from the distance of the unit vectors: the difference itself would cancel.
    apart = measured / np.linalg.norm(measured) - truth / np.linalg.norm(truth)
    return {
        "relative_error": float(np.linalg.norm(measured - truth) / np.linalg.norm(truth)),
        "cosine": float(measured @ truth / lengths),
        "one_minus_cosine": float(apart @ apart / 2),
    }


def _append(
    records: record.Records, name: str, k: int, case: problem.Case, got: Any, truth: np.ndarray
) -> None:
    products = float(got["stats"]["num_matvecs"])
    outer = budget.weight(len(case.valid["y"]), len(case.train["y"]))
    records.append(
        name,
        k,
        budget.implicit_hypergradient(products, outer).total,
        products=products,
        result=int(got["result"]),
        **compare(got["hypergradient"], truth),
    )


def _regression(
    name: str,
    rows: str,
    config: Config,
    seed: int,
    records: record.Records,
    condition: float | None = None,
) -> None:
    """Ridge regression: the truth is dense linear algebra that shares nothing with the library."""
    case, exact = problem.ridge(rows, config, seed, condition)
    measure = measurer(problem.ridge_outer, problem.ridge_inner)
    eigenvalues = np.linalg.eigvalsh(exact.hessian)
    step = 1 / eigenvalues[-1]
    small = bilevel.Hessian(config.nystrom_damping * eigenvalues[-1])
    key = jax.random.key(seed)
    solved: dict[tuple[str, int], Any] = {}
    for method, k, solver in solvers(config, step, len(exact.g)):
        operator = small if method == "nystrom" else bilevel.Hessian()
        got = solved[method, k] = measure(solver, operator, case, key)
        _append(records, f"{name}_{method}", k, case, got, exact.hypergradient)
    for k in config.long_series:
        series = bilevel.Neumann(num_matvecs=k, step_size=step)
        solved["neumann", k] = measure(series, bilevel.Hessian(), case, key)
    long = bilevel.Neumann(num_matvecs=config.divergent, step_size=2.1 * step)
    solved["divergent", config.divergent] = measure(long, bilevel.Hessian(), case, key)
    records.append(
        f"{name}_checks",
        0,
        0.0,
        **checks.linear(case, exact, solved),
        nystrom_bound=checks.nystrom(exact, float(small.damping), solved, config, key),
    )


def _network(config: Config, seed: int, records: record.Records) -> None:
    """A trained network: the truth is the dense solution of the same, damped, equation."""
    case = problem.network(config, seed)
    operators = {
        "hessian": bilevel.Hessian(config.damping),
        "gauss_newton": problem.gauss_newton(config.damping),
    }
    measure = measurer(problem.network_outer, problem.gauss_newton(0.0).loss)
    key = jax.random.key(seed)
    undamped = measure(bilevel.Dense(), bilevel.Hessian(), case, key)
    for name in NETWORK:
        operator = operators[name]
        truth = measure(bilevel.Dense(), operator, case, key)
        largest = float(truth["stats"]["max_curvature"])
        size = len(truth["q"])
        solved = {}
        for method, k, solver in solvers(config, 1 / largest, size):
            more = dataclasses.replace(operator, damping=config.nystrom_damping * largest)
            chosen = more if method == "nystrom" else operator
            got = solved[method, k] = measure(solver, chosen, case, key)
            _append(records, f"digits_{name}_{method}", k, case, got, truth["hypergradient"])
        # How far the damped equation itself is from the Hessian's: no solver can undo that.
        apart = compare(truth["hypergradient"], undamped["hypergradient"])
        records.append(
            f"digits_{name}_checks",
            0,
            0.0,
            **checks.ordering(solved, truth["hypergradient"], truth["q"]),
            operator_error=apart["relative_error"],
            operator_cosine=apart["cosine"],
            min_curvature=truth["stats"]["min_curvature"],
            max_curvature=largest,
            undamped_min_curvature=undamped["stats"]["min_curvature"],
            stationarity=truth["stationarity"],
            relative_stationarity=truth["stationarity"] / jnp.linalg.norm(truth["g"]),
            size=size,
        )
