"""Denoising problems of `maid`: total variation, and fields of experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from experiments.common import data
from experiments.maid.config import Config

MARGIN = 4
"""Pixels at the edges that are denoised and not measured: too few filters reach them."""

Penalty = Callable[[Any, Any], Any]


class Pairs(NamedTuple):
    """Clean images and what noise made of them, in float64."""

    clean: jax.Array
    noisy: jax.Array


def load(config: Config, seed: int) -> tuple[Pairs, Pairs]:
    """Images to tune on, drawn from Berkeley's, and the Kodak images, the same for every seed.

    The noise is drawn anew for each seed.
    """
    rng = np.random.default_rng(seed)
    berkeley = data.load_npz("images/bsd_train64_180x180_gray.npz")["image"]
    drawn = berkeley[rng.permutation(len(berkeley))[: config.images]]
    kodak = data.load_npz("images/kodak24_gray_center256.npz")["image"][: config.tested]
    return _noisy(drawn, config.side, config, rng), _noisy(kodak, config.tested_side, config, rng)


def _noisy(images: np.ndarray, side: int, config: Config, rng: np.random.Generator) -> Pairs:
    first, side = (images.shape[1] - side) // 2 - MARGIN, side + 2 * MARGIN
    rows = slice(first, first + side)
    clean = images[:, rows, rows].astype(np.float64) / 255
    noise = config.noise * rng.standard_normal(clean.shape)
    return Pairs(jnp.asarray(clean), jnp.asarray(clean + noise))


def measured(x: Any) -> Any:
    """Images without their edges."""
    return x[:, MARGIN:-MARGIN, MARGIN:-MARGIN]


def decibels(x: Any, clean: Any) -> Any:
    """Peak signal to noise ratio of every image."""
    return -10 * jnp.log10(jnp.mean(measured(x - clean) ** 2, axis=(1, 2)))


def outer(x: Any, theta: Any, batch: Pairs) -> Any:
    """Half the sum of squared errors, of pixels that are measured."""
    return 0.5 * jnp.sum(measured(x - batch.clean) ** 2)


def inner_of(penalty: Penalty) -> Callable[..., Any]:
    """Half the squared distance to the noisy images and a convex penalty: strongly convex by 1."""

    def inner(x: Any, theta: Any, batch: Pairs) -> Any:
        return 0.5 * jnp.sum((x - batch.noisy) ** 2) + penalty(x, theta)

    return inner


# Total variation: two numbers.


def variation(x: Any, theta: Any) -> Any:
    r""":math:`e^{\theta_0} \sum \sqrt{|\nabla x|^2 + e^{2\theta_1}}`: smoothed total variation."""
    down = jnp.diff(x, axis=1, append=x[:, -1:])
    right = jnp.diff(x, axis=2, append=x[:, :, -1:])
    return jnp.exp(theta[0]) * jnp.sum(jnp.sqrt(down**2 + right**2 + jnp.exp(2 * theta[1])))


def variation_start(config: Config) -> jax.Array:
    """Logarithms of weight and smoothing: hardly any penalty."""
    return jnp.array([config.weight, config.smoothing])


def variation_smoothness(x: Any, theta: Any) -> Any:
    """The gradient of images has norm sqrt(8), and the root a curvature of one over smoothing."""
    return 1 + 8 * jnp.exp(theta[0] - theta[1])


def variation_mixed(x: Any, theta: Any) -> Any:
    """The norm of the derivative of the gradient in both numbers, by two products."""

    def image(direction: Any) -> Any:
        gradient = lambda t: jax.grad(variation)(x, t)  # noqa: E731
        return jnp.sum(jax.jvp(gradient, (theta,), (direction,))[1] ** 2)

    return jnp.sqrt(image(jnp.array([1.0, 0.0])) + image(jnp.array([0.0, 1.0])))


# Fields of experts: small filters, each with a weight and a smoothing, all of them tuned.

SIZE = 5


def experts_start(config: Config) -> dict[str, jax.Array]:
    """The cosine transform's filters but the constant one, all with equal weights."""
    k = np.arange(SIZE)
    basis = np.cos(np.pi * np.outer(k, k + 0.5) / SIZE) * np.sqrt(2 / SIZE)
    basis[0] /= np.sqrt(2)
    filters = np.einsum("ai,bj->abij", basis, basis).reshape(-1, SIZE * SIZE)[1:]
    each = jnp.ones(len(filters))
    return {
        "filters": jnp.asarray(filters) / config.unit,
        "smoothing": config.smoothing * each,
        "weight": config.weight * each,
    }


