"""The same hypergradients through lineax, optimistix and jaxopt, at the best of their settings.

Each is imported when its column is traced, so that a missing library costs its column only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import plain

# lineax's CG takes a curvature below 200 n eps |r|^2 for zero and returns NaN, which a mean loss
# over thousands of examples meets at once. Multiplying the operator by this number cures it.
RESCALE = 1e4


def lineax_cg(
    outer: Callable, inner: Callable, bind: Callable, steps: int, rtol: float | None
) -> Callable:
    """`lineax.CG` on the product that `bind(params, hparams, batch)` returns."""

    def solve(g: Any, params: Any, hparams: Any, batch: Any, key: Any) -> Any:
        import lineax as lx

        mv = bind(params, hparams, batch)
        operator = lx.FunctionLinearOperator(
            lambda v: jax.tree.map(lambda x: RESCALE * x, mv(v)),
            jax.eval_shape(lambda: g),
            lx.positive_semidefinite_tag,
        )
        solver = _lineax_solver(g, steps, rtol)
        solution = lx.linear_solve(operator, g, solver, throw=False)
        return jax.tree.map(lambda x: RESCALE * x, solution.value)

    return plain.hypergradient(outer, inner, solve)


def _lineax_solver(g: Any, steps: int, rtol: float | None) -> Any:
    import lineax as lx

    if rtol is None:
        return lx.CG(rtol=0.0, atol=0.0, max_steps=steps)
    # By default a tolerance holds for each entry; this is |r| <= rtol |g| in the 2-norm.
    atol = rtol * jnp.sqrt(plain.dot(g, g))
    return lx.CG(rtol=0.0, atol=atol, norm=lx.internal.two_norm, max_steps=steps)  # pyright: ignore


def _root(inputs: Any) -> tuple[Any, None]:
    return inputs[0], None


def _optimality(w: Any, _: None, inputs: Any) -> Any:
    _, hparams, batch, inner = inputs
    gradient = jax.grad(inner)(w, hparams, batch)
    return jax.tree.map(lambda x: RESCALE * x, gradient)


def optimistix_cg(outer: Callable, inner: Callable, steps: int, rtol: float | None) -> Callable:
    """What `optimistix.ImplicitAdjoint(lineax.CG(...))` does at a known minimizer (Hessian)."""

    def function(params: Any, hparams: Any, inner_batch: Any, outer_batch: Any, key: Any) -> Any:
        import lineax as lx
        import optimistix as optx

        g = jax.grad(outer)(params, hparams, outer_batch)
        tags = frozenset({lx.positive_semidefinite_tag})
        solver = _lineax_solver(g, steps, rtol)

        def minimiser(lam: Any) -> Any:
            inputs = (params, lam, inner_batch, inner)
            return optx.internal.implicit_jvp(_root, _optimality, inputs, tags, solver)[0]

        return jax.vjp(minimiser, hparams)[1](g)[0]

    return function


def jaxopt_root(outer: Callable, inner: Callable, solve: Callable) -> Callable:
    """`jaxopt.implicit_diff.root_vjp` with `solve(matvec, b)`."""

    def function(params: Any, hparams: Any, inner_batch: Any, outer_batch: Any, key: Any) -> Any:
        from jaxopt.implicit_diff import root_vjp

        g = jax.grad(outer)(params, hparams, outer_batch)

        def optimality(w: Any, lam: Any) -> Any:
            return jax.grad(inner)(w, lam, inner_batch)

        return root_vjp(optimality, params, (hparams,), g, solve=solve)[0]

    return function


def jaxopt_cg(steps: int, rtol: float | None) -> Callable:
    """`solve_cg`, the faster of jaxopt's two CG solvers (its default is the normal equations)."""

    def solve(matvec: Callable, b: Any) -> Any:
        from jaxopt.linear_solve import solve_cg

        return solve_cg(matvec, b, tol=0.0 if rtol is None else rtol, maxiter=steps)

    return solve
