"""Random keys of JAX, as an argument ``key``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Key


def check_key(key: Any) -> None:
    """Refuse what is not one PRNG key, typed or raw; ``None`` passes."""
    if key is None:
        return
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == np.uint32 and np.ndim(key) > 0 and np.shape(key)[-1] in (2, 4)
    if not (raw or typed):
        raise TypeError(
            f"`key` must be a JAX random key, got {key!r} of type {type(key).__name__}: pass "
            "`key=jax.random.key(0)`."
        )
    if np.ndim(key) != (0 if typed else 1):
        raise ValueError(
            f"`key` has shape {np.shape(key)}, expected one key: pass one of them, or map over "
            "several with `jax.vmap`."
        )


def require_key(key: Key | None, who: str) -> Key:
    """Refuse a missing key where randomness is needed."""
    if key is None:
        raise ValueError(
            f"`key` is missing: {who} draws random numbers. Pass `key=jax.random.key(...)`."
        )
    check_key(key)
    return key
