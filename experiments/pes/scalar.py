r"""The scalar system on which bias and variance are known.

:math:`s_t = a s_{t-1} + \theta` with loss :math:`s_t`: the truth is
:math:`(1 - a^t)/(1 - a)`, truncated ES with windows of one step expects 1, and one pair of PES
has variance :math:`t(1 - a^{2t})/(1 - a^2) + ((1 - a^t)/(1 - a))^2`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel

DECAY, STEPS, SIGMA, THETA = 0.9, 50, 0.1, 0.5


def closed_form() -> tuple[np.ndarray, np.ndarray]:
    """The true derivative and the variance of one PES pair, after every step."""
    t = np.arange(1, STEPS + 1)
    truth = (1 - DECAY**t) / (1 - DECAY)
    return truth, t * (1 - DECAY ** (2 * t)) / (1 - DECAY**2) + truth**2


def potential(s: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    """One gradient step of rate 1 on it is one step of the system."""
    return 0.5 * (1 - DECAY) * s**2 - theta * s


def loss(s: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    return s


def evolution(pairs: int, persistent: bool) -> bilevel.Evolution:
    """PES or truncated ES, a step at a time."""
    return bilevel.Evolution(
        optax.sgd(1.0), steps=1, particles=pairs, sigma=SIGMA, persistent=persistent
    )


def estimates(pairs: int, key: jax.Array, *, persistent: bool) -> tuple[np.ndarray, np.ndarray]:
    """The estimate and its standard error after every step, from one population."""
    response = evolution(pairs, persistent)
    theta, start = jnp.float32(THETA), jnp.float32(0)

    @jax.jit
    def whole(key: jax.Array) -> Any:
        def call(carry: Any, key: jax.Array) -> Any:
            solve = bilevel.hypergrad_solve(
                loss,
                potential,
                response,
                carry[0],
                theta,
                inner_batch=jnp.zeros((1, 1)),
                outer_batch=None,
                state=carry[1],
                key=key,
            )
            return (solve.params, solve.state), (solve.grads, solve.stats["standard_error"])

        state = bilevel.hypergrad_init(loss, potential, response, start, theta)
        return jax.lax.scan(call, (start, state), jax.random.split(key, STEPS))[1]

    return jax.tree.map(np.asarray, whole(key))
