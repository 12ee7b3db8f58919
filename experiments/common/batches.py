"""Batches drawn on the device, inside a compiled run."""

from typing import Any

import jax


def draw(part: Any, key: jax.Array, shape: tuple[int, ...]) -> Any:
    """Examples of ``part`` drawn with replacement, with the leading axes ``shape``.

    Every leaf of ``part`` has one row per example: leaves ``(n, ...)`` give ``(*shape, ...)``.
    """
    index = jax.random.randint(key, shape, 0, len(jax.tree.leaves(part)[0]))
    return jax.tree.map(lambda rows: rows[index], part)
