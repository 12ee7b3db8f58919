r"""Type aliases: the vocabulary of the library.

================  ==========================================================================
``Params``        the inner variable :math:`w`: any pytree of real floating-point arrays
``Hparams``       the outer variable :math:`λ`: any pytree of real floating-point arrays
``Batch``         whatever a loss reads besides the two: any pytree (data, a PRNG key, ...)
``ModelState``    mutable statistics of a model (batch norm): any pytree
``Vector``        a pytree shaped like ``Params``: gradients, directions, solutions of a solve
``Loss``          ``loss(params, hparams, batch) -> scalar``
``Stats``         a flat dictionary of scalar arrays
================  ==========================================================================

``n`` is the number of inner parameters and ``p`` the number of hyperparameters throughout.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

Params: TypeAlias = Any
Hparams: TypeAlias = Any
Batch: TypeAlias = Any
ModelState: TypeAlias = Any
Vector: TypeAlias = Any
Key: TypeAlias = jax.Array
Scalar: TypeAlias = jax.Array
Loss: TypeAlias = Callable[..., Any]
MatVec: TypeAlias = Callable[[Vector], Vector]
Stats: TypeAlias = dict[str, jax.Array]
