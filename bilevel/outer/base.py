r"""The protocol of an outer loop: three pure functions, shaped like an optax transformation.

.. code-block:: python

    state = algorithm.init(params, hparams)
    new, info = algorithm.step(state, inner_batches=..., outer_batch=..., key=...)
    params = algorithm.deploy(new, state.hparams)

``state`` is a NamedTuple of arrays that can be asked for ``params``, ``hparams`` (what the losses
read), ``model_state`` and ``step`` (int32, updates made); ``info`` is an :class:`Info`.
``info.value`` is the outer loss at the pair ``(deploy(new, info.hparams), info.hparams)``, where
``info.hparams`` are those of ``state``, before their update. That is all :func:`~bilevel.fit` knows
of any algorithm.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams, Params, Scalar, Stats
from bilevel.ground.batches import array_dtype
from bilevel.ground.cost import Cost
from bilevel.ground.tree import paths


class Info(NamedTuple):
    r"""What a step saw: one record for every loop.

    Attributes:
      value: outer loss at the new parameters and the hyperparameters *before* their update.
      inner_value: inner loss in the last training step, before that step moved; without training
        steps, on the batch the response reads.
      hypergrad_norm: norm of the gradient that ``outer_tx`` received (of the raw variable where
        there are bounds).
      hparams: what the training steps and the outer loss of this step read.
      result: int32 :class:`~bilevel.Status`.
      stats: scalars, the evidence for ``result``.
      cost: derivatives evaluated in this step, see :class:`~bilevel.ground.cost.Cost`.
      aux: auxiliary output of the outer loss, or what else a loop has to show.
    """

    value: Scalar
    inner_value: Scalar
    hypergrad_norm: Scalar
    hparams: Hparams
    result: jax.Array
    stats: Stats
    cost: Cost
    aux: Any = None


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
    step: Callable[..., tuple[Any, Info]]
    deploy: Callable[..., Params] = own_params


KEEP = (
    "What a step carries keeps its type: losses must return `model_state`, optimizers their state, "
    "and a response its own, in the shapes and kinds of numbers they received."
)


def own(leaves: Any) -> Any:
    """A copy of every leaf as a strongly typed array, so that donating it harms nobody else's."""

    def leaf(x: Any) -> jax.Array:
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jnp.copy(x)
        return jnp.array(x, dtype=dtype, copy=True)

    return jax.tree.map(leaf, leaves)


def keep_better(value: Any, new: Any, best_value: Any, best: Any) -> tuple[Scalar, Any]:
    """The lower of two values, with what belongs to it; a NaN is never better."""
    better = value < best_value
    return jnp.where(better, value, best_value), tree.where(better, new, best)


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
    """Refuse a state with leaves that are not arrays."""
    for path, leaf in paths(state, "state"):
        try:
            array_dtype(leaf)
        except TypeError:
            raise TypeError(
                f"{path} is a {type(leaf).__name__}, but `state` must be what `init` returns, a "
                "tree of arrays."
            ) from None
