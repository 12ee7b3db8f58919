r"""Deliberate mistakes, each seen in published code, that a test suite must reject."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams
from bilevel.ground.status import Status, code
from bilevel.hypergradient import Implicit, hypergrad_solve
from bilevel.linear import Dense, Identity, LinearSolution, LinearSolver
from bilevel.linear.base import finish
from bilevel.problem.operators.hessian import Hessian
from bilevel.testing.case import Case, unflatten
from bilevel.testing.methods import Reference


@dataclasses.dataclass(frozen=True)
class WrongEstimator:
    """A mistake to be rejected.

    Attributes:
      name: what the mistake is.
      estimate: ``case -> hypergradient``, wrong.
      reference: the flat hypergradient the method claims to compute (the exact one, or the
        truncated series it was asked for).
      solver: ``case -> solver``, where the mistake sits in one.
      legal: whether the mistake can be made on a case.
    """

    name: str
    estimate: Callable[[Case], Hparams]
    reference: Reference
    solver: Callable[[Case], LinearSolver] | None = None
    legal: Callable[[Case], bool] = lambda case: True


@dataclasses.dataclass(frozen=True)
class FlippedSign(Implicit):
    r""":math:`+Bᵀ q` for :math:`-Bᵀ q`."""

    def vjp(self, *args: Any, **kwargs: Any) -> Any:
        """The pullback with the wrong sign."""
        w, right = super().vjp(*args, **kwargs)

        def pullback(g: Any) -> Any:
            indirect, *rest = right(g)
            return tree.scale(-1, indirect), *rest

        return w, pullback


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """Each leaf solved by itself: the blocks between leaves are taken for zero."""

    def solve(
        self, mv: Any, rhs: Any, x0: Any = None, *, key: Any = None, certify: bool = True
    ) -> LinearSolution:
        """Solve with the matrix's diagonal blocks."""
        flat, unravel = ravel_pytree(rhs)
        matrix = jax.vmap(lambda e: ravel_pytree(mv(unravel(e)))[0])(jnp.eye(flat.size))
        sizes = [x.size for x in jax.tree.leaves(rhs)]
        leaf = np.repeat(np.arange(len(sizes)), sizes)
        value = unravel(jnp.linalg.solve(matrix * (leaf[:, None] == leaf[None, :]), flat))
        stats = {"num_matvecs": jnp.asarray(flat.size, jnp.int32)}
        return finish(mv, rhs, value, stats, code(Status.ok), certify)


@dataclasses.dataclass(frozen=True)
class WrongSeries:
    """The series asked for K = ``num_matvecs``, short of its first or last term, or its step."""

    num_matvecs: int
    step_size: float
    first_term: bool = True
    last_term: bool = True
    leading_step: bool = True

    def solve(
        self, mv: Any, rhs: Any, x0: Any = None, *, key: Any = None, certify: bool = True
    ) -> LinearSolution:
        """Sum what is left of the series."""
        term, total = rhs, tree.scale(float(self.first_term), rhs)
        for _ in range(self.num_matvecs - (not self.last_term)):
            term = tree.axpy(-self.step_size, mv(term), term)
            total = tree.add(total, term)
        value = tree.scale(self.step_size if self.leading_step else 1.0, total)
        stats = {"num_matvecs": jnp.asarray(self.num_matvecs, jnp.int32)}
        return finish(mv, rhs, value, stats, code(Status.ok), certify)


@dataclasses.dataclass(frozen=True)
class HandCG:
    """Conjugate gradients; with ``stale``, each direction is made from the old residual."""

    steps: int
    stale: bool = True

    def solve(
        self, mv: Any, rhs: Any, x0: Any = None, *, key: Any = None, certify: bool = True
    ) -> LinearSolution:
        """Iterate from zero for ``steps`` products."""
        x, r, p = jax.tree.map(jnp.zeros_like, rhs), rhs, rhs
        for _ in range(self.steps):
            image, rr = mv(p), tree.vdot(r, r)
            alpha = rr / jnp.maximum(tree.vdot(p, image), jnp.finfo(rr.dtype).tiny)
            x, new = tree.axpy(alpha, p, x), tree.axpy(-alpha, image, r)
            beta = tree.vdot(new, new) / jnp.maximum(rr, jnp.finfo(rr.dtype).tiny)
            p, r = tree.axpy(beta, p, r if self.stale else new), new
        stats = {"num_matvecs": jnp.asarray(self.steps, jnp.int32)}
        return finish(mv, rhs, x, stats, code(Status.ok), certify)


def _swapped(case: Case) -> Hparams:
    return hypergrad_solve(
        case.outer,
        case.inner,
        Implicit(Dense()),
        case.params,
        case.hparams,
        inner_batch=case.outer_batch,
        outer_batch=case.inner_batch,
    ).grads


