"""The problems of `maid`, each with what is known of its constants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import data
from experiments.maid import images
from experiments.maid.config import Config

TESTED = 1e-3
"""Tolerance of the solves on held-out images: far less than a grey level, summed over pixels."""
SHOWN = (3, 6, 18, 22)
"""Which Kodak images are drawn."""


class Task(NamedTuple):
    """A bilevel problem and where it starts; `test` measures parameters on the third part.

    `smoothness` is the largest curvature of the inner loss, `first_step` the size of the first
    trial move, and `truth` the true value and hypergradient, where they are known. Decays are
    bounded: a weight without one leaves no strong convexity to certify anything with.
    """

    outer: Callable[..., Any]
    inner: Callable[..., Any]
    certificate: bilevel.Certificate
    params: Any
    hparams: Any
    train: Any
    valid: Any
    test: Callable[[Any, Any], dict[str, Any]]
    smoothness: Any
    first_step: float
    truth: Callable[[Any], tuple[float, np.ndarray]] | None = None
    constrain: bilevel.Space | None = None


def load(name: str, config: Config, seed: int) -> Task:
    """One problem, in float64: certificates of a thousandth leave float32 no digits."""
    makers = (quadratic, multinomial, variation, experts)
    return next(make for make in makers if make.__name__ == name)(config, seed)


def quadratic(config: Config, seed: int) -> Task:
    """Lower level |A2 x + A3 t - b2|^2 / 2, upper level |A1 x - b1|^2 / 2: all is known."""
    r, m = np.random.default_rng(seed), 10
    a1, a2, a3 = r.standard_normal((3, config.rows, m))
    b1 = a1 @ r.standard_normal(m) + 0.01 * r.standard_normal(config.rows)
    b2 = a2 @ r.standard_normal(m) + (a3 + a2) @ r.standard_normal(m)
    lower, upper = (a2, a3 + a2, b2), (a1, b1)

    def inner(x: Any, t: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum((batch[0] @ x + batch[1] @ t - batch[2]) ** 2)

    def outer(x: Any, t: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum((batch[0] @ x - batch[1]) ** 2)

    pseudo = np.linalg.solve(a2.T @ a2, a2.T)
    jacobian = -a1 @ pseudo @ lower[1]
    least = np.linalg.lstsq(jacobian, b1 - a1 @ pseudo @ b2, rcond=None)[1]
    optimum = 0.5 * float(least[0])

    def truth(t: Any) -> tuple[float, np.ndarray]:
        residual = a1 @ pseudo @ (b2 - lower[1] @ np.asarray(t)) - b1
        return 0.5 * float(residual @ residual), jacobian.T @ residual

    def test(x: Any, t: Any) -> dict[str, Any]:
        return {"above_optimum": truth(t)[0] - optimum, "optimum": optimum}

    certificate = bilevel.Certificate(
        float(np.linalg.eigvalsh(a2.T @ a2)[0]),
        float(np.linalg.norm(a1, 2) ** 2),
        float(np.linalg.norm(a2.T @ lower[1], 2)),
    )
    zeros = jnp.zeros(m)
    train, valid = (jax.tree.map(jnp.asarray, part) for part in (lower, upper))
    largest = float(np.linalg.norm(a2, 2) ** 2)
    return Task(outer, inner, certificate, zeros, zeros, train, valid, test, largest, 1.0, truth)


def multinomial(config: Config, seed: int) -> Task:
    """Softmax regression on MNIST at 12 x 12 pixels, a log penalty for each of 1440 weights."""
    count = config.examples
    sets = data.mnist(valid=count, seed=seed)
    chosen = np.random.default_rng(seed).permutation(len(sets.train.y))[:count]
    pick = (data.Split(sets.train.x[chosen], sets.train.y[chosen]), sets.valid, sets.test)
    train, valid, tested = ((_twelve(part.x), jnp.asarray(part.y)) for part in pick)

    def fit(w: Any, batch: Any) -> Any:
        logits = batch[0] @ w
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    def inner(w: Any, lam: Any, batch: Any) -> Any:
        return fit(w, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def outer(w: Any, lam: Any, batch: Any) -> Any:
        return fit(w, batch)

    def test(w: Any, lam: Any) -> dict[str, Any]:
        wrong = jnp.argmax(tested[0] @ w, -1) != tested[1]
        return {"test_loss": fit(w, tested), "test_error": jnp.mean(wrong)}

    # Of log-sum-exp: the second derivative is a variance, below |u|^2 / 2, and the third one of its
    # moments, below |u|^2 / 2 times sqrt(2) |v|.
    smooth = float(jnp.linalg.norm(valid[0], 2)) ** 2 / len(valid[1]) / 2
    third = float(jnp.mean(jnp.linalg.norm(train[0], axis=1) ** 3)) / 2**0.5
    certificate = bilevel.Certificate.of_log_decays(smooth, third)
    steepest = float(jnp.linalg.norm(train[0], 2)) ** 2 / len(train[1]) / 2
    w = jnp.zeros((144, 10))
    return Task(
        outer, inner, certificate, w, jnp.full_like(w, -3.0), train, valid, test,
        lambda w, lam: steepest + jnp.exp(jnp.max(lam)), config.first_decay,
        constrain=bilevel.Space(bilevel.Interval(config.least, config.most)),
    )  # fmt: skip


def _twelve(images: np.ndarray) -> jax.Array:
    """The inner 24 x 24 pixels, in means of two by two."""
    inner = np.asarray(images, np.float64).reshape(-1, 28, 28)[:, 2:26, 2:26]
    return jnp.asarray(inner.reshape(-1, 12, 2, 12, 2).mean((2, 4)).reshape(-1, 144))


def variation(config: Config, seed: int) -> Task:
    """Images with noise, by total variation; its weight and its smoothing are tuned."""
    return _denoising(
        images.variation,
        images.variation_mixed,
        images.variation_smoothness,
        images.variation_start(config),
        config,
        seed,
    )


def experts(config: Config, seed: int) -> Task:
    """The same images, by filters whose entries, weights and smoothings are tuned."""
    return _denoising(
        images.experts_of(config),
        images.experts_mixed_of(config),
        images.experts_smoothness_of(config),
        images.experts_start(config),
        config,
        seed,
    )


def _denoising(
    penalty: images.Penalty, mixed: Any, smoothness: Any, theta: Any, config: Config, seed: int
) -> Task:
    """The Lipschitz constants of a penalty's derivatives are of one over the smoothing squared.

    Nothing can be certified with them: these terms, of second order, are left out of the bound of
    the hypergradient. The certificate of a decrease does not need them.
    """
    tuned, tested = images.load(config, seed)
    inner = images.inner_of(penalty)
    shown = [i for i in SHOWN if i < config.tested] or [0]
    solve = jax.jit(lambda theta: bilevel.minimize(inner, tested.noisy, theta, tested, tol=TESTED))

    def test(x: Any, theta: Any) -> dict[str, Any]:
        found = solve(theta).params
        after, before = (images.decibels(y, tested.clean) for y in (found, tested.noisy))
        return {
            "psnr": jnp.mean(images.decibels(x, tuned.clean)),
            "test_psnr": jnp.mean(after),
            "noisy_psnr": jnp.mean(before),
            "test_psnrs": after,
            "noisy_psnrs": before,
            # Of a few images: clean, noisy, denoised.
            "pictures": jnp.stack([tested.clean, tested.noisy, found])[:, np.array(shown)],
        }

    certificate = images.certificate(mixed)
    count = sum(leaf.size for leaf in jax.tree.leaves(theta))
    return Task(
        images.outer, inner, certificate, tuned.noisy, theta, tuned, tuned, test, smoothness,
        config.first_move / count**0.5,
    )  # fmt: skip