def scaled(theta: Any, config: Config) -> tuple[Any, Any, Any]:
    """Filters, smoothings and weights from what is tuned, which moves by numbers of one order."""
    return theta["filters"] * config.unit, jnp.exp(theta["smoothing"]), jnp.exp(theta["weight"])


def patches(x: Any) -> Any:
    """All 5 x 5 patches as columns; products with them are many times faster than convolutions."""
    n, h, w = x.shape[0], x.shape[1] - SIZE + 1, x.shape[2] - SIZE + 1
    shifts = [x[:, i : i + h, j : j + w] for i in range(SIZE) for j in range(SIZE)]
    return jnp.stack([shift.reshape(n * h * w) for shift in shifts])


def experts_of(config: Config) -> Penalty:
    r""":math:`\sum_k w_k \sum (\sqrt{(c_k * x)^2 + \nu_k^2} - \nu_k)`, where filters fit in."""

    def experts(x: Any, theta: Any) -> Any:
        filters, smoothing, weight = scaled(theta, config)
        answers, smoothing = filters @ patches(x), smoothing[:, None]
        return weight @ jnp.sum(jnp.sqrt(answers**2 + smoothing**2) - smoothing, axis=1)

    return experts


def spectra(filters: Any, shape: tuple[int, ...]) -> Any:
    """Squared sizes of the filters' frequencies on the periodic image, of which ours is a part."""
    square = filters.reshape(-1, SIZE, SIZE)
    return jnp.abs(jnp.fft.rfft2(square, s=shape[1:])) ** 2


def experts_smoothness_of(config: Config) -> Callable[[Any, Any], Any]:
    """The largest curvature: the sum of squared frequencies, weighed by weight over smoothing."""

    def smoothness(x: Any, theta: Any) -> Any:
        filters, smoothing, weight = scaled(theta, config)
        return 1 + jnp.max(jnp.tensordot(weight / smoothing, spectra(filters, x.shape), 1))

    return smoothness


def experts_mixed_of(config: Config) -> Callable[[Any, Any], Any]:
    """A bound on the mixed derivative, from one for each filter's weight, smoothing and entries."""

    def mixed(x: Any, theta: Any) -> Any:
        filters, smoothing, weight = scaled(theta, config)
        seen = patches(x)
        answers, smoothing = filters @ seen, smoothing[:, None]
        root = jnp.sqrt(answers**2 + smoothing**2)
        slope, bend = answers / root, smoothing**2 / root**3
        norm = jnp.sqrt(jnp.max(spectra(filters, x.shape), axis=(1, 2)))

        def length(y: Any) -> Any:
            return jnp.sqrt(jnp.sum(y**2, axis=1))

        of_weight = norm * length(slope)
        of_smoothing = norm * length(answers * smoothing**2 / root**3)
        # A filter of length one has no frequency above SIZE.
        near = jnp.sqrt(jnp.sum(seen**2, axis=0))
        of_filter = config.unit * (SIZE * length(slope) + norm * length(bend * near[None]))
        total = of_weight**2 + of_smoothing**2 + of_filter**2
        return jnp.sqrt(jnp.sum(weight**2 * total))

    return mixed


def certificate(mixed: Callable[[Any, Any], Any]) -> bilevel.Certificate:
    """Both losses are squares, of curvature one; the penalty's third derivatives are left out."""
    return bilevel.Certificate(1.0, 1.0, mixed)
