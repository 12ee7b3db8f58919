"""What the CNN experiments of the Self-Tuning Networks paper share.

Their configs have ``channels``, ``dense``, ``max_holes`` and ``max_length``.
"""

from typing import Any

import jax
import jax.numpy as jnp

import bilevel

JITTER = ("brightness", "contrast", "saturation", "hue")
CUTOUT = ("cutout_holes", "cutout_length")


def dropouts(config: Any) -> tuple[str, ...]:
    """One after each convolution, one before each hidden dense layer, and one on the input."""
    convolutions = tuple(f"conv_dropout_{i}" for i in range(len(config.channels)))
    dense = tuple(f"dense_dropout_{i}" for i in range(len(config.dense)))
    return (*convolutions, *dense, "input_dropout")


def names(config: Any) -> tuple[str, ...]:
    """All that is tuned: fifteen, with five convolutions and two hidden dense layers."""
    return (*dropouts(config), *JITTER, "input_scaling", *CUTOUT)


def space(config: Any) -> bilevel.Space:
    """The ranges of the paper's CNN; whole numbers for the holes and their side."""
    bounds: dict[str, Any] = {name: bilevel.Interval(0.0, 0.9) for name in dropouts(config)}
    bounds |= {name: bilevel.Interval(0.0, 1.0) for name in JITTER[:3]}
    bounds |= {"hue": bilevel.Interval(0.0, 0.5), "input_scaling": bilevel.Interval(0.0, 0.3)}
    bounds["cutout_holes"] = bilevel.Integer(0, config.max_holes)
    bounds["cutout_length"] = bilevel.Integer(0, config.max_length)
    return bilevel.Space(bounds)


def with_scale(state: Any, scale: Any) -> Any:
    """A self-tuning state whose perturbations all have this width (which may be traced)."""
    raw = jnp.log(jnp.expm1(scale))
    widths = state.moved.widths
    widths = widths._replace(hparams=jax.tree.map(lambda s: jnp.full_like(s, raw), widths.hparams))
    return state._replace(moved=state.moved._replace(widths=widths))


def distributions(config: Any, part: float = 1.0) -> dict[str, Any]:
    """For a search: uniform in the lower ``part`` of every range; whole numbers from all of it."""
    from optuna.distributions import IntDistribution

    found: dict[str, Any] = {}
    for name, bound in space(config).bounds.items():
        if name in CUTOUT:
            found[name] = IntDistribution(int(bound.lo), int(bound.hi))
        else:
            found[name] = (float(bound.lo), float(bound.hi) * part * (1 - 1e-6))
    return found


def start(config: Any) -> dict[str, jax.Array]:
    """Where tuning starts, and what is fixed without it: 0.05, and one hole of four pixels."""
    values = dict.fromkeys(names(config), 0.05) | {"cutout_holes": 1.0, "cutout_length": 4.0}
    return {name: jnp.float32(value) for name, value in values.items()}


def pool(x: jax.Array) -> jax.Array:
    """Largest of every 2 x 2 pixels; an odd last row and column are left out.

    Pairs are compared and not reduced: the gradient of a reduction divides by the number of
    elements that equal the maximum, and XLA may round these anew, so that none does (0 / 0).
    """
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    rows = x[:, : 2 * height, : 2 * width].reshape(batch, height, 2, 2 * width, channels)
    rows = jnp.where(rows[:, :, 0] > rows[:, :, 1], rows[:, :, 0], rows[:, :, 1])
    pairs = rows.reshape(batch, height, width, 2, channels)
    return jnp.where(pairs[:, :, :, 0] > pairs[:, :, :, 1], pairs[:, :, :, 0], pairs[:, :, :, 1])
