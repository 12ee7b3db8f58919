r"""The noisy quadratic: the short-horizon bias without any sampling.

SGD with rate a on :math:`\tfrac12\sum_i l_i w_i^2` with gradient noise of deviation s keeps mean
and variance of every coordinate in closed form,

.. math:: m \leftarrow (1 - a l) m, \qquad V \leftarrow (1 - a l)^2 V + a^2 s^2 .

Wu, Ren, Liao, Grosse, "Understanding short-horizon bias in stochastic meta-optimization", 2018.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

DIMENSION, STEPS, WINDOWS, NOISE, START = 50, 500, 5, 0.02, 0.1
LARGEST = 1.9  # stable for the largest curvature, 1; beyond 2 the loss explodes


def curvatures() -> jax.Array:
    return jnp.asarray(np.logspace(-3, 0, DIMENSION), jnp.float32)


def advance(moments: Any, rate: jax.Array) -> Any:
    """Mean and variance after one step."""
    mean, variance = moments
    shrink = 1 - rate * curvatures()
    return shrink * mean, shrink**2 * variance + (rate * NOISE) ** 2


def expected_loss(moments: Any) -> jax.Array:
    mean, variance = moments
    return 0.5 * jnp.sum(curvatures() * (mean**2 + variance))


def losses(log_rates: jax.Array, short: bool) -> jax.Array:
    """Expected loss after every step; `short` cuts what a step owes to those before it."""
    start = (jnp.ones(DIMENSION), jnp.zeros(DIMENSION))

    def step(moments: Any, rate: jax.Array) -> Any:
        moments = jax.lax.stop_gradient(moments) if short else moments
        moments = advance(moments, rate)
        return moments, expected_loss(moments)

    return jax.lax.scan(step, start, jnp.repeat(jnp.exp(log_rates), STEPS // WINDOWS))[1]


@jax.jit
def gradients(log_rates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the last loss through all steps, and of every loss through its own step only."""
    whole = jax.grad(lambda r: losses(r, short=False)[-1])(log_rates)
    greedy = jax.grad(lambda r: jnp.sum(losses(r, short=True)))(log_rates)
    return whole, greedy


def learn(updates: int, *, short: bool) -> tuple[jax.Array, jax.Array]:
    """Rates learned by Adam with a falling step size, and the expected losses of their run."""
    tx = optax.adam(optax.cosine_decay_schedule(0.1, updates))

    @jax.jit
    def move(carry: Any, _: Any) -> Any:
        log_rates, state = carry
        direction, state = tx.update(gradients(log_rates)[short], state)
        log_rates = jnp.minimum(log_rates + jnp.asarray(direction), jnp.log(LARGEST))
        return (log_rates, state), None

    log_rates = jnp.full(WINDOWS, jnp.log(START))
    (log_rates, _), _ = jax.lax.scan(move, (log_rates, tx.init(log_rates)), length=updates)
    return jnp.exp(log_rates), losses(log_rates, short=False)


def best_constant() -> tuple[float, jax.Array]:
    """The best of 200 constant rates, and its losses."""
    grid = jnp.log(jnp.asarray(np.logspace(-3, np.log10(LARGEST), 200), jnp.float32))
    runs = jax.vmap(lambda r: losses(jnp.full(WINDOWS, r), short=False))(grid)
    i = int(jnp.argmin(runs[:, -1]))
    return float(jnp.exp(grid[i])), runs[i]
