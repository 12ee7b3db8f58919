r"""The protocol of preconditioners of CG, and the diagonal one, which halves the work of CG."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, Stats, Vector
from bilevel.ground.keys import require_key
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.loops import loop
from bilevel.ground.settings import check_settings, count, real
from bilevel.linear.base import Refreshed, refreshed


class Prepared(NamedTuple):
    r"""A preconditioner for one matrix.

    Attributes:
      apply: :math:`r ↦ P^{-1} r`, symmetric positive definite.
      num_products: products spent on it.
      stats: what it says of itself.
    """

    apply: Callable[[Vector], Vector]
    num_products: int | jax.Array
    stats: Stats


@runtime_checkable
class Preconditioner(Protocol):
    """Anything with this method is a preconditioner of CG."""

    def prepare(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Prepared: ...


@runtime_checkable
class CarryingPreconditioner(Preconditioner, Protocol):
    """One that carries what it was made of from call to call, as a ``CarryingSolver`` does."""

    def init_state(self, like: Vector) -> Any: ...

    def prepare_from(
        self, mv: LinearMap, rhs: Vector, key: Key | None, state: Any
    ) -> tuple[Prepared, Any]: ...


def prepared_from(
    preconditioner: Preconditioner, mv: LinearMap, rhs: Vector, key: Key | None, state: Any
) -> tuple[Prepared, Any]:
    """The preconditioner of this call, from ``state`` where it carries one, and the next state."""
    if isinstance(preconditioner, CarryingPreconditioner):
        return preconditioner.prepare_from(mv, rhs, key, state)
    return preconditioner.prepare(mv, rhs, key), None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal:
    r"""The Jacobi preconditioner :math:`P = diag(A)`.

    Where the operator knows its diagonal (``GaussNewton`` of a :class:`~bilevel.LinearModel`
    plus a separable penalty) it is exact and costs less than one gradient. Otherwise it is the
    mean of ``num_probes`` samples drawn with ``key``: for ``GaussNewton`` of any other model,

    .. math:: diag(Jᵀ Q J) ≈
        1/m ∑_{i=1}^m Jᵀ s_i ⊙ Jᵀ Q s_i

    with signs :math:`s_i` on the outputs, whose error is of the size of the entry, plus the
    damping and the diagonal of a separable penalty. In a leaf with two axes or more the samples
    are pooled: they are drawn towards the product of their means along the last axis and along
    the others, as far as their scatter about it is no more than noise (empirical Bayes). Where
    inputs and output gradients of a layer are independent, that product is the diagonal.

    For other operators it is Hutchinson's

    .. math:: diag(A) ≈ 1/m ∑_{i=1}^m z_i ⊙ A z_i,
        z_i ∈ \{-1, 1\}^n,

    whose error in entry i is about the norm of the rest of row i over :math:`\sqrt m`, often far
    above the entry. An entry that is too small magnifies its direction: each is raised to twice
    its own standard error.

    Args:
      num_probes: m, for the estimate; its standard error needs at least 2. One costs a product.
      refresh_every: calls of a loop that one diagonal serves, carried in the state of the
        response. An old one costs steps, never correctness.
      floor: entries are raised to at least ``floor`` times their mean absolute value, so
        that P stays positive definite whatever the estimate's noise.

    Reference: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix",
    Applied Numerical Mathematics 2007.
    """

    num_probes: int = count(10)
    floor: float | jax.Array = real(1e-3, low=0, strict=True)
    refresh_every: int = count(1)

    def __post_init__(self) -> None:
        check_settings(self)

    def prepare(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Prepared:
        """The entries, known or estimated; an estimate costs ``num_probes`` products."""
        return self.prepare_from(mv, rhs, key, None)[0]

    def init_state(self, like: Vector) -> Refreshed | None:
        """No diagonal yet; ``None`` where each call finds its own."""
        if self.refresh_every == 1:
            return None
        return Refreshed(tree.zeros_accumulated(like), jnp.zeros((), jnp.int32))

    def prepare_from(
        self, mv: LinearMap, rhs: Vector, key: Key | None, state: Refreshed | None
    ) -> tuple[Prepared, Refreshed | None]:
        """The entries in ``state`` while they are to be kept, else new ones; the next state."""
        made: Any = 0 if mv.diagonal is not None else self.num_probes
        if self.refresh_every == 1:
            inverse, state = self.inverse(mv, rhs, key), None
        else:
            inverse, made, state = refreshed(
                lambda: self.inverse(mv, rhs, key), made, self.refresh_every, state
            )
        return Prepared(lambda r: jax.tree.map(jnp.multiply, inverse, r), made, {}), state

    def inverse(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Vector:
        r"""The entries of :math:`P^{-1}`, shaped like ``rhs``."""
        if mv.diagonal is not None:
            diagonal = tree.cast_like(mv.diagonal(), rhs)
        else:
            key = require_key(key, "The estimate of `Diagonal()` for this operator")
            diagonal = tree.cast_like(self._estimate(mv, rhs, key), rhs)
        return jax.tree.map(lambda d: 1 / d, self._raise_to_floor(diagonal))

    def _estimate(self, mv: LinearMap, rhs: Vector, key: Key) -> Vector:
        """What is known, and the mean of samples raised to twice its standard error."""
        keys, m = jax.random.split(key, self.num_probes), self.num_probes

        def hutchinson(key: Key) -> Vector:
            z = tree.random_like(key, rhs, jax.random.rademacher)
            return jax.tree.map(jnp.multiply, z, mv.undamped(z))

        draw = hutchinson if mv.sampled is None else mv.sampled.sample

        def body(i, sums):
            sample = tree.accumulate(draw(keys[i]))
            squares = jax.tree.map(lambda t, s: t + s * s, sums[1], sample)
            return tree.add(sums[0], sample), squares

        zeros = jax.tree.map(jnp.zeros_like, tree.accumulate(rhs))
        total, squares = loop(m, body, (zeros, zeros), mv.unroll)

        def estimate(t: jax.Array, s: jax.Array) -> jax.Array:
            mean = t / m
            variance = jnp.maximum(s - m * mean**2, 0) / max(m - 1, 1) / m
            if mv.sampled is not None and mean.ndim > 1:
                mean, variance = _pooled(mean, variance)
            return jnp.maximum(mean, 2 * jnp.sqrt(variance))

        estimated = jax.tree.map(estimate, total, squares)
        if mv.sampled is None:
            return jax.tree.map(lambda e: e + mv.damping, estimated)
        return tree.add(estimated, mv.sampled.known())

    def _raise_to_floor(self, diagonal: Vector) -> Vector:
        magnitude = jax.tree.map(jnp.abs, diagonal)
        mean = sum(jnp.sum(x) for x in jax.tree.leaves(magnitude)) / tree.size(diagonal)
        low = jnp.where(mean > 0, self.floor * mean, 1)
        return jax.tree.map(lambda d: jnp.maximum(d, low.astype(d.dtype)), diagonal)


def _pooled(mean: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Estimates drawn towards the product of their means, and what is left of their variances.

    With :math:`F` that product, :math:`ν` the mean of :math:`variance / F^2` and :math:`τ^2`
    what :math:`(mean / F - 1)^2` has on average above it, an entry's own estimate has the weight
    :math:`τ^2 / (τ^2 + ν)`: the posterior mean under a normal prior of relative width
    :math:`τ` about F.
    """
    others = tuple(range(mean.ndim - 1))
    rows = jnp.mean(mean, axis=-1, keepdims=True)
    columns = jnp.mean(mean, axis=others, keepdims=True)
    centre = jnp.mean(mean)
    product = rows * columns / jnp.where(centre == 0, 1, centre)
    positive = product > 0  # dead inputs have no curvature, and no relative error
    safe = jnp.where(positive, product, 1)
    count = jnp.maximum(jnp.sum(positive), 1)

    def average(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(positive, x, 0)) / count

    noise = average(variance / safe**2)
    spread = jnp.maximum(average((mean / safe - 1) ** 2) - noise, 0)
    weight = spread / jnp.where(spread + noise > 0, spread + noise, 1)
    drawn = jnp.where(positive, product + weight * (mean - product), mean)
    return drawn, jnp.where(positive, weight * variance, variance)
