"""Optimizers that choose their own learning rate, from `optax.contrib`: what tuning must beat."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from experiments.learning_rate import fresh
from experiments.learning_rate.config import Config


class Free(NamedTuple):
    """An optimizer at its default settings, and the parameters that it would be judged at."""

    tx: optax.GradientTransformation
    judged: Callable[[Any, Any], Any] = lambda state, params: params


METHODS = {
    "d_adaptation": Free(optax.contrib.dadapt_adamw()),
    "prodigy": Free(optax.contrib.prodigy()),
    # These two still have a rate, which is that of their page.
    "schedule_free": Free(
        optax.contrib.schedule_free_adamw(learning_rate=0.0025),
        optax.contrib.schedule_free_eval_params,
    ),
    "mechanic": Free(optax.contrib.mechanize(optax.adam(1.0))),
}


@functools.cache
def replay(config: Config, model: str, method: str) -> Callable[..., Any]:
    """Jitted `(images, key) -> metrics` of one run, on the batches that a schedule sees."""
    tx, judged = METHODS[method]
    return jax.jit(lambda images, key: fresh.run(config, model, tx, images, key, judged))
