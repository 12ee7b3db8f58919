r"""What the training steps of all loops share: batches of a stack, and one optimizer update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.aliases import Batch, Hparams, Params, Scalar
from bilevel.checks import check_entries
from bilevel.inner.descend import check_batches, is_single_key, select_batch
from bilevel.settings import is_function


def check_loss(name: str, loss: Any) -> None:
    """Refuse a loss that cannot be called."""
    if not is_function(loss):
        raise TypeError(f"`{name}` must be a function loss(params, hparams, batch), got {loss!r}.")


def is_tx(tx: Any) -> bool:
    """Whether ``tx`` is an optax gradient transformation (not a class of them)."""
    return hasattr(tx, "init") and hasattr(tx, "update") and not isinstance(tx, type)


def check_tx(name: str, tx: Any, hint: str = "") -> None:
    """Refuse what is not an optax gradient transformation."""
    if not is_tx(tx):
        raise TypeError(f"`{name}` must be an optax gradient transformation, got {tx!r}.{hint}")


def check_fixed_tx(name: str, tx: Any) -> None:
    """Refuse a function of the hyperparameters where no response to an optimizer is learned."""
    hint = (
        " If it is a function of the hyperparameters: no response to an optimizer's settings is "
        "learned here, tune them with `alternate` and `Unroll(inner_tx=lambda hparams: ..., "
        "steps=...)`."
        if callable(tx)
        else ""
    )
    check_tx(name, tx, hint)


def check_stack(batches: Batch, count: int, name: str, reads: str) -> None:
    """The rule of :func:`~bilevel.inner.descend.check_batches`, and that there are batches."""
    if not jax.tree.leaves(batches) and count:
        raise ValueError(f"`{name}` has no arrays: pass batches stacked on a leading axis.")
    check_entries(batches, name)
    check_batches(batches, count, name, reads)


def part_of_stack(batches: Batch, first: int, count: int) -> Batch:
    """Batches ``first`` to ``first + count - 1``; a single key becomes the keys of those steps."""

    def part(leaf: Any) -> Any:
        if is_single_key(leaf):
            return jax.vmap(lambda i: jax.random.fold_in(leaf, i))(first + jnp.arange(count))
        return leaf[first : first + count]

    return jax.tree.map(part, batches)


def batch_at(batches: Batch, index: Any) -> Batch:
    """Batch ``index`` (not negative) of a stack; a single key is folded with the index."""
    return select_batch(batches, index)


def update(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    params: Params,
    *,
    value: Scalar,
    value_fn: Callable[[Any], Scalar],
) -> tuple[Params, Any]:
    """One optax update: the new parameters and optimizer state.

    Optimizers that ask for the loss (line searches, Polyak steps, reductions on a plateau)
    receive ``value``, ``grad`` and ``value_fn``, which evaluates the loss elsewhere.
    """
    updates, opt_state = optax.with_extra_args_support(tx).update(
        grads, opt_state, params, value=value, grad=grads, value_fn=value_fn
    )
    return optax.apply_updates(params, updates), opt_state


def no_line_search(name: str) -> Callable[[Hparams], Scalar]:
    """The ``value_fn`` of an outer step whose loss at other hyperparameters is not at hand."""

    def value_fn(hparams: Hparams) -> Scalar:
        raise ValueError(
            f"`{name}` evaluates the outer loss at other hyperparameters (a line search), where "
            "the inner problem would have to be solved again: use an optimizer without one, such "
            "as `optax.lbfgs(..., linesearch=None)` with a learning rate, or `optax.adam`."
        )

    return value_fn
