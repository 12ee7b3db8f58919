r"""Cutout: square holes in images, with a sampled number and length of holes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Key
from bilevel.ground.keys import require_key
from bilevel.ground.settings import check_count, check_real, concrete
from bilevel.regularizers.strength import floating, real_dtype, strengths


def cutout_mask(
    key: Key,
    shape: tuple[int, int, int],
    holes: jax.Array | float,
    length: jax.Array | float,
    *,
    max_holes: int,
) -> jax.Array:
    """True where a pixel survives: ``(B, H, W)``. Arguments as :func:`cutout`.

    No pixel of an image survives whose traced number or length of holes is out of range.
    """
    keep, legal = _keep(key, shape, holes, length, max_holes)
    return keep & legal


def _keep(
    key: Key,
    shape: tuple[int, int, int],
    holes: jax.Array | float,
    length: jax.Array | float,
    max_holes: int,
) -> tuple[jax.Array, jax.Array]:
    """Where pixels survive, and which images have legal numbers: ``(B, H, W)``, ``(B, 1, 1)``."""
    require_key(key, "`cutout`")
    check_count("max_holes", max_holes)
    if not isinstance(shape, Sequence) or len(shape) != 3:
        raise ValueError(f"`shape` must be (B, H, W), got {shape!r}.")
    batch, height, width = shape
    like = jax.ShapeDtypeStruct((batch,), jnp.float32)
    # Neither has a derivative. Cut, so that a response can tell that nothing flows here.
    holes, length = jax.lax.stop_gradient(
        (
            strengths("holes", holes, like, 0.0, max_holes + 1.0, open_high=True),
            strengths("length", length, like),
        )
    )
    legal = jnp.broadcast_to(jnp.isfinite(holes) & jnp.isfinite(length), (batch,))
    holes, length = jnp.floor(holes)[:, None], jnp.floor(length)[:, None]
    rows, columns = jax.random.split(key)
    rows = jax.random.randint(rows, (batch, max_holes), 0, height)
    columns = jax.random.randint(columns, (batch, max_holes), 0, width)
    used = jnp.arange(max_holes)[None, :] < holes

    def inside(centre: jax.Array, size: int) -> jax.Array:
        # floor(c - L/2) <= pixel < floor(c + L/2): L pixels for even and odd L alike.
        pixel = jnp.arange(size)[None, None, :]
        low = jnp.floor(centre - length / 2)[..., None]
        high = jnp.floor(centre + length / 2)[..., None]
        return (pixel >= low) & (pixel < high)

    in_rows = inside(rows, height) & used[..., None]
    in_columns = inside(columns, width)
    # Holes are summed one axis at a time: (B, holes, H) x (B, holes, W) -> (B, H, W).
    covered = jnp.einsum(
        "bjh,bjw->bhw", in_rows.astype(jnp.float32), in_columns.astype(jnp.float32)
    )
    return covered < 0.5, legal[:, None, None]


def cutout(
    key: Key,
    images: jax.Array,
    holes: jax.Array | float,
    length: jax.Array | float,
    *,
    max_holes: int,
    fill: jax.Array | float = 0.0,
) -> jax.Array:
    r"""Square holes with uniform centres, a number and a side length an image.

    Image :math:`i` gets :math:`⌊n_i⌋` holes :math:`[c - L_i/2, c + L_i/2)` with
    :math:`L_i = ⌊ℓ_i⌋`, each around its own uniformly drawn pixel and clipped
    to the image. Neither number has a derivative: they are tuned through a best response,
    which samples them over several integers.

    Args:
      key: a PRNG key.
      images: ``(B, H, W, C)``, floating-point; apply after normalization for ``fill=0`` to be the
        mean.
      holes: number of holes, a scalar or ``(B,)``, real (the floor is taken), traced or not.
      length: side in pixels, a scalar or ``(B,)``, real (the floor is taken).
      max_holes: how many centres are drawn (static); more holes than that are not made.
      fill: value inside the holes, a number or ``(C,)``.

    Returns:
      The shape and dtype of ``images``; NaN in the images whose traced number or length of holes
      is out of range.

    Raises:
      TypeError: integer images, or a `key` that is not a PRNG key.
      ValueError: a known number of holes outside ``[0, max_holes + 1)`` or a negative length.

    Cost: ``max_holes`` masked rows and columns an image, no loop.

    Reference: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with
    Cutout", 2017.
    """
    images = floating("images", images, 4, "(B, H, W, C)")
    if images.ndim != 4:
        raise ValueError(f"`images` must be (B, H, W, C), got shape {images.shape}.")
    batch, height, width, channels = images.shape
    keep, legal = _keep(key, (batch, height, width), holes, length, max_holes)
    out = jnp.where(keep[..., None], images, _fill(fill, channels, images.dtype))
    return jnp.where(legal[..., None], out, jnp.nan)


def _fill(fill: jax.Array | float, channels: int, dtype: np.dtype) -> jax.Array:
    real_dtype("fill", fill)
    if np.shape(fill) not in ((), (channels,)):
        raise ValueError(
            f"`fill` has shape {np.shape(fill)}, expected a number or one per channel: "
            f"({channels},)."
        )
    check_real("fill", fill)
    if concrete(fill):
        with np.errstate(over="ignore"):
            check_real("fill", np.asarray(fill).astype(dtype), hint=f" {fill} is beyond {dtype}.")
    return jnp.asarray(fill, dtype).reshape((1, 1, 1, -1))
