r"""The truncated Neumann series :math:`q = a ∑_{j=0}^{K} (I - aA)^j g`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Scalar, Vector
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.loops import loop
from bilevel.ground.settings import check_settings, count, real
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import LinearSolution, as_map, finish, rounding, widen

KEPT = 10
"""Most products whose vectors are kept, and from which the step size follows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neumann:
    r""":math:`q_K = a ∑_{j=0}^{K} (I - aA)^j g` with exactly :math:`K` products.

    K products make K+1 terms. For :math:`0 < a < 2/λ_{max}` and :math:`A ⪰ μ I`

    .. math:: ‖q_K - A^{-1}g‖ ≤ ρ^{K+1} ‖g‖/μ, ρ = max_i |1 - aλ_i|,

    and a truncated series acts like damping of about :math:`1/(a(K+1))`.

    Args:
      num_matvecs: :math:`K ≥ 0`.
      step_size: :math:`a > 0`, in units of 1/curvature. ``None`` takes the inverse of the largest
        curvature that the products of the series meet: no product is spent on it (one for K = 0).
      unroll: write the loop out step by step; ``None`` decides by itself (convolutions
        on CPU).

    Without a step size the first :math:`m = min(K, 10)` products build an orthonormal basis of
    the Krylov space of g (Lanczos), which holds every one of these terms whatever the step; the
    step is chosen afterwards. With the tridiagonal matrix T of the basis V and the norm
    :math:`β` of what the last product added,

    .. math:: 1/a = λ_{max}\begin{pmatrix} T & β e_m \\ β e_mᵀ & α
        \end{pmatrix},  α = β^2 (T^{-1})_{mm},
        1/a = max_{y ∈ span V} \frac{‖Ay‖^2}{yᵀ A y}
        ≤ λ_{max}(A):

    the largest curvature under which no term is longer than the one before it. Products after
    these are made with that step.

    The norm of the terms of a convergent series on one symmetric matrix falls in every step;
    a term longer than the one before it, or a curvature met outside
    :math:`(0, 2/a)`, proves divergence and gives status ``diverged``. The sum up to K is
    returned all the same. With fresh batches each product uses its own (the stochastic series of
    stocBiO); without a step size ten batches more come first, for a power iteration.

    For a ``FixedPoint`` of T and a step of one (``None`` means that there), it is the series
    :math:`∑_j (∂Tᵀ)^j g` of the map, convergent where T contracts.

    Cost: K products; three vectors, without a step size :math:`min(K, 10)` more. ``x0`` is not
    used: partial sums cannot be warm-started. A derivative of the value takes the step for a
    constant. Raises ``ValueError``/``TypeError`` for a bad count or step.

    Reference: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020, Algorithm 3; here the leading step size is kept, which
    the direct term needs. The step is a Gauss–Radau rule with its fixed node at zero: Golub,
    Meurant, "Matrices, moments and quadrature with applications", 2010.
    """

    num_matvecs: int = count(20, low=0)
    step_size: float | jax.Array | None = real(None, low=0, strict=True, optional=True)
    unroll: bool | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        check_settings(self)

    def num_products(self) -> int:
        """Products with fresh batches (static)."""
        return self.num_matvecs + (KEPT if self.step_size is None else 0)

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """Sum the series; ``x0`` and ``key`` are not used."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        length = tree.norm(rhs)
        unroll = amap.unroll if self.unroll is None else self.unroll
        one_symmetric = amap.fresh is None and amap.transpose is None
        if one_symmetric and self.step_size is None:
            step, series, made, rhs = _from_krylov(amap, rhs, self.num_matvecs, unroll)
        else:
            step, offset = self.step_size, 0
            if step is None:
                step, offset = (1.0, 0) if amap.fresh is None else _power(amap.fresh, rhs, unroll)
            step, made = jnp.asarray(step), offset + self.num_matvecs
            product = amap.fresh or (lambda v, i: amap(v))
            series = _go_on(product, _begin(rhs), step, self.num_matvecs, offset, unroll)
        stats = {
            "rhs_norm": length,
            "num_matvecs": jnp.asarray(made, jnp.int32),
            "step_size": step.astype(length.dtype),
        }
        result = status_of(Status.ok)
        if self.num_matvecs > 0:
            low, high = series.low, series.high
            # One ulp of slack: at rho = 1 (a singular matrix) rounding may tip the ratio over.
            slack = 8 * jnp.finfo(length.dtype).eps
            if one_symmetric:
                stats |= {"min_curvature": low, "max_curvature": high}
                grows = (series.growth > 1 + slack) | (step * high > 2 * (1 + slack))
                indefinite = low < -slack * jnp.maximum(jnp.abs(high), jnp.abs(low))
            else:  # random or not normal: terms may grow in one step and still converge
                if amap.transpose is None:
                    stats |= {"min_curvature": low, "max_curvature": high}
                grows = tree.vdot(series.term, series.term) > tree.vdot(rhs, rhs)
                indefinite = jnp.asarray(False)
            result = status_of(
                Status.ok, (grows, Status.diverged), (indefinite, Status.negative_curvature)
            )
        return finish(amap, rhs, tree.scale(step, series.total), stats, result, certify)


class _Series(NamedTuple):
    """The last term, the sum, the extreme curvatures met and the last ratio of squared terms."""

    term: Vector
    total: Vector
    low: Scalar
    high: Scalar
    growth: Scalar


def _begin(rhs: Vector) -> _Series:
    real = tree.vdot(rhs, rhs).dtype
    return _Series(rhs, rhs, *(jnp.asarray(x, real) for x in (jnp.inf, -jnp.inf, 0)))


def _go_on(
    product: Any, series: _Series, step: Scalar, steps: int, offset: int, unroll: bool
) -> _Series:
    """``steps`` more terms, by a product each: ``product(v, i)`` from ``i = offset`` on."""

    def body(i: Any, carry: _Series) -> _Series:
        image = product(carry.term, i + offset)
        low, high = widen(carry.low, carry.high, carry.term, image)
        following = tree.axpy(-step, image, carry.term)
        before, after = tree.vdot(carry.term, carry.term), tree.vdot(following, following)
        growth = _ratio(after, before)
        return _Series(following, tree.add(carry.total, following), low, high, growth)

    return loop(steps, body, series, unroll)


def _ratio(after: Scalar, before: Scalar) -> Scalar:
    return jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 0)


def _power(product: Any, rhs: Vector, unroll: bool) -> tuple[Scalar, int]:
    """A step by power iteration on the first batches, and their number."""
    unit = loop(KEPT - 1, lambda i, v: tree.unit(product(v, i)), tree.unit(rhs), unroll)
    # The norm of a unit vector's image: an absolute value, should one be negative.
    return _inverse(tree.norm(product(unit, KEPT - 1))), KEPT


def _inverse(largest: Scalar) -> Scalar:
    return 1 / jnp.where(largest == 0, 1, largest)  # a NaN stays one


def _from_krylov(
    amap: LinearMap, rhs: Vector, terms: int, unroll: bool
) -> tuple[Scalar, _Series, int, Vector]:
    """The step, the series, its products, ``rhs``: Lanczos' vectors first, then term by term."""
    steps = min(max(terms, 1), KEPT)
    basis, alpha, beta, dead = _lanczos(amap, rhs, steps, unroll)
    step, low, high = _step(alpha, beta, dead, rounding(amap, rhs))
    term = jnp.zeros_like(alpha, shape=steps + 1).at[0].set(tree.norm(rhs))
    total, growth = term, jnp.zeros_like(low)
    for _ in range(min(terms, steps)):
        following = term - step * _times(alpha, beta, term)
        growth = _ratio(jnp.sum(following**2), jnp.sum(term**2))
        term, total = following, total + following
    silent = tree.norm(rhs) == 0  # no direction was looked along
    low, high = jnp.where(silent, jnp.inf, low), jnp.where(silent, -jnp.inf, high)
    more = terms - steps
    last = _combined(basis, term, rhs) if more > 0 else rhs
    series = _Series(last, _combined(basis, total, rhs), low, high, growth)
    if more > 0:
        series = _go_on(lambda v, i: amap(v), series, step, more, 0, unroll)
    # Read back from the basis, so that the right side is not a vector more through the loop.
    return step, series, max(terms, 1), tree.scale(tree.norm(rhs), _row(basis, 0))


