"""W3: an MLP of the size of W2's (668 672 weights, a decay each) through 50 SGD steps, a batch of
256 a step. Its units are tanh: reverse-over-reverse must keep what their second derivative needs,
where relu has none and the plain scan gets by with two thirds of the memory.

Beside mixed mode: what automatic reverse-over-reverse, rematerialization and truncation cost.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.bench import inputs, plain, w2
from experiments.bench.config import Config
from experiments.bench.measure import Row

STEPS = 50
KEPT = 10
LEARNING_RATE = 0.05
BATCH = 256
NO_UNROLL = "no steps on a stream of batches"


def model(params: Any, batch: Any) -> jax.Array:
    """Logits of the tanh network."""
    z = batch[0]
    for kernel, bias in params[:-1]:
        z = jnp.tanh(z @ kernel + jnp.broadcast_to(bias, (z.shape[0], bias.size)))
    kernel, bias = params[-1]
    return z @ kernel + jnp.broadcast_to(bias, (z.shape[0], bias.size))


def inner(params: Any, lam: Any, batch: Any) -> jax.Array:
    """Cross-entropy and the penalty of W2."""
    return w2.cross_entropy(model(params, batch), lam, batch) + w2.penalty(params, lam)


def outer(params: Any, lam: Any, batch: Any) -> jax.Array:
    """Cross-entropy."""
    return w2.cross_entropy(model(params, batch), lam, batch)


def first_batch(inner: Callable) -> Callable:
    """The inner loss on batch 0 of a stack: the unit of cost."""
    return lambda params, lam, batches: inner(params, lam, plain.pick(batches, 0))


@functools.lru_cache(maxsize=1)
def arguments(tiny: bool, seed: int, steps: int, batch: int) -> tuple[Any, str]:
    """Weights at initialization, a stack of batches, and everything else a row needs."""
    batch, sizes = (8, (12, 8, 8, 10)) if tiny else (batch, (784, 512, 512, 10))
    count = steps * batch
    x, y, source = inputs.images(count + 256, sizes[0], seed)
    train = (
        jnp.asarray(x[:count].reshape(steps, batch, -1)),
        jnp.asarray(y[:count].reshape(steps, batch)),
    )
    held_out = (jnp.asarray(x[count:]), jnp.asarray(y[count:]))
    keys = jax.random.split(jax.random.key(seed), 2 * len(sizes))
    params = [
        (
            jnp.sqrt(2.0 / m) * jax.random.normal(keys[i], (m, n), jnp.float32),
            jnp.zeros((n,), jnp.float32),
        )
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    ]
    lam = [
        inputs.log_decay(key, kernel, 1e-3)
        for key, (kernel, _) in zip(keys[len(sizes) :], params, strict=False)
    ]
    return (params, lam, train, held_out, keys[-1]), source


def unrolled(outer: Callable, inner: Callable, steps: int, **settings: Any) -> Callable:
    """The library's column: SGD unrolled with these settings."""
    response = bilevel.Unroll(optax.sgd(LEARNING_RATE), steps=steps, **settings)
    gradient = bilevel.hypergrad(outer, inner, response)

    def function(params: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
        return gradient(params, lam, inner_batch=train, outer_batch=held_out)

    return function


def jaxopt_unroll(outer: Callable, inner: Callable, steps: int, unroll: bool = False) -> Callable:
    """`OptaxSolver.update` in a scan over the batches, differentiated."""

    def function(params: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
        import jaxopt

        solver = jaxopt.OptaxSolver(inner, optax.sgd(LEARNING_RATE))

        def loss(lam: Any) -> Any:
            def step(carry: Any, i: Any) -> Any:
                return tuple(solver.update(*carry, lam, plain.pick(train, i))), None

            start = (params, solver.init_state(params, lam, plain.pick(train, 0)))
            end = jax.lax.scan(step, start, jnp.arange(steps), unroll=0 if unroll else 1)[0]
            return outer(end[0], lam, held_out)

        return jax.grad(loss)(lam)

    return function


def unroll(config: Config, seed: int) -> Row:
    """Mixed mode against everything else."""
    args, source = arguments(config.tiny, seed, STEPS, BATCH)
    columns = {
        "jax": plain.unrolled(outer, inner, STEPS, LEARNING_RATE, plain.mixed_gradient(inner)),
        "bilevel": unrolled(outer, inner, STEPS),
        "lineax": "not offered",
        "optimistix": NO_UNROLL,
        "jaxopt": jaxopt_unroll(outer, inner, STEPS),
    }
    extras = {
        "plain": plain.unrolled(outer, inner, STEPS, LEARNING_RATE, plain.gradient(inner)),
        "reverse": unrolled(outer, inner, STEPS, mode="reverse"),
        "step": unrolled(outer, inner, STEPS, remat="step"),
        "sqrt": unrolled(outer, inner, STEPS, remat="sqrt"),
        "truncated": unrolled(outer, inner, STEPS, truncate=KEPT),
    }
    title = f"W3 {STEPS} SGD steps, mixed mode"
    return Row("w3_unroll", title, source, args, first_batch(inner), columns=columns, extras=extras)


ROWS = {"w3_unroll": unroll}
