r"""Implicit differentiation: the response of a minimizer, by the implicit function theorem."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params, Stats, Vector
from bilevel.ground.batches import check_stack, one_batch, select_batch
from bilevel.ground.cost import UNKNOWN, Cost
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.settings import check_settings
from bilevel.ground.status import Status, status_of, worst
from bilevel.ground.traced import depends, is_costly, reaches
from bilevel.hypergradient.base import Pullback
from bilevel.hypergradient.judge import rounding_of_solve, stationarity_stats
from bilevel.linear.base import CarryingSolver, LinearSolution, LinearSolver, state_of
from bilevel.linear.cg import CG
from bilevel.linear.dual_cg import DualCG
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.woodbury import Woodbury
from bilevel.problem.conditions import Composite
from bilevel.problem.knots import knots
from bilevel.problem.operators.base import BoundOperator, Operator
from bilevel.problem.operators.composite import SymmetricForm, bind_composite
from bilevel.problem.operators.hessian import Hessian
from bilevel.problem.operators.jacobian import Jacobian
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner, check_is_read, check_same_tree


class Carried(NamedTuple):
    """The state of a solver that carries more than the start of its next solve.

    Attributes:
      start: the previous :math:`q`; ``None`` for a solver without a start.
      solver: what the solver carries, see :class:`~bilevel.linear.base.CarryingSolver`.
    """

    start: Vector | None
    solver: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Implicit:
    r"""The pullback :math:`g ↦ -Bᵀ q` with :math:`A q = g`.

    At a minimum, :math:`∇_w h(w^*(λ), λ) = 0` gives
    :math:`∂w^*/∂λ = -H^{-1}B`. The parameters are taken as that minimum
    and returned unchanged; ``stats`` tell how far from it they are (``stationarity``,
    ``relative_stationarity``, ``predicted_change``), and the status is ``not_stationary`` where
    that is more than 5 % of their length or of the outer loss.

    Parameters that the inner loss does not read differentiably (leaves behind a
    ``stop_gradient``, frozen ones) do not respond, and are left out of the system.

    Where the inner problem is a ``Composite``, the same on the support that its proximal operator
    identifies. Where it is a ``FixedPoint`` or a ``Root``, the same with the Jacobian of its
    condition in place of H: the system is not symmetric, and the solver must allow that.
    ``stats["knots"]`` counts the numbers that are just at a threshold of a condition, where it has
    no derivative (status ``knot``).

    Args:
      solver: how :math:`A q = g` is solved: ``CG``, ``Neumann``, ``Nystrom``, ``Woodbury``,
        ``Dense``, ``Stochastic``, ``Identity``, or anything with their ``solve``.
      operator: what :math:`A` is: ``Hessian(damping)`` or ``GaussNewton(...)``.
      warm_start: start each solve from what the call before it left in ``state``: the previous
        :math:`q`, for one more product; a preconditioner that is to serve several calls. Series
        and direct solvers carry nothing.
      fresh_batches: ``inner_batch`` has a leading axis; product i uses slice i and the mixed
        product :math:`Bᵀ q` the last, independent one. For stochastic solvers only. The
        axis must be one longer than the solver's number of products.
      certify: recompute the residual of each solve, for one product where the number or the status
        is read. False leaves ``residual_norm`` out, and the status to what the solver met on its
        way: for a loop that was checked and is to be as cheap as it can.

    Cost: one inner gradient to linearize, the solver's products, and one mixed product (at
    most 2.5 gradients); one vector of state with a warm start.

    Reference: Bengio, "Gradient-based optimization of hyperparameters", Neural Computation
    2000; Lorraine, Vicol, Duvenaud, AISTATS 2020, Algorithm 1.
    """

    solver: LinearSolver = CG()
    operator: Operator = Hessian()
    warm_start: bool = dataclasses.field(default=True, metadata={"static": True})
    fresh_batches: bool = dataclasses.field(default=False, metadata={"static": True})
    certify: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        check_settings(self)

    def init(self, problem: Problem, params: Params, hparams: Hparams) -> Any:
        """A zero warm start, shaped like ``params`` in the accumulator dtype, or ``None``.

        In :class:`Carried` beside the solver's own state where it has one.
        """
        start = tree.zeros_accumulated(params) if self._carries_start() else None
        own = state_of(self.solver, params) if self.warm_start else None
        return start if own is None else Carried(start, own)

    def num_inner_batches(self) -> int | None:
        """Length of the leading axis of ``inner_batch``, or None where it is a single batch."""
        count = getattr(self.solver, "num_products", None)
        # A solver that cannot have fresh batches is refused by `check`.
        return count() + 1 if self.fresh_batches and count is not None else None

    def cost(self, hparams: Hparams, stats: Stats) -> Cost:
        """The solver's products and the mixed one."""
        return Cost(products=stats.get("num_matvecs", UNKNOWN) + 1)

    def _carries_start(self) -> bool:
        return self.warm_start and getattr(self.solver, "uses_start", False)

    def check(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: Any,
    ) -> None:
        """Raise what this response can tell is wrong, at trace time."""
        batch = inner_batch
        if self.fresh_batches:
            self._check_fresh(inner_batch)
            batch = one_batch(inner_batch)
        check_inner(problem, params, hparams, batch)
        check_is_read(problem, params, hparams, batch, outer_batch)
        if state is not None and self.warm_start:
            expected = jax.eval_shape(lambda: self.init(problem, params, hparams))
            if expected is not None:
                check_same_tree(state, expected, "state")

    def _check_fresh(self, inner_batch: Batch) -> None:
        needed = self.num_inner_batches()
        if needed is None:
            raise ValueError(
                f"`fresh_batches=True` needs a solver for random matrices, such as "
                f"`Stochastic(...)` or `Neumann(...)`; {type(self.solver).__name__} needs one "
                "fixed matrix."
            )
        reads = (
            f"`fresh_batches=True` reads one batch for each of the {needed - 1} products and one "
            "for the mixed product"
        )
        check_stack(inner_batch, needed, "inner_batch", reads)

    def bind(self, problem: Problem, params: Params, hparams: Hparams, batch: Batch) -> "System":
        """The condition at ``params`` and :math:`A`; that of a condition is its Jacobian's."""
        operator = self.operator
        if isinstance(problem.inner, Composite):
            self._check_composite()
            problem = problem.settled(params, hparams, batch)
            return System(*bind_composite(operator, problem, params, hparams, batch))
        if not problem.has_loss:
            if not isinstance(operator, (Hessian, Jacobian)):
                raise TypeError(
                    f"`operator` is {type(operator).__name__}, which stands for the curvature of a "
                    "loss: leave it out for a `FixedPoint` or a `Root`, or pass "
                    "`Jacobian(damping=...)`."
                )
            operator = Jacobian(operator.damping)
        return System(operator.bind(problem, params, hparams, batch, fresh=self.fresh_batches))

    def _check_composite(self) -> None:
        if isinstance(self.solver, (DualCG, Nystrom, Woodbury)):
            raise TypeError(
                f"`solver` is {type(self.solver).__name__}, which inverts the damping of the whole "
                "space, and the system of a `Composite` stands on its support alone: use "
                "`CG(...)`, `Dense()`, `Lineax(...)` or `Neumann(...)`."
            )
        if self.fresh_batches:
            raise ValueError(
                "`fresh_batches=True` does not go with a `Composite`, whose support would be that "
                "of each batch: leave it out."
            )

    def vjp(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        state: Any,
        *,
        key: Key | None = None,
    ) -> tuple[Params, Pullback]:
        """``params`` and the pullback through the minimum they are taken for."""
        problem = problem.settled(params, hparams, inner_batch)
        system = self.bind(problem, params, hparams, inner_batch)
        mixed_batch = inner_batch
        if self.fresh_batches:
            mixed_batch = select_batch(inner_batch, (self.num_inner_batches() or 1) - 1)
        responds = responding(problem, params, hparams, mixed_batch)
        anew = problem.has_loss and not costly_to_redo(problem, params, hparams, mixed_batch)

        def pullback(g: Vector) -> tuple[Hparams, Any, jax.Array, Stats]:
            g = restricted(g, responds)
            mv, right_side, back = system.equation(g)
            (z, result, stats), carried = self._solve(mv, right_side, state, key)
            q = back(z)
            read = read_after(q, hparams) if anew else hparams
            b_transpose_q = problem.cross_vjp(params, read, mixed_batch, q)
            indirect = tree.scale(-1, b_transpose_q)  # the one place where the sign is decided
            result = rounding_of_solve(result, params, stats)
            stats = {**stationarity_stats(system.inner_grad, params, g, q, stats), **stats}
            if not problem.has_loss:
                stats["knots"] = knots(problem, params, hparams, mixed_batch)
                result = worst(result, status_of(Status.ok, (stats["knots"] > 0, Status.knot)))
            return indirect, carried, result, stats

        return params, pullback

    def _solve(
        self, mv: LinearMap, g: Vector, state: Any, key: Key | None
    ) -> tuple[LinearSolution, Any]:
        """The solve from what is carried, and what the next call is given."""
        solver, starts = self.solver, self._carries_start()
        if self.warm_start and isinstance(solver, CarryingSolver):
            if solver.init_state(g) is not None:
                start, own = (None, None) if state is None else state
                solution, own = solver.solve_from(mv, g, own, start, key=key, certify=self.certify)
                return solution, Carried(solution.value if starts else None, own)
        start = state if starts else None
        solution = solver.solve(mv, g, start, key=key, certify=self.certify)
        return solution, solution.value if starts else None


