r"""The hyperparameters of an outer loop: what the losses read, what the optimizer moves, one move.

With bounds :math:`c` the optimizer moves a raw variable :math:`ρ`, and

.. math::
    ρ ← ρ - v(
        (∂c/∂ρ)ᵀ dF/dλ),
    λ = c(ρ)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams, Scalar
from bilevel.inner.optimizer import compute_updates
from bilevel.space.space import Space


class Variable(NamedTuple):
    """The hyperparameters as a loop carries them.

    Attributes:
      hparams: what the losses read.
      raw: what the optimizer moves; ``None`` without bounds, where that is ``hparams``.
      opt_state: state of the optimizer.
    """

    hparams: Hparams
    raw: Hparams | None
    opt_state: Any

    @property
    def moving(self) -> Hparams:
        """What the optimizer moves."""
        return self.hparams if self.raw is None else self.raw


@dataclasses.dataclass(frozen=True)
class Mover:
    """How hyperparameters move.

    Attributes:
      tx: an optax transformation.
      space: bounds, or ``None``.
      rounded: the losses read whole numbers where the bounds have them.
      name: of ``tx``, for messages.
    """

    tx: optax.GradientTransformation
    space: Space | None
    rounded: bool = False
    name: str = "outer_tx"

    def begin(self, hparams: Hparams) -> Variable:
        """The first variable at ``hparams``, refused outside the bounds."""
        if self.space is None:
            return Variable(hparams, None, self.tx.init(hparams))
        raw = self.space.unconstrain(hparams)
        return Variable(self.read(raw) if self.rounded else hparams, raw, self.tx.init(raw))

    def read(self, moving: Hparams) -> Hparams:
        """What the losses read, where the optimizer stands at ``moving``."""
        if self.space is None:
            return moving
        hparams = self.space.constrain(moving)
        return self.space.round(hparams) if self.rounded else hparams

    def pull(self, variable: Variable, grads: Hparams) -> Hparams:
        """A gradient in what the losses read, as one in what the optimizer moves."""
        if self.space is None:
            return grads
        return jax.vjp(self.read, variable.raw)[1](grads)[0]

    def move(
        self,
        variable: Variable,
        grads: Hparams,
        *,
        value: Scalar,
        value_fn: Callable[[Hparams], Scalar] | None = None,
    ) -> tuple[Variable, Scalar]:
        """One optimizer step along ``grads`` (in what moves), and their norm.

        Args:
          value: the outer loss, for optimizers that read it.
          value_fn: the outer loss elsewhere, for a line search; ``None`` refuses one.
        """
        moving = variable.moving
        updates, opt_state = compute_updates(
            self.tx,
            grads,
            variable.opt_state,
            moving,
            value=value,
            value_fn=self._no_search if value_fn is None else value_fn,
            name=self.name,
        )
        moved = optax.apply_updates(moving, updates)
        raw = None if variable.raw is None else moved
        return Variable(self.read(moved), raw, opt_state), tree.norm(grads)

    def _no_search(self, hparams: Hparams) -> Scalar:
        raise ValueError(
            f"`{self.name}` evaluates the outer loss at other hyperparameters (a line search), "
            "where the inner problem would have to be solved again: use an optimizer without one, "
            "such as `optax.lbfgs(..., linesearch=None)` with a learning rate, or `optax.adam`."
        )


def check_space(constrain: Any, example: str) -> None:
    """Refuse bounds that are no :class:`~bilevel.Space`."""
    if constrain is not None and not isinstance(constrain, Space):
        raise TypeError(
            f"`constrain` must be a `Space`, such as `Space({example})`, or None, got "
            f"{constrain!r}."
        )
