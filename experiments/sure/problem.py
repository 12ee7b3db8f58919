"""The denoisers of `sure`: minimizers of a distance to the noisy image plus smoothed penalties."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data
from experiments.sure.config import Config


class Images(NamedTuple):
    """Crops, (count, side, side): as they are, and with noise."""

    clean: jax.Array
    noisy: jax.Array


def images(config: Config, seed: int) -> tuple[Images, Images]:
    """Crops to tune on and to judge on, of different images, with the noise of one seed."""
    draw = np.random.default_rng(seed)
    photos = _bundled() if config.source == "bundled" else _published()
    parts = []
    for pool, count in zip(photos, (config.train, config.test), strict=True):
        chosen = draw.permutation(np.arange(max(count, len(pool))) % len(pool))[:count]
        clean = np.stack([_crop(pool[i], config.crop, draw) for i in chosen])
        noisy = clean + config.sigma * draw.normal(size=clean.shape)
        parts.append(Images(jnp.asarray(clean, jnp.float32), jnp.asarray(noisy, jnp.float32)))
    return parts[0], parts[1]


def _published() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """64 images of the Berkeley data set, and the 24 of Kodak."""
    train = data.load_npz("images/bsd_train64_180x180_gray.npz")["image"]
    test = data.load_npz("images/kodak24_gray_center256.npz")["image"]
    return list(train / 255.0), list(test / 255.0)


def _bundled() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The two photos that come with scikit-learn."""
    from sklearn.datasets import load_sample_image

    china, flower = (load_sample_image(name).mean(-1) / 255 for name in ("china.jpg", "flower.jpg"))
    return [china], [flower]


def _crop(photo: np.ndarray, side: int, draw: np.random.Generator) -> np.ndarray:
    top, left = (int(draw.integers(0, size - side + 1)) for size in photo.shape)
    return photo[top : top + side, left : left + side]


def hparams(model: str, config: Config) -> Any:
    """First logarithms of strengths, and of the widths below which a penalty is quadratic."""
    strength, width = np.log(config.sigma / 2), np.log(config.sigma / 10)
    if model == "quadratic":
        return {"strength": jnp.zeros(())}
    if model == "tv":
        return {"strength": jnp.float32(strength), "width": jnp.float32(width)}
    count = len(filters())
    return {
        "strength": jnp.full(count, np.log(config.sigma / count), jnp.float32),
        "width": jnp.full(count, width, jnp.float32),
    }


@functools.cache
def filters() -> np.ndarray:
    """The 24 filters of a 5 x 5 cosine transform without its mean, of norm 1."""
    n = np.arange(5)
    basis = np.cos(np.pi * n[:, None] * (2 * n[None] + 1) / 10)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    return np.einsum("ai,bj->abij", basis, basis).reshape(25, 5, 5)[1:].astype(np.float32)


def smoothed(t2: jax.Array, log_width: jax.Array) -> jax.Array:
    r""":math:`\sqrt{t^2 + \nu^2} - \nu`: the absolute value, quadratic below the width."""
    width = jnp.exp(log_width)
    return jnp.sqrt(t2 + width**2) - width


def loss(model: str) -> Any:
    """The inner loss, `loss(images, hparams, noisy)`."""
    penalty = {"quadratic": _quadratic, "tv": _total_variation, "filters": _filtered}[model]

    def inner(u: jax.Array, lam: Any, noisy: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((u - noisy) ** 2) + penalty(u, lam)

    return inner


def _differences(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Forward differences, zero at the far edges."""
    down = jnp.pad(jnp.diff(u, axis=1), ((0, 0), (0, 1), (0, 0)))
    right = jnp.pad(jnp.diff(u, axis=2), ((0, 0), (0, 0), (0, 1)))
    return down, right


def _quadratic(u: jax.Array, lam: Any) -> jax.Array:
    down, right = _differences(u)
    return 0.5 * jnp.exp(lam["strength"]) * jnp.sum(down**2 + right**2)


def _total_variation(u: jax.Array, lam: Any) -> jax.Array:
    down, right = _differences(u)
    return jnp.exp(lam["strength"]) * jnp.sum(smoothed(down**2 + right**2, lam["width"]))


def _filtered(u: jax.Array, lam: Any) -> jax.Array:
    # A product with patches: loops over products with convolutions are slow on CPU.
    # Mirrored edges: a zero edge would be one more thing to fit.
    _, rows, columns = u.shape
    wide = jnp.pad(u, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    views = [wide[:, a : a + rows, b : b + columns] for a in range(5) for b in range(5)]
    kernels = jnp.asarray(filters().reshape(-1, 25).T, u.dtype)
    answers = jnp.stack(views, -1) @ kernels
    sums = jnp.sum(smoothed(answers**2, lam["width"][None, None, None]), axis=(0, 1, 2))
    return jnp.sum(jnp.exp(lam["strength"]) * sums)


def predict(u: jax.Array, lam: Any, noisy: jax.Array) -> jax.Array:
    """The denoised images are the inner variable."""
    return u


def true_risk(u: jax.Array, lam: Any, clean: jax.Array) -> jax.Array:
    """What SURE estimates, of images that nobody has but us."""
    return jnp.sum((u - clean) ** 2)
