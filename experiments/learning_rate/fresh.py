"""One run of training from new weights, by whatever sets the rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.common import batches
from experiments.learning_rate import problem
from experiments.learning_rate.config import Config


def run(
    config: Config,
    model: str,
    tx: optax.GradientTransformation,
    images: Any,
    key: jax.Array,
    judged: Callable[[Any, Any], Any] = lambda state, params: params,
) -> dict[str, jax.Array]:
    """Losses at the end, the test error, and the losses seen along the run.

    The first weights and the batches depend on the key alone: all methods see the same.
    ``judged`` gives the parameters that are measured, of the optimizer's state and the last ones.
    """
    keys = jax.random.split(key, 2)
    params = problem.initial(model, keys[0])

    def loss(params: Any, hparams: None, key: jax.Array) -> jax.Array:
        return problem.loss(params, hparams, batches.draw(images["train"], key, (config.batch,)))

    first, steps = bilevel.InnerState(params, tx.init(params)), config.steps
    # A whole run is too long to be straight-line code.
    state, seen = bilevel.descend(
        loss, tx, first, None, jax.random.split(keys[1], steps), steps=steps, unroll=False
    )
    params, test = judged(state.opt_state, state.params), images["test"]
    wrong = jnp.argmax(problem.logits(params, test[0]), -1) != test[1]
    return {
        "final_loss": problem.loss(params, None, images["train"]),
        "validation_loss": problem.loss(params, None, images["validation"]),
        "test_error": jnp.mean(wrong),
        "curve": seen.loss,
    }
