"""W1: multinomial logistic regression with a penalty per weight (7840 hyperparameters), by CG.

Convex and, but for the penalty, ill-conditioned: the case where the linear solve is everything.
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

STEPS = 40
RTOL = 1e-6
MOST = 1000
PROBES = 10


def features(hparams: Any, batch: Any) -> jax.Array:
    return batch[0]


def cross_entropy(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()


def penalty(w: jax.Array, hparams: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.exp(hparams) * w**2)


def model(w: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    return batch[0] @ w


def inner(w: jax.Array, hparams: jax.Array, batch: Any) -> jax.Array:
    return cross_entropy(batch[0] @ w, hparams, batch) + penalty(w, hparams)


def outer(w: jax.Array, hparams: jax.Array, batch: Any) -> jax.Array:
    return cross_entropy(batch[0] @ w, hparams, batch)


@functools.lru_cache(maxsize=1)
def arguments(tiny: bool, seed: int, decaying: bool = False) -> tuple[Any, str]:
    """Weights after 200 steps of gradient descent, and everything else a row needs.

    Where `decaying`, the features are Gaussian and number j has the scale 1 / sqrt(j).
    """
    count, valid, pixels = (200, 50, 20) if tiny else (10_000, 2_000, 784)
    if decaying:
        x, y, source = inputs.decaying(count + valid, pixels, seed)
    else:
        x, y, source = inputs.images(count + valid, pixels, seed)
    train = (jnp.asarray(x[:count]), jnp.asarray(y[:count]))
    held_out = (jnp.asarray(x[count:]), jnp.asarray(y[count:]))
    key = jax.random.key(seed)
    w = jnp.zeros((pixels, 10), jnp.float32)
    lam = inputs.log_decay(key, w, 5e-2)

    @jax.jit
    def descend(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
        return jax.lax.fori_loop(0, 200, lambda _, v: v - 0.05 * jax.grad(inner)(v, lam, batch), w)

    return (descend(w, lam, train), lam, train, held_out, key), source


def _row(
    name: str, title: str, config: Config, seed: int, decaying: bool = False, **fields: Any
) -> Row:
    args, source = arguments(config.tiny, seed, decaying)
    return Row(name, "W1 " + title, source, args, inner, **fields)


def _hessian(w: jax.Array, lam: jax.Array, batch: Any) -> Any:
    return jax.linearize(lambda v: jax.grad(inner)(v, lam, batch), w)[1]


def _bilevel(solver: Any, operator: Any) -> Any:
    gradient = bilevel.hypergrad(outer, inner, bilevel.Implicit(solver, operator, warm_start=False))

    def function(w: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
        return gradient(w, lam, inner_batch=train, outer_batch=held_out, key=key)

    return function


def _plain_cg_peers(steps: int, rtol: float | None) -> dict[str, Any]:
    return {
        "lineax": peers.lineax_cg(outer, inner, _hessian, steps, rtol),
        "optimistix": peers.optimistix_cg(outer, inner, steps, rtol),
        "jaxopt": peers.jaxopt_root(outer, inner, peers.jaxopt_cg(steps, rtol)),
    }


def _plain_cg_by_hand(steps: int, rtol: float | None) -> Any:
    def solve(g: Any, w: Any, lam: Any, batch: Any, key: Any) -> Any:
        return plain.cg(_hessian(w, lam, batch), g, steps, rtol)

    return plain.hypergradient(outer, inner, solve)


def cg_fixed(config: Config, seed: int) -> Row:
    """Forty CG steps on the Hessian."""
    columns = {
        "jax": _plain_cg_by_hand(STEPS, None),
        "bilevel": _bilevel(bilevel.CG(max_steps=STEPS), bilevel.Hessian()),
        **_plain_cg_peers(STEPS, None),
    }
    return _row("w1_cg_fixed", f"CG, {STEPS} steps", config, seed, columns=columns)


def cg_tolerance(config: Config, seed: int) -> Row:
    """CG on the Hessian to a relative residual of 1e-6."""
    columns = {
        "jax": _plain_cg_by_hand(MOST, RTOL),
        "bilevel": _bilevel(bilevel.CG(max_steps=MOST, rtol=RTOL), bilevel.Hessian()),
        **_plain_cg_peers(MOST, RTOL),
    }
    return _row("w1_cg_tolerance", "CG to 1e-6", config, seed, columns=columns)


def _operator(any_model: Any) -> bilevel.GaussNewton:
    return bilevel.GaussNewton(any_model, cross_entropy, penalty=penalty)


def _preconditioned_columns(by_hand: Any, any_model: Any) -> dict[str, Any]:
    """The peers have no diagonal preconditioner of their own: they run plain CG, as above."""
    solver = bilevel.CG(
        max_steps=MOST, rtol=RTOL, preconditioner=bilevel.Diagonal(num_probes=PROBES)
    )
    return {
        "jax": by_hand,
        "bilevel": _bilevel(solver, _operator(any_model)),
        **_plain_cg_peers(MOST, RTOL),
    }


def _estimated_by_hand(g: Any, w: Any, lam: Any, batch: Any, key: Any) -> Any:
    """Samples of the diagonal, drawn towards the product of their means over rows and columns."""
    x, y = batch
    z, weigh = jax.linearize(jax.grad(lambda z: cross_entropy(z, lam, batch)), x @ w)
    decay = jnp.exp(lam)

    def mv(v: jax.Array) -> jax.Array:
        return x.T @ weigh(x @ v) + decay * v

    keys = jax.random.split(key, PROBES)

    def probe(i: Any, sums: tuple) -> tuple:
        s = jax.random.rademacher(jax.random.split(keys[i], 1)[0], z.shape, z.dtype)
        sample = (x.T @ s) * (x.T @ weigh(s))
        return sums[0] + sample, sums[1] + sample**2

    zeros = jnp.zeros_like(g)
    total, squares = jax.lax.fori_loop(0, PROBES, probe, (zeros, zeros))
    mean = total / PROBES
    # Rounding may leave it below zero.
    variance = jnp.maximum(squares / PROBES - mean**2, 0) / (PROBES - 1)
    product = mean.mean(1, keepdims=True) * mean.mean(0, keepdims=True) / mean.mean()
    live = product > 0
    safe = jnp.where(live, product, 1)
    noise = jnp.mean(variance / safe**2, where=live)
    spread = jnp.maximum(jnp.mean((mean / safe - 1) ** 2, where=live) - noise, 0)
    share = jnp.where(live, spread / (spread + noise), 1)
    mean = product + share * (mean - product)
    diagonal = jnp.maximum(mean, 2 * jnp.sqrt(share * variance)) + decay
    return plain.cg(mv, g, MOST, RTOL, 1 / diagonal)


def pcg_estimated(config: Config, seed: int) -> Row:
    """CG to 1e-6 on Gauss–Newton of any model, with its diagonal estimated."""
    columns = _preconditioned_columns(plain.hypergradient(outer, inner, _estimated_by_hand), model)
    return _row("w1_pcg_estimated", "diagonal estimated, to 1e-6", config, seed, columns=columns)


def pcg_decaying(config: Config, seed: int) -> Row:
    """The same where the spectrum of the features decays."""
    columns = _preconditioned_columns(plain.hypergradient(outer, inner, _estimated_by_hand), model)
    title = "diagonal estimated, decaying features, to 1e-6"
    return _row("w1_pcg_decaying", title, config, seed, decaying=True, columns=columns)


def pcg_exact(config: Config, seed: int) -> Row:
    """CG to 1e-6 with the exact diagonal and products that know the model is linear."""

    def solve(g: Any, w: Any, lam: Any, batch: Any, key: Any) -> Any:
        x, y = batch
        p = jax.nn.softmax(x @ w)
        decay = jnp.exp(lam)
        # Thin X'U reads X across its rows; the transpose stored once is read along them. The
        # barrier keeps XLA from folding it back into every product.
        across = jax.lax.optimization_barrier(x.T)

        def mv(v: jax.Array) -> jax.Array:
            z = p * (x @ v)
            return across @ (z - p * jnp.sum(z, -1, keepdims=True)) / len(y) + decay * v

        diagonal = (across * across) @ (p * (1 - p)) / len(y) + decay
        return plain.cg(mv, g, MOST, RTOL, 1 / diagonal)

    columns = _preconditioned_columns(
        plain.hypergradient(outer, inner, solve), bilevel.LinearModel(features)
    )
    solver = bilevel.CG(max_steps=MOST, rtol=RTOL, preconditioner=bilevel.Diagonal())
    thin = bilevel.LinearModel(features, store_transpose=False)
    title = "diagonal exact, linear model, to 1e-6"
    return _row(
        "w1_pcg_exact",
        title,
        config,
        seed,
        columns=columns,
        extras={"one_layout": _bilevel(solver, _operator(thin))},
    )


ROWS = {
    "w1_cg_fixed": cg_fixed,
    "w1_cg_tolerance": cg_tolerance,
    "w1_pcg_estimated": pcg_estimated,
    "w1_pcg_decaying": pcg_decaying,
    "w1_pcg_exact": pcg_exact,
}
