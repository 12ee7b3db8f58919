"""What a computation costs, counted in inner-gradient evaluations.

The one convention of all experiments: the unit is G, one gradient of the inner loss on one inner
batch. A Hessian product costs 2.5 G, a mixed product B'v costs 2.5 G (both are one JVP of a
gradient, and one JVP that yields both at once is counted as one product), a gradient of the outer
loss costs 1 G. Evaluating a loss without its gradient is free for every method: that favours
black-box search, which does nothing else with the validation set.
"""

from typing import NamedTuple

GRADIENT = 1.0
HESSIAN_PRODUCT = 2.5
MIXED_PRODUCT = 2.5
OUTER_GRADIENT = 1.0


class Counts(NamedTuple):
    """How often each kind of derivative was evaluated; `plus` adds and `times` scales.

    Example:
        >>> step = training(20).plus(implicit_hypergradient(num_matvecs=10))
        >>> step.cost
        48.5
    """

    gradients: float = 0
    hessian_products: float = 0
    mixed_products: float = 0
    outer_gradients: float = 0

    @property
    def cost(self) -> float:
        """The total in inner-gradient evaluations."""
        return (
            GRADIENT * self.gradients
            + HESSIAN_PRODUCT * self.hessian_products
            + MIXED_PRODUCT * self.mixed_products
            + OUTER_GRADIENT * self.outer_gradients
        )

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Counts":
        return Counts(*(factor * mine for mine in self))


def training(steps: int) -> Counts:
    """Plain training for a number of steps."""
    return Counts(gradients=steps)


def implicit_hypergradient(num_matvecs: float) -> Counts:
    """One hypergradient by a solver that makes `num_matvecs` Hessian products."""
    return Counts(hessian_products=num_matvecs, mixed_products=1, outer_gradients=1)


def unrolled_hypergradient(steps: int) -> Counts:
    """One hypergradient through `steps` unrolled steps: each step, and one joint product of it."""
    return Counts(gradients=steps, hessian_products=steps, outer_gradients=1)
