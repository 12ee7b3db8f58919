"""Optimizers that choose their own learning rate, from `optax.contrib`: what tuning must beat.

`python -m experiments.learning_rate.free` runs these alone.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import batches
from experiments.learning_rate import problem
from experiments.learning_rate.config import Config, cpu


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
    """Jitted `(train, test, key) -> metrics` of one run, on the batches that a schedule sees."""
    tx, judged = METHODS[method]

    @jax.jit
    def run(train: Any, test: Any, key: jax.Array) -> Any:
        keys = jax.random.split(key, 2)
        params = problem.initial(model, keys[0])

        def loss(params: Any, hparams: None, key: jax.Array) -> jax.Array:
            return problem.loss(params, hparams, batches.draw(train, key, (config.batch,)))

        first, steps = bilevel.InnerState(params, tx.init(params)), config.steps
        state, seen = bilevel.descend(
            loss, tx, first, None, jax.random.split(keys[1], steps), steps=steps, unroll=False
        )
        params = judged(state.opt_state, state.params)
        wrong = jnp.argmax(problem.logits(params, test[0]), -1) != test[1]
        return {
            "final_loss": problem.loss(params, None, train),
            "test_error": jnp.mean(wrong),
            "curve": seen.loss,
        }

    return run


def main() -> None:
    """Prints the means of three seeds, each of as many runs as a schedule is replayed in."""
    config = cpu()
    for model in config.models:
        for method in METHODS:
            told = []
            for seed in range(3):
                images = problem.images(config, seed)
                key = jax.random.fold_in(jax.random.key(seed), 1)
                for i in range(config.replays):
                    run = replay(config, model, method)
                    got = run(images["train"], images["test"], jax.random.fold_in(key, i))
                    told.append([float(got["final_loss"]), float(got["test_error"])])
            loss, error = np.mean(told, 0)
            sys.stdout.write(f"{model} {method}: final loss {loss:.4f}, test error {error:.3f}\n")


if __name__ == "__main__":
    main()