def _lanczos(
    amap: LinearMap, rhs: Vector, steps: int, unroll: bool
) -> tuple[Vector, jax.Array, jax.Array, jax.Array]:
    r"""``steps + 1`` vectors, stacked, and :math:`α, β` of ``A V_m = V_{m+1} T``.

    That equation is what the series needs, and it holds to rounding without the vectors being
    orthogonal. ``dead`` marks those beyond an exhausted space, which are zero.
    """
    first = tree.unit(rhs)
    real = tree.vdot(rhs, rhs).dtype
    basis = tree.put(tree.stacked_zeros(steps + 1, first), first, 0)

    def body(i: Any, carry: tuple) -> tuple:
        basis, alpha, beta, dead = carry
        v, before = _row(basis, i), _row(basis, i - 1)  # before the first: zeros, the last row
        image = amap(v)
        along = tree.vdot(v, image)
        back = jnp.where(i > 0, beta[i - 1], 0)
        rest = tree.axpy(-back, before, tree.axpy(-along, v, image))
        length = tree.norm(rest)
        # Below rounding the space is exhausted; what is left is noise, not a direction.
        size = jnp.maximum(jnp.max(jnp.abs(alpha)), jnp.maximum(jnp.abs(along), jnp.max(beta)))
        alive = length > 10 * jnp.finfo(real).eps * size
        following = tree.scale(jnp.where(alive, 1 / jnp.where(alive, length, 1), 0), rest)
        basis = tree.put(basis, following, i + 1)
        alpha, beta = alpha.at[i].set(along), beta.at[i].set(jnp.where(alive, length, 0))
        return basis, alpha, beta, dead.at[i + 1].set(~alive)

    empty, nothing = jnp.zeros(steps, real), jnp.zeros(steps + 1, bool)
    basis, alpha, beta, dead = loop(steps, body, (basis, empty, empty, nothing), unroll)
    return basis, alpha, beta, dead[:-1]


