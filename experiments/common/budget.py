"""What methods pay: counted by the library, `bilevel.ground.cost.Cost`, and weighed by examples.

A budget counts what the loop itself counts (`info.cost`), and adds two rules of its own.

Batches of two sizes: the library counts every outer gradient as one. Here a gradient counts by its
examples: an outer gradient on 256 of them, beside training steps on 64, is 4 (`weight`).

Budgets pay for what a step costs at most: a solver that stops early, and a warm-up in which no
hyperparameter moves, leave some of it unspent.
"""

from typing import Any

import bilevel
from bilevel.ground.cost import Cost as Cost
from bilevel.hypergradient.base import cost_of
from bilevel.inner.network import Network
from bilevel.outer.self_tuning.losses import cycle_cost


def weight(outer_examples: int, inner_examples: int) -> float:
    """What an outer gradient counts: its examples over those of a training step."""
    return outer_examples / inner_examples


def training(steps: float) -> Cost:
    """Plain training for a number of steps."""
    return Cost(inner_gradients=steps)


def hypergradient(
    response: Any, hparams: Any = None, *, num_matvecs: float = 0, outer: float = 1.0
) -> Cost:
    """One hypergradient by a response: its own count, and an outer gradient.

    Args:
      response: of the library; one that trains counts its steps.
      hparams: read by a response whose cost depends on how many there are.
      num_matvecs: curvature products of the solver, where it has one.
      outer: what the outer gradient counts, see `weight`.
    """
    stats: Any = {"num_matvecs": num_matvecs}
    return cost_of(response, hparams, stats).plus(Cost(outer_gradients=outer))


def implicit_hypergradient(num_matvecs: float, outer: float = 1.0) -> Cost:
    """One hypergradient by a solver that makes `num_matvecs` Hessian products.

    Example:
        >>> training(20).plus(implicit_hypergradient(num_matvecs=10)).total
        48.5
    """
    return hypergradient(bilevel.Implicit(bilevel.CG()), num_matvecs=num_matvecs, outer=outer)


def self_tuning(
    network: Network, inner_steps: int, outer: float = 1.0, *, linearized: bool = False
) -> Cost:
    """One cycle of `bilevel.self_tuning`, when the warm-up is over.

    Delta-STN (a centred network) makes a plain gradient and one of the response, on linearized
    outputs or not; STN makes one of weights and response together.
    """
    cycle = cycle_cost(network, inner_steps, linearized=linearized)
    return cycle._replace(outer_gradients=outer * cycle.outer_gradients)


def stretches(budget: float, cost: float, points: int) -> int:
    """Steps of a cost that a budget pays for: a multiple of the points that are measured."""
    return int(budget // cost // points) * points


def global_response(draws: int, outer: float = 1.0) -> Cost:
    """One step of `bilevel.global_response` with one inner step: a gradient for every draw."""
    return Cost(draws, 0, outer)
