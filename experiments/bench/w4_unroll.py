"""W4 unrolled: the CNN of W4 through one and through four SGD steps.

Convolution gradients inside a loop are tens of times slower on CPU, so every column is
straight-line code; what is left to win is forward-over-reverse against reverse-over-reverse.
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import plain, w3, w4
from experiments.bench.config import Config
from experiments.bench.measure import Row

STEPS = 4


def _row(name: str, config: Config, seed: int, steps: int) -> Row:
    (params, lam, train, held_out, key), source = w4.arguments(config.tiny, seed)
    # One batch over and over: the cost does not depend on the numbers.
    stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), train)
    rate, inner, outer = w3.LEARNING_RATE, w4.inner, w4.outer

    def by_hand(gradient: Any) -> Any:
        return plain.unrolled(outer, inner, steps, rate, gradient, unroll=True)

    columns = {
        "jax": by_hand(plain.mixed_gradient(inner)),
        "bilevel": w3.unrolled(outer, inner, steps),
        "lineax": w4.NOT_OFFERED,
        "optimistix": w3.NO_UNROLL,
        "jaxopt": w3.jaxopt_unroll(outer, inner, steps, unroll=True),
    }
    extras = {"plain": by_hand(plain.gradient(inner))}
    title = f"W4 {steps} unrolled SGD step{'s' if steps > 1 else ''}"
    args = (params, lam, stack, held_out, key)
    return Row(name, title, source, args, w3.first_batch(inner), columns=columns, extras=extras)


def unroll_1(config: Config, seed: int) -> Row:
    """One step, differentiated."""
    return _row("w4_unroll_1", config, seed, 1)


def unroll_4(config: Config, seed: int) -> Row:
    """Four steps, differentiated."""
    return _row("w4_unroll_4", config, seed, STEPS)


ROWS = {"w4_unroll_1": unroll_1, "w4_unroll_4": unroll_4}
