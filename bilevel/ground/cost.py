"""What a computation costs, counted in derivatives: the one convention of loops and experiments.

The unit is one gradient of the inner loss on one batch, forward and backward through the model.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

PRODUCT = 2.5
"""Gradients that a curvature product is worth: one forward tangent of one gradient."""

UNKNOWN = float("nan")


class Cost(NamedTuple):
    r"""How often each kind of derivative was evaluated; ``plus`` adds and ``times`` scales.

    Attributes:
      inner_gradients: gradients of the inner loss on one inner batch. A layer makes three
        products with its kernel in one: forward, back to its input, back to the kernel. A layer
        that is *displaced* (:class:`~bilevel.inner.layers.LayerResponse`) makes two forward, two
        back to its input, and one for each kernel that learns: 6/3 if both do, 5/3 for the
        response alone, 4/3 for neither. Displaced *weights* cost no product. A gradient of
        linearized outputs is two.
      products: :math:`H v` and :math:`Bᵀ v`; one that yields both counts once. A step of
        training that is differentiated is one.
      outer_gradients: gradients of the outer loss on one outer batch.

    Values of losses are free, for every method: that favours black-box search, which does nothing
    else with the validation data. NaN where a method does not tell.
    """

    inner_gradients: Any = 0.0
    products: Any = 0.0
    outer_gradients: Any = 0.0

    @property
    def total(self) -> Any:
        """In inner gradients: a product counts :data:`PRODUCT`, an outer gradient one."""
        return self.inner_gradients + PRODUCT * self.products + self.outer_gradients

    def plus(self, other: "Cost") -> "Cost":
        """Both together."""
        return Cost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, factor: Any) -> "Cost":
        """``factor`` times as much."""
        return Cost(*(factor * mine for mine in self))

    def arrays(self) -> "Cost":
        """As float32 scalars."""
        return Cost(*(jnp.asarray(x, jnp.float32) for x in self))
