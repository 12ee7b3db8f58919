r"""Building blocks of single loops: one point, what is read there, and the directions it gives.

With :math:`q` for the solution of :math:`H q = ∇_w f` that a loop keeps track of (the papers
write :math:`v = -q`), all directions are taken at one point :math:`(w, q, λ)`:

.. math::
    D_w = ∇_w h,  D_q = H q - ∇_w f,
    D_λ = ∂_λ f - Bᵀ q
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar, Stats, Vector
from bilevel.ground.batches import is_single_key


class Indexed(NamedTuple):
    """Batches with their numbers, for estimators with one table entry per batch.

    Attributes:
      batch: what the losses read; for ``inner_batches`` a stack, as without a number.
      index: which batches these are, whole numbers from 0: an array ``(1,)`` for
        ``inner_batches`` (one per batch of the stack), a scalar for ``outer_batch``.
    """

    batch: Batch
    index: Any


class Anchored(NamedTuple):
    """Batches with the whole data set, for estimators that return to the full gradient.

    Attributes:
      batch: what the losses read; for ``inner_batches`` a stack, as without an anchor.
      full: all examples as one batch, without a leading axis of batches.
    """

    batch: Batch
    full: Batch


class Point(NamedTuple):
    """Where directions are taken: trained parameters, adjoint (``None`` in a series), hparams."""

    params: Params
    adjoint: Vector | None
    hparams: Hparams


class Oracles(NamedTuple):
    r"""What is read at a point, in accumulator dtypes.

    ``inner`` is :math:`∇_w h`, ``product`` :math:`H q`, ``cross`` :math:`Bᵀ q`, ``outer``
    :math:`∇_w f` and ``direct`` :math:`∂_λ f`. The first three depend on the
    inner batch, the others on the outer one. ``product`` and ``outer`` are ``None`` where no
    adjoint is carried.
    """

    inner: Vector
    product: Vector | None
    cross: Hparams
    outer: Vector | None
    direct: Hparams


class Directions(NamedTuple):
    """Along which the parameters, the adjoint and the hyperparameters move."""

    inner: Vector
    linear: Vector | None
    outer: Hparams


class Reading(NamedTuple):
    """The oracles at a point and what came with them.

    ``grads`` is the inner gradient of all leaves, frozen ones included; ``result`` and ``stats``
    judge the adjoint.
    """

    oracles: Oracles
    grads: Vector
    inner_value: Scalar
    value: Scalar
    aux: Any
    model_state: ModelState
    result: jax.Array
    stats: Stats


Read: TypeAlias = Callable[[Point, Batch, Batch], Reading]


class Estimate(NamedTuple):
    """Directions made of one or several readings.

    ``reading`` is that of the step's own batches. ``times`` says how often a reading of one batch
    was made, separately for inner gradients, products and outer gradients.
    """

    directions: Directions
    reading: Reading
    memory: Any
    times: tuple[Any, Any, Any]
    invalid: Any = False


class Estimator(Protocol):
    """How directions are made of readings; ``batches`` is what it wants in place of a batch."""

    batches: ClassVar[type | None]

    def init(self, point: Point) -> Any: ...

    def estimate(
        self,
        read: Read,
        point: Point,
        inner: Any,
        outer: Any,
        memory: Any,
        step: jax.Array,
        key: Key | None,
    ) -> Estimate: ...


class Plain:
    """The directions of one reading, as they are."""

    batches: ClassVar[type | None] = None

    def init(self, point: Point) -> None:
        """Nothing is remembered."""

    def estimate(
        self,
        read: Read,
        point: Point,
        inner: Any,
        outer: Any,
        memory: Any,
        step: jax.Array,
        key: Key | None,
    ) -> Estimate:
        """One reading."""
        reading = read(point, inner, outer)
        return Estimate(directions_of(reading.oracles), reading, None, (1, 1, 1))


def directions_of(oracles: Oracles) -> Directions:
    """The three directions; linear in the oracles, so that estimators may act on either."""
    return Directions(
        oracles.inner,
        tree.sub(oracles.product, oracles.outer),
        tree.sub(oracles.direct, oracles.cross),
    )


def zero_oracles(point: Point) -> Oracles:
    """Zeros with the shapes of the oracles at ``point``."""
    inner, hparams = (tree.zeros_accumulated(x) for x in (point.params, point.hparams))
    adjoint = tree.zeros_accumulated(point.adjoint)
    return Oracles(inner, adjoint, hparams, adjoint, hparams)


def unwrap(batches: Any, wanted: type | None, name: str) -> tuple[Batch, Any]:
    """What the losses read, and what comes with it (``None`` without).

    Raises:
      TypeError: the estimator wants another form of batches.
    """
    given = type(batches) if isinstance(batches, (Indexed, Anchored)) else None
    if given is wanted:
        return (batches, None) if wanted is None else tuple(batches)
    if wanted is None:
        raise TypeError(
            f"`{name}` is `{type(batches).__name__}(...)`, but this loop needs neither the number "
            f"of a batch nor the whole data: pass its `batch` alone."
        )
    field = wanted._fields[1]  # pyright: ignore[reportAttributeAccessIssue]
    raise TypeError(
        f"`{name}` must be `bilevel.{wanted.__name__}(batch, {field})` for this estimator, got "
        f"{type(batches).__name__}: see its docstring for what `{field}` is."
    )


def check_index(index: Any, count: int | None, name: str) -> None:
    """Refuse numbers of batches that are not whole, or not one for each batch."""
    shape = () if count is None else (count,)
    whole = hasattr(index, "dtype") and jnp.issubdtype(index.dtype, jnp.integer)
    if not (whole or isinstance(index, int) and not isinstance(index, bool)):
        raise TypeError(
            f"`{name}.index` must be whole numbers, which batches these are, got {index!r}."
        )
    if jnp.shape(index) != shape:
        raise ValueError(
            f"`{name}.index` has shape {jnp.shape(index)}, expected {shape}: one number for each "
            "batch."
        )


def repeated(batch: Batch, count: int) -> Batch:
    """A stack of ``count`` times the same batch."""

    def leaf(x: Any) -> Any:
        return x if is_single_key(x) else jnp.broadcast_to(x, (count, *jnp.shape(x)))

    return jax.tree.map(leaf, batch)


def stack_length(batches: Batch) -> int:
    """How many batches are in a stack; single keys do not tell."""
    lengths = [jnp.shape(x)[0] for x in jax.tree.leaves(batches) if not is_single_key(x)]
    return lengths[0] if lengths else 1


def examples(batch: Batch) -> int:
    """Length of the leading axis of a batch: of its first array that has one."""
    lengths = [jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)]
    return lengths[0] if lengths else 1
