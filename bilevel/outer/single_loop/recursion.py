r"""Estimators that read the same batch at two points: STORM, SPIDER and PAGE."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key
from bilevel.ground.batches import check_batch, one_batch
from bilevel.ground.keys import require_key
from bilevel.ground.settings import (
    check_one_real,
    check_settings,
    check_takes,
    concrete,
    count,
    is_function,
)
from bilevel.outer.single_loop.base import (
    Anchored,
    Directions,
    Estimate,
    Point,
    Read,
    Reading,
    directions_of,
    examples,
    repeated,
    stack_length,
    zero_oracles,
)

Rate: TypeAlias = float | jax.Array | Callable[[Any], Any]


class Past(NamedTuple):
    """The point and the directions of the step before."""

    point: Point
    directions: Directions


def _first(point: Point) -> Past:
    return Past(point, directions_of(zero_oracles(point)))


def _continued(new: Any, old: Any, before: Any, keep: Any) -> Any:
    r""":math:`new + keep (before - old)`, where ``new`` and ``old`` are of the same batch."""
    return tree.axpy(keep, tree.sub(before, old), new)


@dataclasses.dataclass(frozen=True)
class Storm:
    r"""Momentum without its lag: :math:`d_t = D(x_t) + (1 - a_t) (d_{t-1} - D(x_{t-1}))`.

    Both D are of the same batches; :math:`a = 1` is the plain direction, and the first step is
    plain too.

    Args:
      inner, linear, outer: a for the three directions: a number in (0, 1], a function of the step
        (papers use a multiple of the squared step size), or ``None`` for the plain direction.

    Cost: what is estimated is read twice. Memory: one point and one set of directions.

    Reference: Cutkosky, Orabona, "Momentum-based variance reduction in non-convex SGD", NeurIPS
    2019.
    """

    inner: Rate | None = None
    linear: Rate | None = None
    outer: Rate | None = None

    batches: ClassVar[type | None] = None

    def __post_init__(self) -> None:
        for name in ("inner", "linear", "outer"):
            _check_rate(name, getattr(self, name))

    def init(self, point: Point) -> Past:
        """The first point, before any direction."""
        return _first(point)

    def estimate(
        self,
        read: Read,
        point: Point,
        inner: Any,
        outer: Any,
        memory: Past,
        step: jax.Array,
        key: Key | None,
    ) -> Estimate:
        """Two readings of the same batches."""
        reading = read(point, inner, outer)
        new = directions_of(reading.oracles)
        old = directions_of(read(memory.point, inner, outer).oracles)
        rates = (self.inner, self.linear, self.outer)
        directions = Directions(
            *(
                d if a is None else _continued(d, d_old, before, _kept(name, a, step))
                for name, a, d, d_old, before in zip(
                    Directions._fields, rates, new, old, memory.directions, strict=True
                )
            )
        )
        twice = 1 + (self.linear is not None or self.outer is not None)
        times = (1 + (self.inner is not None), twice, twice)
        return Estimate(directions, reading, Past(point, directions), times)


def _kept(name: str, rate: Rate, step: jax.Array) -> Any:
    """How much of the past is kept: none of it in the first step."""
    value: Any = rate
    if callable(rate):
        value = rate(step)
        check_one_real(f"{name}(step)", value)
    return jnp.where(step == 0, 0.0, 1 - value)


def _check_rate(name: str, rate: Any) -> None:
    if rate is None:
        return
    if is_function(rate):
        check_takes(name, rate, f"{name}(step)")
        return
    check_one_real(name, rate, 0, strict=True)
    _check_at_most_one(name, rate)


def _check_at_most_one(name: str, value: Any) -> None:
    if concrete(value) and value > 1:
        raise ValueError(f"`{name}` must be at most 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class Spider:
    r"""Differences of batches between full gradients (also called SARAH).

    :math:`d_t = D(x_t) - D(x_{t-1}) + d_{t-1}` with both D of the same batches, and D of all data
    in every step whose number ``period`` divides. The whole data come in
    :class:`~bilevel.Anchored`.

    Args:
      period: steps from one full reading to the next.

    Cost: two readings; in a full step one reading of all data and one of a batch. Under ``vmap``
    every step makes both. Memory: one point, one set of directions, and what one gradient of all
    data needs.

    Reference: Fang, Li, Lin, Zhang, "SPIDER: near-optimal non-convex optimization via stochastic
    path integrated differential estimator", NeurIPS 2018; Nguyen, Liu, Scheinberg, Takac, "SARAH",
    ICML 2017.
    """

    period: int = count()

    batches: ClassVar[type | None] = Anchored

    def __post_init__(self) -> None:
        check_settings(self)

    def init(self, point: Point) -> Past:
        """The first point, before any direction."""
        return _first(point)

    def estimate(
        self,
        read: Read,
        point: Point,
        inner: Anchored,
        outer: Anchored,
        memory: Past,
        step: jax.Array,
        key: Key | None,
    ) -> Estimate:
        """Two readings of the step's batches, or one of all data."""
        return _anchored(read, point, inner, outer, memory, step % self.period == 0)

    def check(self, inner: Anchored, outer: Anchored, count: int) -> None:
        """Refuse an anchor that is not a batch."""
        _check_full(inner, outer)


