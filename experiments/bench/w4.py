"""W4: a small CNN on 32 x 32 x 3 images, batch 64, one weight for each of 5000 examples.

Convolutions: loops over products must be straight-line code on CPU, and products
forward-over-reverse. The images are Gaussian numbers; the cost does not depend on them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.bench import inputs, peers, plain
from experiments.bench.config import Config
from experiments.bench.measure import Row

TERMS = 5
STEP = 0.05
LEARNING_RATE = 0.1
CHANNELS = (32, 64, 64)
NO_SERIES = "no Neumann series"
NOT_OFFERED = "not offered"


def model(params: Any, hparams: Any, batch: Any) -> jax.Array:
    z = batch[0]
    for kernel, bias in params[:-1]:
        z = jax.lax.conv_general_dilated(
            z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        z = jax.nn.relu(z + jnp.broadcast_to(bias, z.shape))
        n, height, width, channels = z.shape
        z = z.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    kernel, bias = params[-1]
    z = z.mean((1, 2)) @ kernel
    return z + jnp.broadcast_to(bias, z.shape)


def weighted(z: jax.Array, hparams: jax.Array, batch: Any) -> jax.Array:
    """Mean cross-entropy, each example weighted by the sigmoid of its hyperparameter."""
    _, y, index = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(z, y)
    return jnp.mean(jax.nn.sigmoid(hparams[index]) * losses)


def inner(params: Any, hparams: jax.Array, batch: Any) -> jax.Array:
    return weighted(model(params, hparams, batch), hparams, batch)


def outer(params: Any, hparams: jax.Array, batch: Any) -> jax.Array:
    z = model(params, hparams, batch)
    return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()


@functools.lru_cache(maxsize=1)
def arguments(tiny: bool, seed: int) -> tuple[Any, str]:
    """Weights at initialization, and everything else a row needs."""
    count, side, channels, examples = (4, 8, (3, 4, 4), 20) if tiny else (64, 32, CHANNELS, 5000)
    x, y, _ = inputs.images(2 * count, side * side * 3, seed)
    x = x.reshape(-1, side, side, 3)
    keys = jax.random.split(jax.random.key(seed), len(channels) + 4)
    index = jax.random.permutation(keys[-3], examples)[:count]
    train = (jnp.asarray(x[:count]), jnp.asarray(y[:count]), index)
    held_out = (jnp.asarray(x[count:]), jnp.asarray(y[count:]))
    params = []
    for i, (m, n) in enumerate(zip((3, *channels[:-1]), channels, strict=True)):
        kernel = jax.random.normal(keys[i], (3, 3, m, n), jnp.float32)
        params.append((jnp.sqrt(2.0 / (9 * m)) * kernel, jnp.zeros((n,), jnp.float32)))
    kernel = jax.random.normal(keys[-2], (channels[-1], 10), jnp.float32)
    params.append((jnp.sqrt(1.0 / channels[-1]) * kernel, jnp.zeros((10,), jnp.float32)))
    lam = jax.random.normal(keys[-4], (examples,), jnp.float32)
    return (params, lam, train, held_out, keys[-1]), "Gaussian numbers"


def _row(name: str, title: str, config: Config, seed: int, **fields: Any) -> Row:
    args, source = arguments(config.tiny, seed)
    return Row(name, "W4 " + title, source, args, inner, **fields)


def _bilevel(solver: Any, operator: Any) -> Any:
    gradient = bilevel.hypergrad(outer, inner, bilevel.Implicit(solver, operator))

    def function(params: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
        return gradient(params, lam, inner_batch=train, outer_batch=held_out, key=key)

    return function


def _after_step(params: Any, lam: Any, train: Any) -> Any:
    return plain.axpy(-LEARNING_RATE, jax.grad(inner)(params, lam, train), params)


def step(config: Config, seed: int) -> Row:
    """One SGD step and the T1-T2 hypergradient (`H := I / learning rate`) at the same point."""

    def identity(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
        return jax.tree.map(lambda x: LEARNING_RATE * x, g)

    def both(hypergradient: Any) -> Any:
        def function(params: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
            gradient = hypergradient(params, lam, train, held_out, key)
            return gradient, _after_step(params, lam, train)

        return function

    def without(params: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
        return jax.grad(outer)(params, lam, held_out), _after_step(params, lam, train)

    def scaled(matvec: Any, b: Any) -> Any:
        return identity(b, None, None, None, None)

    columns = {
        "jax": both(plain.hypergradient(outer, inner, identity)),
        "bilevel": both(_bilevel(bilevel.Identity(scale=LEARNING_RATE), bilevel.Hessian())),
        "lineax": NOT_OFFERED,
        "optimistix": NOT_OFFERED,
        "jaxopt": both(peers.jaxopt_root(outer, inner, scaled)),
    }
    return _row(
        "w4_step",
        "SGD step and T1–T2 hypergradient",
        config,
        seed,
        columns=columns,
        extras={"without_hypergradient": without},
    )


def _by_hand(bind: Any) -> Any:
    def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
        return plain.neumann(bind(params, lam, batch), g, TERMS, STEP, unroll=True)

    return plain.hypergradient(outer, inner, solve)


def _neumann() -> bilevel.Neumann:
    return bilevel.Neumann(num_matvecs=TERMS, step_size=STEP)


def neumann(config: Config, seed: int) -> Row:
    """Five Neumann products of the Hessian."""

    def hessian(params: Any, lam: Any, batch: Any) -> Any:
        return jax.linearize(lambda v: jax.grad(inner)(v, lam, batch), params)[1]

    def users_own(matvec: Any, b: Any) -> Any:
        return plain.neumann(matvec, b, TERMS, STEP, unroll=True)

    columns = {
        "jax": _by_hand(hessian),
        "bilevel": _bilevel(_neumann(), bilevel.Hessian()),
        "lineax": NO_SERIES,
        "optimistix": NO_SERIES,
        "jaxopt": peers.jaxopt_root(outer, inner, users_own),
    }
    return _row("w4_neumann", f"Neumann, {TERMS} products", config, seed, columns=columns)


def neumann_gn(config: Config, seed: int) -> Row:
    """Five Neumann products of Gauss–Newton, beside those of the Hessian."""

    def gauss_newton(params: Any, lam: Any, batch: Any) -> Any:
        return plain.gauss_newton(
            lambda v: model(v, lam, batch), lambda z: weighted(z, lam, batch), params
        )

    columns = {
        "jax": _by_hand(gauss_newton),
        "bilevel": _bilevel(_neumann(), bilevel.GaussNewton(model, weighted)),
        "lineax": NO_SERIES,
        "optimistix": NO_SERIES,
        "jaxopt": "no Gauss–Newton product",
    }
    extras = {"hessian": _bilevel(_neumann(), bilevel.Hessian())}
    title = f"Neumann on Gauss–Newton, {TERMS} products"
    return _row("w4_neumann_gn", title, config, seed, columns=columns, extras=extras)


ROWS = {
    "w4_step": step,
    "w4_neumann": neumann,
    "w4_neumann_gn": neumann_gn,
}
