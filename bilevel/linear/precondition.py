r"""What a preconditioner of CG is; the diagonal one, which halves the work of CG."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, Stats, Vector
from bilevel.ground.keys import require_key
from bilevel.ground.linear_map import LinearMap
from bilevel.ground.loops import loop
from bilevel.ground.settings import check_settings, count, real


class Prepared(NamedTuple):
    r"""A preconditioner for one matrix.

    Attributes:
      apply: :math:`r \mapsto P^{-1} r`, symmetric positive definite.
      num_products: products spent on it.
      stats: what it says of itself.
    """

    apply: Callable[[Vector], Vector]
    num_products: int
    stats: Stats


@runtime_checkable
class Preconditioner(Protocol):
    """Anything with this method is a preconditioner of CG."""

    def prepare(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Prepared: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal:
    r"""The Jacobi preconditioner :math:`P = \operatorname{diag}(A)`.

    Where the operator knows its diagonal (``GaussNewton`` of a :class:`~bilevel.LinearModel`
    plus a separable penalty) it is exact and costs less than one gradient. Otherwise it is the
    mean of ``num_probes`` samples drawn with ``key``: for ``GaussNewton`` of any other model,

    .. math:: \operatorname{diag}(J^\top Q J) \approx
        \frac1m \sum_{i=1}^m J^\top s_i \odot J^\top Q s_i

    with signs :math:`s_i` on the outputs, whose error is of the size of the entry, plus the
    damping and the diagonal of a separable penalty; for other operators Hutchinson's

    .. math:: \operatorname{diag}(A) \approx \frac1m \sum_{i=1}^m z_i \odot A z_i,
        \qquad z_i \in \{-1, 1\}^n,

    whose error in entry i is about the norm of the rest of row i over :math:`\sqrt m`, often far
    above the entry. An entry that is too small magnifies its direction: each is raised to twice
    its own standard error.

    Args:
      num_probes: m, for the estimate; its standard error needs at least 2. One costs a product.
      floor: entries are raised to at least ``floor`` times their mean absolute value, so
        that P stays positive definite whatever the estimate's noise.

    Reference: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix",
    Applied Numerical Mathematics 2007.
    """

    num_probes: int = count(10)
    floor: float | jax.Array = real(1e-3, low=0, strict=True)

    def __post_init__(self) -> None:
        check_settings(self)

    def prepare(self, mv: LinearMap, rhs: Vector, key: Key | None) -> Prepared:
        """The entries, known or estimated; an estimate costs ``num_probes`` products."""
        inverse = self.inverse(mv, rhs, key)
        spent = 0 if mv.diagonal is not None else self.num_probes
        return Prepared(lambda r: jax.tree.map(jnp.multiply, inverse, r), spent, {})

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
            variance = jnp.maximum(s - m * mean**2, 0) / max(m - 1, 1)
            return jnp.maximum(mean, 2 * jnp.sqrt(variance / m))

        estimated = jax.tree.map(estimate, total, squares)
        if mv.sampled is None:
            return jax.tree.map(lambda e: e + mv.damping, estimated)
        return tree.add(estimated, mv.sampled.known())

    def _raise_to_floor(self, diagonal: Vector) -> Vector:
        magnitude = jax.tree.map(jnp.abs, diagonal)
        mean = sum(jnp.sum(x) for x in jax.tree.leaves(magnitude)) / tree.size(diagonal)
        low = jnp.where(mean > 0, self.floor * mean, 1)
        return jax.tree.map(lambda d: jnp.maximum(d, low.astype(d.dtype)), diagonal)
