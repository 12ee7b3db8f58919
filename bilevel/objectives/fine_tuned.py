r"""Two stages: pre-training is the inner problem, the outer loss is taken after fine-tuning.

.. math::
    F(λ) = f(T_K(w^*(λ))),
    w^*(λ) = \operatorname*{argmin}_w h(w, λ),
    T(v) = v - u(∇ℓ(v))
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar
from bilevel.ground.batches import check_stack, select_batch
from bilevel.ground.settings import check_count, check_takes, is_function
from bilevel.inner.descend import descend, start
from bilevel.inner.optimizer import check_tx
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inexact, check_losses, check_scalar


def same_params(params: Params, batch: Batch) -> Params:
    """The pre-trained parameters as they are."""
    return params


@dataclasses.dataclass(frozen=True)
class FineTuned:
    r"""The validation loss after K steps of fine-tuning from the pre-trained parameters.

    Weights of pre-training tasks or examples, and its augmentations, are tuned for what they are
    worth after fine-tuning. The derivative through the K steps is unrolled, that of pre-training
    is the response's, ``Implicit(...)`` as a rule.

    Args:
      outer_loss: validation loss of the fine-tuned parameters, ``loss(params, hparams, batch)``.
      fine_loss: fine-tuning loss, of the same form.
      tx: optax transformation of fine-tuning.
      steps: K. Fewer steps than fine-tuning takes tell what pays in the short run.
      copied: ``copied(params, batch) -> params`` makes the start of fine-tuning from the
        pre-trained parameters: a fresh head, an encoder alone.

    ``outer`` reads ``(batches, batch)``: a stack of K to fine-tune on, and one to validate on.

    Raises:
      TypeError, ValueError: for settings and batches that do not fit.

    Cost: K fine-tuning gradients, and about three times as much for a hypergradient; memory for K
    steps.

    Example:
      >>> import jax.numpy as jnp, optax, bilevel
      >>> def error(w, hparams, target):
      ...     return 0.5 * jnp.sum((w - target) ** 2)
      >>> fine = bilevel.objectives.FineTuned(error, error, optax.sgd(0.5), steps=2)
      >>> target = jnp.ones(1)
      >>> print(fine.outer(jnp.zeros(1), (), (jnp.ones((2, 1)), target)))  # (1 - 0.75)^2 / 2
      0.03125

    Reference: Raghu et al., "Meta-learning to improve pre-training", NeurIPS 2021.
    """

    outer_loss: Loss
    fine_loss: Loss
    tx: optax.GradientTransformation
    steps: int
    copied: Callable[[Params, Batch], Params] = same_params

    def __post_init__(self) -> None:
        check_losses(outer_loss=self.outer_loss, fine_loss=self.fine_loss)
        check_tx("tx", self.tx)
        check_count("steps", self.steps, 0)
        if not is_function(self.copied):
            raise TypeError(
                f"`copied` must be a function copied(params, batch) -> params, got {self.copied!r}."
            )
        check_takes("copied", self.copied, "copied(params, batch)")

    def init(self, params: Params) -> Params:
        """``params``, of pre-training."""
        return params

    def outer(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        """The validation loss after fine-tuning, an outer loss of the pre-trained parameters."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                "this objective fine-tunes and validates: its batch must be a pair "
                "(batches, batch)."
            )
        batches, last = batch
        first = jax.tree.map(jnp.asarray, self.copied(params, last))
        check_inexact(first, "the result of `copied`", "Return floating-point parameters.")
        if self.steps:
            check_stack(batches, self.steps, "batches")
            problem = Problem(self.outer_loss, self.fine_loss)
            value = jax.eval_shape(self.fine_loss, first, hparams, select_batch(batches, 0))
            check_scalar(value, "fine_loss")
            state = start(self.tx, first)
            state, _ = descend(problem, self.tx, state, hparams, batches, steps=self.steps)
            first = state.params
        value = self.outer_loss(first, hparams, last)
        check_scalar(value, "outer_loss")
        return value
