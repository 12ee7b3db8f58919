"""The problems of `maid`, each with what is known of its constants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import data
from experiments.maid.config import Config


class Task(NamedTuple):
    """A bilevel problem and where it starts; `test` measures parameters on the third part."""

    outer: Callable[..., Any]
    inner: Callable[..., Any]
    certificate: bilevel.Certificate
    params: Any
    hparams: Any
    train: Any
    valid: Any
    test: Callable[[Any, Any], dict[str, Any]]


def load(name: str, config: Config, seed: int) -> Task:
    """One problem, in float64: certificates of a thousandth leave float32 no digits."""
    return {"quadratic": quadratic, "multinomial": multinomial, "denoise": denoise}[name](
        config, seed
    )


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

    def test(x: Any, t: Any) -> dict[str, Any]:
        value = 0.5 * np.sum((a1 @ pseudo @ (b2 - lower[1] @ np.asarray(t)) - b1) ** 2)
        return {"above_optimum": value - optimum}

    certificate = bilevel.Certificate(
        float(np.linalg.eigvalsh(a2.T @ a2)[0]),
        float(np.linalg.norm(a1, 2) ** 2),
        float(np.linalg.norm(a2.T @ lower[1], 2)),
    )
    zeros = jnp.zeros(m)
    train, valid = (jax.tree.map(jnp.asarray, part) for part in (lower, upper))
    return Task(outer, inner, certificate, zeros, zeros, train, valid, test)


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
    w = jnp.zeros((144, 10))
    return Task(outer, inner, certificate, w, jnp.full_like(w, -3.0), train, valid, test)


def _twelve(images: np.ndarray) -> jax.Array:
    """The inner 24 x 24 pixels, in means of two by two."""
    inner = np.asarray(images, np.float64).reshape(-1, 28, 28)[:, 2:26, 2:26]
    return jnp.asarray(inner.reshape(-1, 12, 2, 12, 2).mean((2, 4)).reshape(-1, 144))


def variation(x: Any, theta: Any) -> Any:
    r""":math:`e^{\theta_0} \sum \sqrt{|\nabla x|^2 + e^{2\theta_1}}`: smoothed total variation."""
    down = jnp.diff(x, axis=1, append=x[:, -1:])
    right = jnp.diff(x, axis=2, append=x[:, :, -1:])
    return jnp.exp(theta[0]) * jnp.sum(jnp.sqrt(down**2 + right**2 + jnp.exp(2 * theta[1])))


def denoise(config: Config, seed: int) -> Task:
    """Kodak images with noise, by total variation; its weight and its smoothing are tuned.

    The Lipschitz constants of the penalty's derivatives are of the order of one over the smoothing
    squared, useless: those terms, of second order, are left out of the bound of the hypergradient.
    The certificate of a decrease does not need them.
    """
    clean, noisy = images(config, seed)
    n = config.images

    def inner(x: Any, theta: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum((x - batch["noisy"]) ** 2) + variation(x, theta)

    def outer(x: Any, theta: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum((x - batch["clean"]) ** 2)

    def mixed_norm(x: Any, theta: Any) -> Any:
        def image(direction: Any) -> Any:
            gradient = lambda t: jax.grad(variation)(x, t)  # noqa: E731
            return jnp.sum(jax.jvp(gradient, (theta,), (direction,))[1] ** 2)

        return jnp.sqrt(image(jnp.array([1.0, 0.0])) + image(jnp.array([0.0, 1.0])))

    solve = jax.jit(lambda x, theta, batch: bilevel.minimize(inner, x, theta, batch, tol=1e-3))

    def test(x: Any, theta: Any) -> dict[str, Any]:
        batch = {"noisy": noisy[n:], "clean": clean[n:]}
        found = solve(batch["noisy"], theta, batch).params
        return {
            "psnr": decibels(x, clean[:n]),
            "noisy_psnr": decibels(noisy[n:], clean[n:]),
            "test_psnr": decibels(found, clean[n:]),
        }

    batch = {"noisy": noisy[:n], "clean": clean[:n]}
    start, theta = noisy[:n], jnp.array([-5.0, -5.0])
    certificate = bilevel.Certificate(1.0, 1.0, mixed_norm)
    return Task(outer, inner, certificate, start, theta, batch, batch, test)


def images(config: Config, seed: int) -> tuple[jax.Array, jax.Array]:
    """As many clean images to tune on as to test on, and what noise makes of them."""
    stored = data.load_npz("images/kodak24_gray_center256.npz")["image"]
    chosen = np.random.default_rng(seed).permutation(len(stored))[: 2 * config.images]
    clean = stored[chosen, : config.side, : config.side].astype(np.float64) / 255
    noise = np.random.default_rng(seed + 1).standard_normal(clean.shape)
    return jnp.asarray(clean), jnp.asarray(clean + config.noise * noise)


def decibels(x: jax.Array, clean: jax.Array) -> jax.Array:
    """Peak signal to noise ratio, the mean over images."""
    return jnp.mean(-10 * jnp.log10(jnp.mean((x - clean) ** 2, axis=(1, 2))))