def _row(basis: Vector, i: Any) -> Vector:
    return jax.tree.map(lambda b: jax.lax.dynamic_index_in_dim(b, i, keepdims=False), basis)


def _step(
    alpha: jax.Array, beta: jax.Array, dead: jax.Array, eps: float
) -> tuple[Scalar, Scalar, Scalar]:
    """The step, and the extreme Ritz values."""
    alpha, beta = jax.lax.stop_gradient((alpha, beta))
    # The first curvature in place of those of zero vectors: it lies between the extremes.
    diagonal = jnp.where(dead, alpha[0], alpha)
    between = jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + between)
    seen = values > 10 * eps * jnp.max(jnp.abs(values))
    share = vectors[-1] ** 2 / jnp.where(seen, values, 1)
    corner = beta[-1] ** 2 * jnp.sum(jnp.where(seen, share, 0))
    diagonal = jnp.append(diagonal, corner)
    matrix = jnp.diag(diagonal) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
    # In absolute value: with negative curvature it is then at least the longest image.
    largest = jnp.max(jnp.abs(jnp.linalg.eigvalsh(matrix)))
    return _inverse(largest), values[0], values[-1]


def _times(alpha: jax.Array, beta: jax.Array, c: jax.Array) -> jax.Array:
    """The (m+1) x m tridiagonal matrix times the coefficients, whose last is zero."""
    c = c[:-1]
    zero = jnp.zeros_like(c, shape=1)
    above = jnp.concatenate([beta[:-1] * c[1:], zero, zero])
    return jnp.append(alpha * c, zero) + jnp.append(zero, beta * c) + above


def _combined(basis: Vector, coefficients: jax.Array, like: Vector) -> Vector:
    """The combination of stacked vectors like ``like``, elementwise: no matrix unit rounds it.

    In a branch, or XLA makes the sum anew for everything that reads it. Without a right side the
    coefficients are zero.
    """

    def leaf(stack: jax.Array) -> jax.Array:
        c = coefficients.astype(stack.dtype)
        return sum((c[i] * stack[i] for i in range(1, len(c))), c[0] * stack[0])

    def combined() -> Vector:
        return jax.tree.map(leaf, basis)

    silent = jnp.all(coefficients == 0)
    return jax.lax.cond(silent, lambda: jax.tree.map(jnp.zeros_like, like), combined)
