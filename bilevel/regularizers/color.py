r"""Colour jitter as one 3 x 3 matrix per image."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Key
from bilevel.ground.keys import require_key
from bilevel.regularizers.strength import floating, strengths, widened

GRAY = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([GRAY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def color_jitter(
    key: Key,
    images: jax.Array,
    *,
    brightness: jax.Array | float = 0.0,
    contrast: jax.Array | float = 0.0,
    saturation: jax.Array | float = 0.0,
    hue: jax.Array | float = 0.0,
    clip: bool = True,
) -> jax.Array:
    r"""Random brightness, contrast, saturation and hue, in random order, an image at a time.

    With :math:`f ∼ U(max(0, 1-j), 1+j)` for each of the first three strengths :math:`j`,
    :math:`g(x)` the gray value of a pixel and :math:`θ ∼ U(-j, j)` turns for hue:

    =============  ================================================
    brightness     :math:`x ↦ f x`
    contrast       :math:`x ↦ f x + (1-f) mean(g)`
    saturation     :math:`x ↦ f x + (1-f) g(x)`
    hue            rotation of the chroma plane of YIQ by :math:`2πθ`
    =============  ================================================

    All four are affine, so an image needs one composed 3 x 3 matrix and offset however they
    are ordered. Two differences from the jitter of torchvision follow: hue turns in YIQ rather
    than in HSV, and values are clipped once, at the end, rather than after every operation.
    The result is differentiable in the strengths.

    Args:
      key: a PRNG key.
      images: ``(B, H, W, 3)``, floating-point with values in [0, 1] (before normalization).
      brightness, contrast, saturation: strengths, at least 0; a scalar or ``(B,)``.
      hue: in turns, within [0, 0.5]; a scalar or ``(B,)``.
      clip: whether to clip to [0, 1] at the end.

    Returns:
      The shape and dtype of ``images``, computed in at least float32; NaN in the images that
      have a traced strength out of range.

    Raises:
      TypeError: integer images, or a `key` that is not a PRNG key.
      ValueError: known strengths out of range, or images without three channels.

    Cost: nine multiplications a pixel, whatever the strengths.
    """
    require_key(key, "`color_jitter`")
    images = floating("images", images, 4, "(B, H, W, 3)")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"`images` must be (B, H, W, 3), got shape {images.shape}.")
    dtype, images = images.dtype, widened(images)
    batch = images.shape[0]
    like = jax.ShapeDtypeStruct((batch,), jnp.float32)
    draw_key, order_key = jax.random.split(key)
    uniform = jax.random.uniform(draw_key, (4, batch))

    def factor(name: str, strength: jax.Array | float, u: jax.Array) -> jax.Array:
        strength = strengths(name, strength, like)
        low = jnp.maximum(0.0, 1 - strength)
        return low + u * (1 + strength - low)

    f_bright = factor("brightness", brightness, uniform[0])
    f_contrast = factor("contrast", contrast, uniform[1])
    f_saturation = factor("saturation", saturation, uniform[2])
    angle = 2 * jnp.pi * strengths("hue", hue, like, 0.0, 0.5) * (2 * uniform[3] - 1)
    order = jnp.argsort(jax.random.uniform(order_key, (batch, 4)), axis=1)

    matrix, offset = jax.vmap(_compose)(
        order, f_bright, f_contrast, f_saturation, angle, jnp.mean(images, axis=(1, 2))
    )
    out = jnp.einsum("bhwc,bdc->bhwd", images, matrix.astype(images.dtype))
    out = out + offset.astype(images.dtype)[:, None, None, :]
    return (jnp.clip(out, 0, 1) if clip else out).astype(dtype)


def _compose(
    order: jax.Array,
    f_bright: jax.Array,
    f_contrast: jax.Array,
    f_saturation: jax.Array,
    angle: jax.Array,
    mean: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The matrix and offset of the four operations on one image, applied in ``order``."""
    dtype = jnp.result_type(f_bright, angle)
    eye, gray = jnp.eye(3, dtype=dtype), jnp.asarray(GRAY, dtype)
    to_gray = jnp.outer(jnp.ones(3, dtype), gray)
    c, s = jnp.cos(angle), jnp.sin(angle)
    one, zero = jnp.ones_like(c), jnp.zeros_like(c)
    turn = jnp.stack([one, zero, zero, zero, c, -s, zero, s, c]).reshape(3, 3)
    matrices = jnp.stack(
        [
            f_bright * eye,
            f_contrast * eye,
            f_saturation * eye + (1 - f_saturation) * to_gray,
            jnp.asarray(_FROM_YIQ, dtype) @ turn @ jnp.asarray(_TO_YIQ, dtype),
        ]
    )
    matrix, offset = eye, jnp.zeros(3, dtype)
    for position in range(4):
        step = matrices[order[position]]
        # Only contrast has an offset: it needs the mean gray of the image as it is by then.
        now = gray @ (matrix @ mean.astype(dtype) + offset)
        is_contrast = order[position] == 1
        shift = jnp.where(is_contrast, (1 - f_contrast) * now, 0)
        matrix, offset = step @ matrix, step @ offset + shift
    return matrix, offset
