r"""The protocol of a linear solve: ``solver.solve(mv, rhs, x0)`` answers :math:`A q = g`.

A solver sees a function :math:`v ↦ A v` and nothing of the bilevel problem. When the
function is a :class:`~bilevel.ground.linear_map.LinearMap` it may also carry what some solvers can
use: its damping apart, a diagonal, low-rank factors, fresh batches. A plain function works
everywhere these are not needed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Scalar, Stats, Vector
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.status import RESIDUAL, Status, status_of, worst


def as_map(mv: MatVec, rhs: Vector) -> LinearMap:
    """``mv`` as a :class:`LinearMap`; a plain function has no structure."""
    if isinstance(mv, LinearMap):
        return mv
    out = jax.eval_shape(mv, rhs)
    if jax.tree.structure(out) != jax.tree.structure(rhs):
        raise ValueError(
            f"`mv` must map a vector to one of the same tree structure: it returned "
            f"{jax.tree.structure(out)} for {jax.tree.structure(rhs)}."
        )
    return LinearMap(mv)


class LinearSolution(NamedTuple):
    r"""What a solve returns.

    Attributes:
      value: :math:`q`, shaped like ``rhs``, in the accumulator dtype.
      result: int32 :class:`~bilevel.Status`; with ``certify`` also ``truncated`` for a
        residual above a tenth of the right side, ``worse_than_zero`` for one above it.
      stats: ``rhs_norm`` :math:`‖g‖`; ``residual_norm`` :math:`‖g - A q‖`, recomputed from
        ``value`` unless rounding cannot have moved a recurrence by more than a hundredth;
        ``num_matvecs``, products the method used (the one that
        recomputes the residual not counted); ``min_curvature``, ``max_curvature``, extremes
        of :math:`vᵀ A v / vᵀ v` met on the way. What a method cannot know is absent.
    """

    value: Vector
    result: jax.Array
    stats: Stats


@runtime_checkable
class LinearSolver(Protocol):
    """Anything with this method is a solver.

    ``x0=None`` means a start at zero; ``key`` is for randomized solvers. ``certify=False``
    leaves out ``residual_norm`` and with it the one product beyond the method's own (under
    ``jit`` the compiler removes it anyway where nobody reads the number).
    """

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution: ...


@runtime_checkable
class CarryingSolver(LinearSolver, Protocol):
    """A solver that carries something from call to call: a curvature, a sketch, a preconditioner.

    ``init_state`` is what stands for "nothing yet", of arrays (zeros) whose shapes follow from
    ``like`` alone, a vector or its shapes; ``None`` where these settings carry nothing.
    ``solve_from`` is ``solve`` from a state. It returns the state of the next call in the same
    structure, shapes and dtypes, also for ``state=None``, a start that is known to be cold when
    the program is traced. A state that is not finite must count as none.
    """

    def init_state(self, like: Vector) -> Any: ...

    def solve_from(
        self,
        mv: MatVec,
        rhs: Vector,
        state: Any = None,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> tuple[LinearSolution, Any]: ...


def state_of(solver: LinearSolver, like: Vector) -> Any:
    """What ``solver`` carries before its first call; ``None`` for one that carries nothing."""
    return solver.init_state(like) if isinstance(solver, CarryingSolver) else None


class Refreshed(NamedTuple):
    """What is built anew every few calls only, and the calls made with it: 0 for none yet."""

    built: Any
    age: jax.Array


def refreshed(
    build: Callable[[], Any], products: int, every: int, state: Refreshed | None
) -> tuple[Any, jax.Array, Refreshed]:
    """What ``build()`` gives, or what it gave at most ``every`` calls ago; its products; the state.

    Built anew also where what is carried is not finite. Under ``vmap`` it is built in every call
    and then chosen from: members of a population may differ in age.
    """
    if state is None:
        built = build()
        return built, jnp.asarray(products, jnp.int32), Refreshed(built, jnp.ones((), jnp.int32))
    due = (state.age <= 0) | (state.age >= every) | ~tree.all_finite(state.built)
    old = state.built
    built = jax.lax.cond(due, lambda: tree.cast_like(build(), old), lambda: old)
    age = jnp.where(due, 1, state.age + 1).astype(jnp.int32)
    return built, jnp.where(due, products, 0).astype(jnp.int32), Refreshed(built, age)


SURE = 0.01
"""Part of a residual norm that rounding may have moved for it to be told without a product."""


def finish(
    mv: MatVec,
    rhs: Vector,
    value: Vector,
    stats: Stats,
    result: jax.Array,
    certify: bool,
    known: tuple[Scalar, Scalar] | None = None,
) -> LinearSolution:
    """The record of a solve: residual recomputed and judged, non-finite input or output said.

    ``known`` is a residual norm that a recurrence gives and a bound on what rounding did to it: the
    product is made only where the bound is not below :data:`SURE` of the norm.
    """
    stats = {"rhs_norm": tree.norm(rhs), **stats}
    if certify:
        right = stats["rhs_norm"]
        left = _residual_norm(mv, rhs, value, known)
        stats["residual_norm"] = left
        judged = status_of(
            Status.ok,
            # A thousandth of slack: a value of zero is not worse than zero.
            (left > 1.001 * right, Status.worse_than_zero),
            (left > RESIDUAL * right, Status.truncated),
        )
        result = worst(jnp.asarray(result, jnp.int32), judged)
    result = status_of(
        result,
        (~jnp.isfinite(stats["rhs_norm"]), Status.nonfinite_input),
        (~tree.all_finite(value), Status.nonfinite_output),
    )
    return LinearSolution(value, result, stats)


def _residual_norm(
    mv: MatVec, rhs: Vector, value: Vector, known: tuple[Scalar, Scalar] | None
) -> Scalar:
    def recomputed() -> Scalar:
        return tree.norm(tree.sub(rhs, mv(value)))

    if known is not None:
        norm, moved = known
        # A NaN on either side is not "sure".
        return jax.lax.cond(moved <= SURE * norm, lambda: norm, recomputed)
    size = tree.vdot(value, value)
    # As a branch, convolutions would be as slow as in a loop; outside `jit` it is compiled anew in
    # each call.
    if getattr(mv, "unroll", False) or not isinstance(size, Tracer):
        return recomputed()
    # In a branch, or XLA makes constants of this product, as large as a vector, before the solve
    # and keeps them through it.
    return jax.lax.cond(jnp.isnan(size), lambda: jnp.sqrt(size), recomputed)


def rounding(mv: LinearMap, rhs: Vector) -> float:
    """One unit of rounding of the products, which may be in a narrower dtype than vectors."""
    made = jax.tree.leaves(jax.eval_shape(mv.undamped, rhs))
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in [*made, *jax.tree.leaves(rhs)])


def widen(low: Scalar, high: Scalar, v: Vector, av: Vector) -> tuple[Scalar, Scalar]:
    r"""The interval widened to :math:`vᵀ A v / vᵀ v`; :math:`v = 0` says nothing."""
    vv = tree.vdot(v, v)
    curvature = tree.vdot(v, av) / jnp.where(vv == 0, 1, vv)
    return (
        jnp.where(vv == 0, low, jnp.minimum(low, curvature)),
        jnp.where(vv == 0, high, jnp.maximum(high, curvature)),
    )


def require_symmetric(mv: LinearMap, solver: str) -> None:
    """Refuse the matrix of a fixed point or a root in a method for symmetric ones."""
    if mv.transpose is not None:
        raise ValueError(
            f"{solver} needs a symmetric matrix, but that of a `FixedPoint` or `Root` is not: use "
            "`Lineax(lineax.GMRES(rtol=..., atol=...))`, `Neumann(num_matvecs, step_size=1.0)` "
            "where the map contracts, or `Dense()`."
        )


def require_fixed(mv: LinearMap, solver: str) -> None:
    """Refuse fresh batches in a method whose theory needs one matrix."""
    if mv.fresh is not None:
        raise ValueError(
            f"{solver} needs the same matrix in every product, but `fresh_batches=True` changes "
            "it. Use `Stochastic(...)` or `Neumann(...)` with fresh batches, or set "
            "`fresh_batches=False`."
        )


def contract(a: Vector, b: Vector) -> jax.Array:
    """(m, k) inner products between two stacks of vectors, summed over leaves."""
    parts = [
        contract_leaf(x, y.astype(x.dtype), 1)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return functools.reduce(jnp.add, parts)


def contract_leaf(x: jax.Array, y: jax.Array, stacked: int) -> jax.Array:
    """A stack ``(m, ...)`` against ``(...)``, or against ``(k, ...)`` if ``stacked`` is 1.

    Over several devices all axes are contracted as they are: laying them out as one would gather a
    sharded leaf. On one they are laid out, or XLA would copy the stack to transpose it.
    """
    if jax.device_count() == 1:
        x, y = x.reshape(x.shape[0], -1), y.reshape(*y.shape[:stacked], -1)
    contracted = (tuple(range(1, x.ndim)), tuple(range(stacked, y.ndim)))
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), out_sharding=replicated_if_explicit(x, 1 + stacked)
    )


def replicated_if_explicit(x: jax.Array, ndim: int) -> PartitionSpec | None:
    """The sharding to ask for where an explicit mesh shards ``x`` along summed or read axes."""
    return None if tree.explicit_spec(x) is None else PartitionSpec(*[None] * ndim)
