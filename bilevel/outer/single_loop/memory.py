r"""Gradient tables: SAGA, with one entry per batch."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key
from bilevel.ground.settings import check_settings, count
from bilevel.outer.single_loop.base import (
    Estimate,
    Indexed,
    Oracles,
    Point,
    Read,
    check_index,
    directions_of,
    zero_oracles,
)


@dataclasses.dataclass(frozen=True)
class Saga:
    r"""Remembers what every batch told last: :math:`d = new - table_i + mean(table)`.

    The data are cut once into batches of equal size that stay the same; each step draws one of
    them for each loss, evenly and with replacement, and says which by :class:`~bilevel.Indexed`.
    The tables begin at zero, where the estimate is unbiased too. A number outside its table gives
    NaN and the status ``invalid_setting``.

    Args:
      num_inner, num_outer: number of batches that the training and the validation data are cut
        into.
      max_bytes: largest memory that the tables may take.

    Memory: ``num_inner`` times (2n + p) and ``num_outer`` times (n + p) numbers, for n trained
    parameters and p hyperparameters; ``init`` refuses more than ``max_bytes``.

    Reference: Defazio, Bach, Lacoste-Julien, "SAGA: a fast incremental gradient method with
    support for non-strongly convex composite objectives", NeurIPS 2014.
    """

    num_inner: int = count()
    num_outer: int = count()
    max_bytes: int = count(2**30)

    batches: ClassVar[type | None] = Indexed

    def __post_init__(self) -> None:
        check_settings(self)

    def init(self, point: Point) -> tuple[Oracles, Oracles]:
        """Empty tables and their means."""
        zero = zero_oracles(point)
        lengths = self._lengths()
        needed = sum(
            length * x.size * x.dtype.itemsize
            for length, part in zip(lengths, zero, strict=True)
            for x in jax.tree.leaves(part)
        )
        if needed > self.max_bytes:
            raise ValueError(
                f"`Saga` would keep {needed} bytes: tables of {self.num_inner} inner batches and "
                f"{self.num_outer} outer batches for {tree.size(point.params)} parameters and "
                f"{tree.size(point.hparams)} hyperparameters, which is more than "
                f"max_bytes={self.max_bytes}. Cut the data into fewer, larger batches, use "
                "`Storm(...)` or `Spider(...)`, which keep one direction, or raise `max_bytes`."
            )
        tables = Oracles(
            *(tree.stacked_zeros(length, part) for length, part in zip(lengths, zero, strict=True))
        )
        return tables, zero

    def estimate(
        self,
        read: Read,
        point: Point,
        inner: Indexed,
        outer: Indexed,
        memory: tuple[Oracles, Oracles],
        step: jax.Array,
        key: Key | None,
    ) -> Estimate:
        """One reading, corrected by the tables."""
        tables, means = memory
        reading = read(point, inner.batch, outer.batch)
        rows = jnp.asarray(inner.index)
        # Independent batches have a number each: gradient, product, mixed product.
        product, cross = (1, 2) if rows.size == 3 else (0, 0)
        numbers = (rows[0], rows[product], rows[cross], outer.index, outer.index)
        parts = [
            _entry(table, mean, new, jnp.asarray(i), n)
            for table, mean, new, i, n in zip(
                tables, means, reading.oracles, numbers, self._lengths(), strict=True
            )
        ]
        estimated, tables, means = (Oracles(*part) for part in zip(*parts, strict=True))
        outside = [(i < 0) | (i >= n) for i, n in zip(numbers, self._lengths(), strict=True)]
        invalid = jnp.any(jnp.stack(outside))
        return Estimate(directions_of(estimated), reading, (tables, means), (1, 1, 1), invalid)

    def _lengths(self) -> tuple[int, ...]:
        return (self.num_inner,) * 3 + (self.num_outer,) * 2

    def check(self, inner: Indexed, outer: Indexed, count: int) -> None:
        """Refuse numbers of batches of another form."""
        check_index(inner.index, count, "inner_batches")
        check_index(outer.index, None, "outer_batch")


def _entry(table: Any, mean: Any, new: Any, i: jax.Array, length: int) -> tuple[Any, Any, Any]:
    """The estimate of one oracle, its table with the new entry, and the mean of that."""
    i = jnp.where(i < 0, length, i)  # a negative number would count from the end
    old = jax.tree.map(lambda t: t.at[i].get(mode="fill", fill_value=jnp.nan), table)
    change = tree.sub(new, old)
    estimate = tree.add(change, mean)
    table = jax.tree.map(lambda t, x: t.at[i].set(x, mode="drop"), table, new)
    return estimate, table, tree.axpy(1 / length, change, mean)
