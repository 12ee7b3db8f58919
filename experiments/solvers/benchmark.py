"""Our loops as solvers of the public benchmark of bilevel solvers, `benchopt/benchmark_bilevel`.

The benchmark's JAX solvers derive from its `StochasticJaxSolver`, which holds the two losses as
`f(inner_var, outer_var, start)`, a batch being its first row, and drives steps that its solver
makes. A file of a checkout's folder `solvers/` is then

    from benchopt import safe_import_context
    with safe_import_context() as import_ctx:
        from benchmark_utils.stochastic_jax_solver import StochasticJaxSolver
        from experiments.solvers.benchmark import solver
    Solver = solver(StochasticJaxSolver, "soba")

Nothing here imports the benchmark, which is no dependency of ours.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.solvers.steps import falling, momentum

ADAPTED = ("soba", "saba", "fsla", "mrbo", "stocbio", "amigo")  # those that need no full batch
TERMS = 10  # training steps and products of the nested methods, as in the benchmark


def solver(base: type, method: str) -> type:
    """A solver class of the benchmark that runs our `method`."""
    if method not in ADAPTED:
        raise ValueError(f"method must be one of {', '.join(ADAPTED)}, got {method!r}")

    parameters = {
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "batch_size": [64],
        **getattr(base, "parameters", {}),
    }
    return type(
        "Solver",
        (base,),
        {
            "__doc__": f"{method} of the package bilevel.",
            "name": f"bilevel-{method}",
            "parameters": parameters,
            "init": functools.partialmethod(_init, method),
            "get_step": functools.partialmethod(_get_step, method),
        },
    )


def algorithm(self: Any, method: str) -> bilevel.Algorithm:
    """Our loop with the benchmark's losses, step sizes and number of batches."""
    losses = self.f_outer, self.f_inner
    tx, outer_tx = optax.sgd(self.step_size), optax.sgd(self.step_size / self.outer_ratio)
    falls = {"schedule": falling(method)}
    if method == "soba":
        return bilevel.soba(*losses, tx, tx, outer_tx, **falls)
    if method == "saba":
        return bilevel.saba(*losses, tx, tx, outer_tx, *_lengths(self))
    if method == "fsla":
        return bilevel.fsla(*losses, tx, tx, outer_tx, momentum(method), **falls)
    if method == "mrbo":
        storm = momentum(method), momentum(method)
        return bilevel.mrbo(*losses, tx, outer_tx, *storm, TERMS, self.step_size, **falls)
    if method == "stocbio":
        return bilevel.stocbio(*losses, tx, outer_tx, TERMS, TERMS, self.step_size)
    return bilevel.amigo(*losses, tx, tx, outer_tx, TERMS, TERMS)


def _lengths(self: Any) -> tuple[int, int]:
    """How many batches each loss has; the last one may be shorter."""
    return (
        int(np.ceil(self.n_inner_samples / self.batch_size_inner)),
        int(np.ceil(self.n_outer_samples / self.batch_size_outer)),
    )


def _init(self: Any, method: str) -> dict[str, Any]:
    """The carry of the benchmark: the two variables it reads, our state, its samplers."""
    state = algorithm(self, method).init(self.inner_var0, self.outer_var0)
    return {
        "inner_var": state.params,
        "outer_var": state.hparams,
        "state": state,
        "state_inner_sampler": self.state_inner_sampler,
        "state_outer_sampler": self.state_outer_sampler,
    }


def _get_step(self: Any, method: str, inner_sampler: Any, outer_sampler: Any) -> Any:
    loop = algorithm(self, method)
    count = {"mrbo": TERMS + 2, "stocbio": 2 * TERMS + 1, "amigo": 2 * TERMS + 1}.get(method, 1)

    def step(carry: dict[str, Any], _: Any) -> tuple[dict[str, Any], None]:
        starts, drawn = [], carry["state_inner_sampler"]
        for _ in range(count):
            start, *_, drawn = inner_sampler(drawn)
            starts.append(start)
        inner: Any = jnp.stack(starts)
        outer, *_, other = outer_sampler(carry["state_outer_sampler"])
        if method == "saba":
            inner = bilevel.Indexed(inner, inner // self.batch_size_inner)
            outer = bilevel.Indexed(outer, jnp.asarray(outer) // self.batch_size_outer)
        state, _ = loop.step(carry["state"], inner_batches=inner, outer_batch=outer)
        new = {
            "inner_var": state.params,
            "outer_var": state.hparams,
            "state": state,
            "state_inner_sampler": drawn,
            "state_outer_sampler": other,
        }
        return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), new, carry), None

    return step
