r"""What an outer loop is: three pure functions, shaped like an optax transformation.

.. code-block:: python

    state = algorithm.init(params, hparams)
    new, info = algorithm.step(state, inner_batches=..., outer_batch=..., key=...)
    params = algorithm.deploy(new, state.hparams)

``state`` is a NamedTuple of arrays with at least ``params``, ``hparams`` (what the losses
read), ``model_state`` and ``step`` (int32, updates made); ``info`` is a NamedTuple of arrays
with at least ``value`` and ``hparams``. ``info.value`` is the outer loss at the pair
``(deploy(new, info.hparams), info.hparams)``, where ``info.hparams`` are those of ``state``, before
their update. That is all :func:`~bilevel.fit` knows of any algorithm.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.aliases import Hparams, Params
from bilevel.checks import dtype_of
from bilevel.tree import paths


def own_params(state: Any, hparams: Hparams | None = None) -> Params:
    """``state.params``: what a loop deploys whose parameters serve any hyperparameters."""
    return state.params


class Algorithm(NamedTuple):
    """An outer loop.

    Attributes:
      init: ``init(params, hparams, model_state=None) -> state``.
      step: ``step(state, *, inner_batches, outer_batch, key=None, ...) -> (state, info)``;
        traced once: ``jax.jit(algorithm.step, donate_argnums=0)``.
      deploy: ``deploy(state, hparams=None) -> params``, the parameters for the losses at
        ``hparams`` (the state's own if ``None``). With the hyperparameters from before the step
        that returned ``state``, they are the parameters that step's ``info.value`` belongs to.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any]]
    deploy: Callable[..., Params] = own_params


def own(tree: Any) -> Any:
    """A copy of every leaf as a strongly typed array, so that donating it harms nobody else's."""

    def leaf(x: Any) -> jax.Array:
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jnp.copy(x)
        return jnp.array(x, dtype=dtype, copy=True)

    return jax.tree.map(leaf, tree)


def check_model_state(has_state: bool, model_state: Any) -> None:
    """Refuse to begin without the statistics that ``has_state`` promises."""
    if has_state and model_state is None:
        raise ValueError(
            "`has_state=True` needs the first statistics: pass `init(params, hparams, "
            "model_state)`."
        )


def check_state(state: Any, expected: type) -> None:
    """Refuse what is not the state of this loop."""
    if not isinstance(state, expected):
        raise TypeError(
            f"`state` must be what `init` returns, a {expected.__name__}, got "
            f"{type(state).__name__}."
        )


def check_arrays(state: Any) -> None:
    """Refuse a state with leaves that are no arrays."""
    for path, leaf in paths(state, "state"):
        try:
            dtype_of(leaf)
        except TypeError:
            raise TypeError(
                f"{path} is a {type(leaf).__name__}, but `state` must be what `init` returns, a "
                "tree of arrays."
            ) from None


def same_type(new: Any, old: Any, name: str, remedy: str) -> Any:
    """``new`` in the strong dtypes of ``old``; refuses a tree, shape or dtype that changed.

    A state that changes type in a step compiles again at the next one, or fails in ``scan``.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            f"{name} changes its tree structure in a step, from {jax.tree.structure(old)} to "
            f"{jax.tree.structure(new)}. {remedy}"
        )
    for (path, a), (_, b) in zip(paths(new, name), paths(old, name), strict=True):
        if jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
            raise TypeError(
                f"{path} changes in a step from {jnp.result_type(b)}{jnp.shape(b)} to "
                f"{jnp.result_type(a)}{jnp.shape(a)}. {remedy}"
            )

    def strong(x: Any) -> jax.Array:
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return x
        return jax.lax.convert_element_type(x, jnp.result_type(x))

    return jax.tree.map(strong, new)
