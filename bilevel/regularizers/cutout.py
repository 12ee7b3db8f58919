r"""Cutout: square holes in images, with a sampled number and length of holes."""

import jax
import jax.numpy as jnp

from bilevel.aliases import Key
from bilevel.regularizers.strength import along_examples, check_strength
from bilevel.settings import check_count


def cutout_mask(
    key: Key,
    shape: tuple[int, int, int],
    holes: jax.Array | float,
    length: jax.Array | float,
    *,
    max_holes: int,
) -> jax.Array:
    """True where a pixel survives: ``(B, H, W)``. Arguments as :func:`cutout`."""
    check_count("max_holes", max_holes)
    check_strength("holes", holes, 0.0, max_holes + 1.0, open_high=True)
    check_strength("length", length)
    batch, height, width = shape
    like = jax.ShapeDtypeStruct((batch, max_holes), jnp.float32)
    holes = jnp.floor(along_examples("holes", holes, like))
    length = jnp.floor(along_examples("length", length, like))
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
    return covered < 0.5


def cutout(
    key: Key,
    images: jax.Array,
    holes: jax.Array | float,
    length: jax.Array | float,
    *,
    max_holes: int,
    fill: float = 0.0,
) -> jax.Array:
    r"""Square holes with uniform centres, a number and a side length an image.

    Image :math:`i` gets :math:`\lfloor n_i \rfloor` holes :math:`[c - L_i/2, c + L_i/2)` with
    :math:`L_i = \lfloor \ell_i \rfloor`, each around its own uniformly drawn pixel and clipped
    to the image. Neither number has a derivative: they are tuned through a best response,
    which samples them over several integers.

    Args:
      key: a PRNG key.
      images: ``(B, H, W, C)``; apply after normalisation for ``fill=0`` to be the mean.
      holes: number of holes, a scalar or ``(B,)``, real (the floor is taken), traced or not.
      length: side in pixels, a scalar or ``(B,)``, real (the floor is taken).
      max_holes: how many centres are drawn (static); more holes than that are not made.
      fill: value inside the holes.

    Raises:
      ValueError: a known number of holes outside ``[0, max_holes + 1)`` or a negative length.

    Cost: ``max_holes`` masked rows and columns an image, no loop.

    Reference: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with
    Cutout", 2017.
    """
    if images.ndim != 4:
        raise ValueError(f"`images` must be (B, H, W, C), got shape {images.shape}.")
    batch, height, width, _ = images.shape
    keep = cutout_mask(key, (batch, height, width), holes, length, max_holes=max_holes)
    return jnp.where(keep[..., None], images, jnp.asarray(fill, images.dtype))
