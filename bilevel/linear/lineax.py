r"""lineax's Krylov solvers as solvers of this library: one thin adapter (extra ``lineax``)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.settings import require_extra
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import LinearSolution, as_map, finish, require_fixed, require_symmetric


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Lineax:
    r"""Solves :math:`A q = g` with a solver of the lineax package.

    Args:
      solver: a ``lineax`` solver value: ``lineax.CG(rtol, atol, max_steps=...)``, ``GMRES``,
        ``BiCGStab``, ``Normal(lineax.CG(...))``. Its tolerances are traced.

    Tolerances and failure mean what they mean in lineax (element-wise, in the maximum norm
    unless it was given another); its outcome is mapped to a status: ``max_steps``,
    ``stagnated``, ``nonfinite_input``, ``singular``; a breakdown becomes
    ``negative_curvature``, and NaN stays NaN (``nonfinite_output``). The residual is recomputed.
    ``lineax.CG`` is told that A is positive definite; the others that it is symmetric, unless
    it is that of a ``FixedPoint`` or a ``Root``.

    Two things are done for it. The system is solved as :math:`(cA)(q/c) = g` with a large c,
    because ``lineax.CG`` takes curvature below about :math:`100 ϵ n` for a breakdown,
    which any mean loss with many parameters has. And the start is one steepest-descent step
    instead of zero, because it multiplies its start by A, and XLA on CPU can return wrong
    numbers for a product with a constant zero.

    Cost: one product and those of the solver (``num_matvecs`` counts them all for ``lineax.CG``
    and is absent for the others, which do not tell). Convolutions on CPU stay inside its loop
    and are slow; ``CG()`` unrolls them. Raises ``ImportError`` without lineax and
    ``ValueError`` for fresh batches and on a mesh with explicit axes.

    Reference: Rader, Lyons, Kidger, "Lineax: unified linear solves and linear least-squares in
    JAX and Equinox", 2023.
    """

    solver: Any

    uses_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Placeholders pass: JAX rebuilds pytrees with them.
        if isinstance(self.solver, (type, str)) or self.solver is None:
            raise TypeError(
                f"`solver` must be a lineax solver, such as `lineax.CG(rtol=1e-6, atol=0.0)`, got "
                f"{self.solver!r}."
            )

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Tolerances and other floats are traced; counts and functions are static."""
        form = getattr(self, "_form", None)
        if form is None:
            leaves, treedef = jax.tree.flatten(self.solver)
            traced = tuple(isinstance(x, (float, jax.Array)) for x in leaves)
            fixed = tuple(None if t else x for x, t in zip(leaves, traced, strict=True))
            form = treedef, traced, fixed
        leaves = form[0].flatten_up_to(self.solver)
        return tuple(x for x, t in zip(leaves, form[1], strict=True) if t), form

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> "Lineax":
        """The inverse of :meth:`tree_flatten`."""
        treedef, traced, fixed = aux
        floats = iter(children)
        leaves = [next(floats) if t else x for t, x in zip(traced, fixed, strict=True)]
        rebuilt = cls(jax.tree.unflatten(treedef, leaves))
        # JAX rebuilds pytrees around placeholders, which do not tell what they stand for.
        object.__setattr__(rebuilt, "_form", aux)
        return rebuilt

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """Solve from ``x0``, or from a steepest-descent step for ``None``; no ``key``."""
        lx = require_extra("lineax", "lineax", "The adapter `Lineax(...)`")
        if not isinstance(self.solver, lx.AbstractLinearSolver):
            raise TypeError(
                "`response.solver.solver` must be a lineax solver, such as `lineax.CG(rtol=1e-6, "
                f"atol=0.0)`, got {self.solver!r}."
            )
        rhs = tree.accumulate(rhs)
        tree.refuse_explicit(rhs, "response.solver", "lineax", "use `CG()` or `Neumann(...)`")
        amap = as_map(mv, rhs)
        require_fixed(amap, "Lineax")

        gg, gag = tree.vdot(rhs, rhs), tree.vdot(rhs, amap(rhs))
        # 1 / curvature along g. Written so that a NaN stays one: lineax ends its loop at a NaN
        # and would return the start as a success.
        unusable = (gg == 0) | (gag <= 0)
        step = jnp.where(unusable, 1, gg / jnp.where(unusable, 1, gag))
        factor = step / jnp.finfo(gg.dtype).eps
        if x0 is None:
            start = tree.scale(step, rhs)
        else:
            start = jax.lax.optimization_barrier(tree.cast_like(x0, rhs))

        definite = isinstance(self.solver, lx.CG)
        if definite:
            require_symmetric(amap, "lineax.CG")
        tag = lx.positive_semidefinite_tag if definite else lx.symmetric_tag
        operator = lx.FunctionLinearOperator(
            lambda v: tree.scale(factor, amap(v)),
            jax.eval_shape(lambda: rhs),
            tag if amap.transpose is None else (),
        )
        solution = lx.linear_solve(
            operator,
            rhs,
            self.solver,
            options={"y0": tree.scale(1 / factor, start)},
            throw=False,
        )
        value = tree.scale(factor, solution.value)
        codes = lx.RESULTS
        result = status_of(
            Status.ok,
            (solution.result == codes.nonfinite_input, Status.nonfinite_input),
            (
                (solution.result == codes.breakdown) | ((gag < 0) & definite),
                Status.negative_curvature,
            ),
            (solution.result == codes.singular, Status.singular),
            (
                (solution.result == codes.stagnation) | (solution.result == codes.conlim),
                Status.stagnated,
            ),
            (solution.result == codes.max_steps_reached, Status.max_steps),
        )
        stats = {}
        if definite:  # the other solvers do not say how many products one of their steps takes
            steps = jnp.asarray(solution.stats["num_steps"], jnp.int32)
            every = self.solver.stabilise_every
            stats["num_matvecs"] = steps + 2 + (0 if every is None else steps // every)
        return finish(amap, rhs, value, stats, result, certify)