class System(NamedTuple):
    r"""The system :math:`A q = g` of a problem at a point, as its solver sees it.

    Attributes:
      bound: the condition there, and the product that the solver gets.
      form: the way to that product and back, for a composite condition.
    """

    bound: BoundOperator
    form: SymmetricForm | None = None

    @property
    def inner_grad(self) -> Vector:
        """The condition, zero at a solution."""
        return self.bound.inner_grad

    def equation(
        self, g: Vector, *, adjoint: bool = True
    ) -> tuple[LinearMap, Vector, Callable[[Vector], Vector]]:
        """What a solver gets for g, the matrix and the right side, and the way from z back to q.

        Not ``adjoint``: for the system with the transposed matrix.
        """
        mv, form = self.bound.mv, self.form
        if form is None:
            return (mv if adjoint else mv.transposed()), g, lambda z: z
        g = tree.accumulate(g)
        return mv, form.right_side(g, adjoint), lambda z: form.solution(g, z, adjoint)

    def forward(self, v: Vector) -> Vector:
        r""":math:`Aᵀ v`: the derivative of the condition."""
        if self.form is None:
            return self.bound.mv.transposed()(v)
        return self.form.forward(v)


def costly_to_redo(problem: Problem, params: Params, hparams: Hparams, batch: Batch) -> bool:
    """Whether more than elementwise work in the inner loss depends on the hyperparameters."""

    def loss(lam: Hparams, w: Params) -> Any:
        return problem.inner_loss(w, lam, batch)

    return reaches(loss, hparams, params, where=is_costly)


def read_after(q: Vector, hparams: Hparams) -> Hparams:
    """``hparams``, or NaN where the solution is NaN: they are not known before it.

    What the mixed product computes of them is then made after the solve. Otherwise the compiler
    shares it with what was computed before, and keeps it through the solve: for one strength for
    each weight, a vector more of memory.
    """
    lost = jnp.isnan(jnp.sum(min(jax.tree.leaves(q), key=jnp.size)))
    return jax.tree.map(lambda lam: jnp.where(lost, jnp.nan, lam), hparams)


def responding(problem: Problem, params: Params, hparams: Hparams, batch: Batch) -> Any:
    """For each leaf of ``params``, whether the inner gradient in it depends on anything.

    Where it does not, the leaf's rows of H and B are zero by structure.
    """

    def gradient(point: tuple[Params, Hparams], batch: Batch) -> Vector:
        return problem.smooth.condition(point[0], point[1], batch)

    return depends(gradient, (params, hparams), batch)


def restricted(vector: Vector, responds: Any) -> Vector:
    """``vector`` with zeros for the leaves that do not respond: their rows of the system."""
    return jax.tree.map(lambda x, free: x if free else jnp.zeros_like(x), vector, responds)
