r"""Models of flax.nnx, flax.linen and equinox as pytrees: one pattern for all three.

.. code-block:: python

    params, rest, merge = bilevel.split_nnx(model)        # or split_linen, split_equinox

``params`` holds the trainable floats and nothing else, ``rest`` the other arrays (batch-norm
statistics, dropout keys and counts), ``merge(params, rest)`` is the model again. A model whose
forward pass changes ``rest`` uses the library's one contract for model state: losses are
``loss(params, hparams, batch, model_state) -> (scalar, model_state)`` with ``has_state=True``,
and ``rest`` is the first ``model_state``. One without may close over ``rest``.

The core never sees a module: these helpers only split and merge. Each framework is imported
when its helper is called.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from bilevel.ground.aliases import ModelState, Params
from bilevel.ground.settings import require_extra


class Split(NamedTuple):
    """A model in parts.

    Attributes:
      params: trainable real arrays.
      rest: every other array; the ``model_state`` of losses with ``has_state=True``.
      merge: ``merge(params, rest) -> model`` (for linen: the variables).
    """

    params: Params
    rest: ModelState
    merge: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _MergeNNX:
    """``merge(params, rest) -> module``; ``merge.rest(module)`` reads the advanced state."""

    graphdef: Any
    wrt: Any

    def __call__(self, params: Params, rest: ModelState) -> Any:
        from flax import nnx

        return nnx.merge(self.graphdef, params, rest)

    def rest(self, module: Any) -> ModelState:
        """Everything but the trainable part of a module that has just run, as plain arrays."""
        from flax import nnx

        return nnx.as_pure(nnx.state(module, nnx.Not(self.wrt)))


def split_nnx(model: Any, wrt: Any = None) -> Split:
    r"""Split a ``flax.nnx`` module; ``merge.rest(module)`` reads its state after a call.

    Args:
      model: the module, in the mode it is trained in. Split ``nnx.view(model,
        deterministic=True, use_running_average=True)`` for evaluation: its ``merge`` accepts the
        same ``params`` and ``rest`` only if the module keeps the same state in both modes.
      wrt: the filter of the trainable part, ``nnx.Param`` by default.

    The states are *pure* (plain arrays): with Variables inside, flax refuses to mutate them at
    another trace level, and the split would share memory with the module. Dropout keeps its key
    and count in ``rest``: read frozen within a solve, it gives one mask to all products.
    Write back with ``nnx.update(model, params, rest)``.

    Example:
      >>> import bilevel, jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> params, rest, merge = bilevel.split_nnx(model)
      >>> def loss(params, hparams, batch, rest):
      ...     module = merge(params, rest)
      ...     return jnp.mean(module(batch) ** 2), merge.rest(module)

    Cost: no copy of the arrays. Raises ``TypeError`` for anything but a module.
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` must be a flax.nnx module, got {type(model).__name__}.")
    wrt = nnx.Param if wrt is None else wrt
    graphdef, params, rest = nnx.split(model, wrt, ...)
    return Split(nnx.as_pure(params), nnx.as_pure(rest), _MergeNNX(graphdef, wrt))


def split_linen(variables: Any) -> Split:
    r"""Split the variables of a ``flax.linen`` module.

    Args:
      variables: what ``module.init`` returned: a mapping with the collection ``params``.

    ``rest`` maps the names of the other collections to their trees, so that

    .. code-block:: python

        def inner(params, hparams, batch, rest):
            x, y, key = batch                     # a frozen dropout key: one mask a solve
            logits, rest = module.apply(
                merge(params, rest), x, rngs={"dropout": key}, mutable=list(rest)
            )
            return cross_entropy(logits, y) + penalty(params, hparams), rest

    Cost: none. Raises ``TypeError`` if there is no collection ``params``.
    """
    if not hasattr(variables, "keys") or "params" not in variables:
        raise TypeError(
            "`variables` must be what `module.init(...)` returned, a mapping with the collection "
            f"'params', got {type(variables).__name__}."
        )
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return Split(variables["params"], rest, lambda params, rest: {"params": params, **rest})


def split_equinox(model: Any) -> Split:
    r"""Split an ``equinox`` module into float arrays, other arrays, and everything static.

    Args:
      model: the module. Batch norm lives outside it, in the ``state`` of
        ``equinox.nn.make_with_state``: use ``(rest, state)`` as ``model_state`` and return the
        new one from the loss.

    ``params`` keeps the module's structure with ``None`` where something else was; the library
    accepts it as any pytree. Pass a dropout key in the batch.

    Cost: none. Raises ``ImportError`` without equinox (extra ``equinox``).
    """
    eqx = require_extra("equinox", "equinox", "`split_equinox`")
    params, other = eqx.partition(model, eqx.is_inexact_array)
    rest, static = eqx.partition(other, eqx.is_array)
    return Split(params, rest, lambda params, rest: eqx.combine(params, rest, static))
