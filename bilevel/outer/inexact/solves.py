r"""The two solves of an inexact outer step: the inner minimum, and :math:`H q = g`."""

import dataclasses
from typing import Any, NamedTuple

from bilevel.ground.aliases import Batch, Hparams, Key, Params, Scalar
from bilevel.ground.batches import check_stack, select_batch
from bilevel.ground.keys import check_key
from bilevel.ground.settings import check_count, check_flag
from bilevel.hypergradient.base import Hypergradient
from bilevel.hypergradient.implicit import Implicit
from bilevel.hypergradient.solve import solve
from bilevel.inner.minimize import Minimum, minimize
from bilevel.linear.cg import CG
from bilevel.outer.base import check_state
from bilevel.outer.variable import check_space
from bilevel.problem.operators.base import Operator
from bilevel.problem.operators.hessian import Hessian
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner, check_losses, check_problem

SOLVER, HESSIAN = CG(1000), Hessian()
"""What loops solve with unless told otherwise."""


class Solved(NamedTuple):
    """An inner minimum, and the hypergradient at it."""

    minimum: Minimum
    solution: Hypergradient

    @property
    def gradients(self) -> Any:
        """Inner gradients of the minimization."""
        return self.minimum.stats["num_gradients"]

    @property
    def products(self) -> Any:
        """Products of the linear solve, and the mixed one."""
        return self.solution.stats["num_matvecs"] + 1


@dataclasses.dataclass(frozen=True)
class Solves:
    """What both solves read besides their tolerances.

    Attributes:
      problem: the two losses.
      solver: conjugate gradients; its tolerances are replaced.
      operator: the curvature in place of H.
      max_steps: most steps of an inner minimization.
    """

    problem: Problem
    solver: CG
    operator: Operator
    max_steps: int

    def begin(self, params: Params, hparams: Hparams) -> Any:
        """A zero warm start of the linear solve."""
        return Implicit(self.solver, self.operator).init(self.problem, params, hparams)

    def batch(self, state: Any, kind: type, inner_batches: Batch, outer_batch: Batch) -> Batch:
        """The one training batch of a step whose arguments are checked here."""
        check_state(state, kind)
        check_stack(inner_batches, 1, "inner_batches", "one batch, on which the solves are made")
        batch = select_batch(inner_batches, 0)
        check_problem(self.problem, state.params, state.hparams, batch, outer_batch)
        check_inner(self.problem, state.params, state.hparams, batch)
        return batch

    def minimum(
        self,
        params: Params,
        hparams: Hparams,
        batch: Batch,
        tol: Scalar,
        curvatures: tuple[Scalar, Scalar] | None = None,
    ) -> Minimum:
        """The inner minimum, up to a gradient of length ``tol``, from ``params`` on."""
        return minimize(
            self.problem.inner, params, hparams, batch,
            tol=tol, max_steps=self.max_steps, curvatures=curvatures,
        )  # fmt: skip

    def hypergradient(
        self,
        minimum: Minimum,
        hparams: Hparams,
        batch: Batch,
        outer_batch: Batch,
        start: Any,
        key: Key | None,
        **tolerance: Any,
    ) -> Solved:
        """The hypergradient at a minimum, the linear solve stopped at ``rtol`` or ``atol``."""
        check_key(key)
        solver = dataclasses.replace(self.solver, **{"rtol": None, "atol": None, **tolerance})
        solution = solve(
            self.problem,
            Implicit(solver, self.operator),
            minimum.params,
            hparams,
            inner_batch=batch,
            outer_batch=outer_batch,
            state=start,
            key=key,
        )
        return Solved(minimum, solution)


def check_solves(
    outer: Any,
    inner: Any,
    solver: Any,
    operator: Any,
    constrain: Any,
    has_aux: Any,
    max_steps: Any,
) -> Solves:
    """The solves of a loop, from settings that are checked here."""
    check_losses(outer=outer, inner=inner)
    check_flag("has_aux", has_aux)
    check_space(constrain, "{'decay': Positive()}")
    check_count("max_steps", max_steps)
    if not isinstance(solver, CG):
        raise TypeError(
            "`solver` must be a `CG(max_steps=..., preconditioner=...)`, whose tolerance the loop "
            f"sets in every step, got {solver!r}."
        )
    if solver.rtol is not None or solver.atol is not None:
        raise ValueError(
            "`solver` has a tolerance of its own (`rtol`, `atol`), which the loop sets in every "
            "step: leave it out."
        )
    return Solves(Problem(outer, inner, has_aux), solver, operator, max_steps)