def wrong_estimators(num_matvecs: int = 3) -> tuple[WrongEstimator, ...]:
    r"""The mistakes: flipped sign, :math:`H := I`, block-diagonal H, train and validation swapped,
    direct term dropped, undamped for damped, a series one term short, without its first term or
    without its leading step, and conjugate gradients with a stale residual.

    Args:
      num_matvecs: K of the truncated series, whose reference is the K + 1-term sum.
    """

    def exact(case: Case) -> np.ndarray:
        return case.truth().hypergrad()

    def damped(case: Case) -> np.ndarray:
        truth = case.truth()
        return truth.hypergrad(truth.adjoint(0.1))

    def step_size(case: Case) -> float:
        return float(1 / np.linalg.eigvalsh(case.truth().hessian)[-1])

    def truncated(case: Case) -> np.ndarray:
        truth = case.truth()
        return truth.hypergrad(truth.series(num_matvecs, step_size(case)))

    def by_solver(
        name: str, solver: Callable[[Case], LinearSolver], reference: Reference = exact
    ) -> WrongEstimator:
        def estimate(case: Case) -> Hparams:
            return case.solve(Implicit(solver(case))).grads

        return WrongEstimator(name, estimate, reference, solver)

    def series(name: str, **mistake: bool) -> WrongEstimator:
        return by_solver(
            name, lambda case: WrongSeries(num_matvecs, step_size(case), **mistake), truncated
        )

    return (
        WrongEstimator("sign_flipped", lambda case: case.solve(FlippedSign(Dense())).grads, exact),
        by_solver("identity_hessian", lambda case: Identity()),
        by_solver("block_diagonal_hessian", lambda case: BlockDiagonal()),
        WrongEstimator(
            "batches_swapped", _swapped, exact, legal=lambda case: "swappable" in case.tags
        ),
        WrongEstimator(
            "direct_term_dropped", lambda case: case.solve(Implicit(Dense())).indirect, exact
        ),
        WrongEstimator(
            "damping_ignored",
            lambda case: case.solve(Implicit(Dense(), Hessian())).grads,
            damped,
        ),
        series("neumann_off_by_one", last_term=False),
        series("neumann_first_term_missing", first_term=False),
        series("neumann_leading_step_missing", leading_step=False),
        by_solver("stale_cg", lambda case: HandCG(len(case.truth().params) + 3)),
    )


@dataclasses.dataclass(frozen=True)
class NotTransposed:
    """A system that is not symmetric, solved with its matrix in place of the transpose."""

    def solve(
        self, mv: Any, rhs: Any, x0: Any = None, *, key: Any = None, certify: bool = True
    ) -> LinearSolution:
        """Solve with the other matrix."""
        return Dense().solve(mv.transposed(), rhs, certify=certify)


def wrong_condition_estimators() -> tuple[WrongEstimator, ...]:
    r"""Mistakes in inner problems that are no smooth loss, for :func:`condition_cases`.

    Flipped sign, :math:`A := I`, transpose forgotten; for composite conditions, the support ignored
    (all weights respond) and the step size dropped.
    """

    def exact(case: Case) -> np.ndarray:
        return case.truth().hypergrad()

    def by_adjoint(name: str, adjoint: Callable[[Case], np.ndarray], *tags: str) -> WrongEstimator:
        def estimate(case: Case) -> Hparams:
            return unflatten(case.truth().hypergrad(adjoint(case)), case.hparams)

        return WrongEstimator(name, estimate, exact, legal=lambda c: set(tags) <= c.tags)

    def smooth(case: Case) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Step size, Hessian of the smooth loss, Jacobian of the operator, outer gradient."""
        flat, unravel = ravel_pytree(case.params)
        condition: Any = case.inner
        args = (case.hparams, case.inner_batch)
        s, loss = condition.step_size, condition.loss

        def proximal(v: jax.Array) -> jax.Array:
            return ravel_pytree(condition.prox(unravel(v), case.hparams, s))[0]

        h = jax.hessian(lambda w: loss(unravel(w), *args))(flat)
        gradient = jax.grad(lambda w: loss(unravel(w), *args))(flat)
        j = jax.jacobian(proximal)(flat - s * gradient)
        return s, np.asarray(h), np.asarray(j), case.truth().outer_grad

    def whole(case: Case) -> np.ndarray:
        _, h, _, g = smooth(case)
        return np.linalg.solve(h, g)

    def unscaled(case: Case) -> np.ndarray:
        s, h, j, g = smooth(case)
        system = (np.eye(len(g)) - (np.eye(len(g)) - s * h) @ j) / s
        return np.linalg.solve(system, g) / s

    def not_transposed(case: Case) -> Hparams:
        return case.solve(Implicit(NotTransposed())).grads

    return (
        WrongEstimator("sign_flipped", lambda case: case.solve(FlippedSign(Dense())).grads, exact),
        WrongEstimator(
            "identity_matrix", lambda case: case.solve(Implicit(Identity())).grads, exact
        ),
        WrongEstimator(
            "transpose_forgotten", not_transposed, exact, legal=lambda c: "symmetric" not in c.tags
        ),
        by_adjoint("support_ignored", whole, "symmetric"),
        by_adjoint("step_size_dropped", unscaled, "symmetric"),
    )