@dataclasses.dataclass(frozen=True)
class Page:
    r"""As :class:`Spider`, with full gradients at random steps (and in the first).

    Args:
      probability: of a full step, in (0, 1].

    Cost, memory: as :class:`Spider`; each step needs a ``key``.

    Reference: Li, Bao, Zhang, Richtarik, "PAGE: a simple and optimal probabilistic gradient
    estimator for nonconvex optimization", ICML 2021.
    """

    probability: float

    batches: ClassVar[type | None] = Anchored

    def __post_init__(self) -> None:
        check_one_real("probability", self.probability, 0, strict=True)
        _check_at_most_one("probability", self.probability)

    def init(self, point: Point) -> Past:
        """The first point, before any direction."""
        return _first(point)

    def estimate(
        self,
        read: Read,
        point: Point,
        inner: Anchored,
        outer: Anchored,
        memory: Past,
        step: jax.Array,
        key: Key | None,
    ) -> Estimate:
        """Two readings of the step's batches, or one of all data."""
        drawn = jax.random.bernoulli(require_key(key, "`Page`"), self.probability)
        return _anchored(read, point, inner, outer, memory, (step == 0) | drawn)

    def check(self, inner: Anchored, outer: Anchored, count: int) -> None:
        """Refuse an anchor that is not a batch."""
        _check_full(inner, outer)


def _check_full(inner: Anchored, outer: Anchored) -> None:
    check_batch(inner.full, "inner_batches.full")
    check_batch(outer.full, "outer_batch.full")


def _anchored(
    read: Read, point: Point, inner: Anchored, outer: Anchored, past: Past, restart: Any
) -> Estimate:
    full = repeated(inner.full, stack_length(inner.batch))

    def all_data() -> tuple[Directions, Reading]:
        # What is reported of a step is always of its own batches.
        at_batch = read(point, inner.batch, outer.batch)
        return directions_of(read(point, full, outer.full).oracles), at_batch

    def difference() -> tuple[Directions, Reading]:
        reading = read(point, inner.batch, outer.batch)
        new = directions_of(reading.oracles)
        old = directions_of(read(past.point, inner.batch, outer.batch).oracles)
        return _continued(new, old, past.directions, 1), reading

    directions, reading = jax.lax.cond(restart, all_data, difference)
    inside = 1 + examples(inner.full) / examples(one_batch(inner.batch))
    outside = 1 + examples(outer.full) / examples(outer.batch)
    inside, outside = (jnp.where(restart, ratio, 2.0) for ratio in (inside, outside))
    times = (inside, inside, outside)
    return Estimate(directions, reading, Past(point, directions), times)
