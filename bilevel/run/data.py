"""The batches of a run, as functions of its step."""

import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch
from bilevel.ground.tree import paths

_RULE = (
    "Pass a function of the integer step, the same batch for the same step, so that a resumed run "
    "reads what an uninterrupted one would"
)


MANY = 2  # times as many examples to tune on as to train on are seldom meant


class Data:
    """``data(step)``: the batches of a step as keyword arguments of ``alg.step``.

    Each source is a function of the step or one constant tree. The batches of the step asked
    for last are kept, so that a source is called once for a step.

    Raises:
      TypeError, ValueError: for a source, or a batch of it, of another form.
      RuntimeError: for a source that raises, from what it raised.
    """

    def __init__(self, inner_data: Any, outer_data: Any, response_data: Any = None):
        self._sources = {
            "inner_batches": _Source("inner_data", inner_data),
            "outer_batch": _Source("outer_data", outer_data),
        }
        if response_data is not None:
            self._sources["response_batch"] = _Source("response_data", response_data)
        self._last: tuple[int, dict[str, Batch]] | None = None

    def __call__(self, step: int) -> dict[str, Batch]:
        if self._last is None or self._last[0] != step:
            batches = {name: source(step) for name, source in self._sources.items()}
            self._last = step, batches
        return self._last[1]

    def notices(self) -> list[str]:
        """What the sizes of two constant sources tell: a swap, where the larger set is tuned on."""
        inner, outer = (self._sources[name].constant for name in ("inner_batches", "outer_batch"))
        sizes = None if inner is None or outer is None else _sizes(inner, outer)
        if sizes is None or sizes[1] < MANY * sizes[0]:
            return []
        return [
            f"training reads {sizes[0]} examples, the outer loss {sizes[1]}: unless that is meant, "
            "`inner_data` and `outer_data` are swapped."
        ]


class _Source:
    """One argument of ``fit``, as a function of the step whose batches keep their form."""

    def __init__(self, name: str, data: Any):
        self.name = name
        self.constant: Any = None
        self._form: Any = None
        if callable(data):
            self._function = data
            self._check_takes_a_step()
            return
        if data is None:
            raise TypeError(
                f"`{name}` is None: pass the batch, or a function of the integer step that returns "
                "it. Where nothing is read, pass an empty tuple `()`."
            )
        if isinstance(data, list):
            raise TypeError(
                f"`{name}` is a list, which could be one batch or several. {_RULE}: `lambda step: "
                "batches[step % len(batches)]`. What one step reads along a leading axis is "
                "stacked with `jax.tree.map(lambda *x: jnp.stack(x), *batches)`; one constant "
                "batch of several arrays is a tuple or a dict."
            )
        if hasattr(data, "__next__"):
            raise TypeError(
                f"`{name}` is an iterator ({type(data).__name__}). {_RULE}: draw it with "
                "`np.random.default_rng((seed, step))`, or put the batches in a list and pass "
                "`lambda step: batches[step % len(batches)]`."
            )
        _check_arrays(name, f"`{name}`", data)
        self.constant = constant = jax.device_put(data)
        self._function: Callable[[int], Batch] = lambda step: constant

    def __call__(self, step: int) -> Batch:
        if self.constant is not None and self._form is not None:
            return self.constant
        try:
            batch = self._function(step)
        except StopIteration as error:
            raise RuntimeError(
                f"`{self.name}` ran out at step {step}: it draws from an iterator. {_RULE}."
            ) from error
        except Exception as error:
            raise RuntimeError(
                f"the function `{self.name}` raised {type(error).__name__} at step {step}: "
                f"{error}. Steps before it are kept: mend the function and call `fit` again."
            ) from error
        self._check_form(batch, step)
        return batch

    def _check_takes_a_step(self) -> None:
        try:
            signature = inspect.signature(self._function)
        except (TypeError, ValueError):  # some built-in functions do not tell
            return
        try:
            signature.bind(0)
        except TypeError:
            raise TypeError(
                f"`{self.name}` is called with the integer step, but its signature is "
                f"{signature}. {_RULE}: `lambda step: ...`."
            ) from None

    def _check_form(self, batch: Batch, step: int) -> None:
        leaves, structure = jax.tree.flatten(batch)
        form = structure, [(_dtype(x), np.ndim(x)) for x in leaves]
        if self._form is not None and form == self._form:
            return
        if batch is None and self._form is None:
            raise TypeError(
                f"`{self.name}` returned None at step {step}: end it with a `return` of the batch. "
                "Where nothing is read, return an empty tuple `()`."
            )
        _check_arrays(self.name, f"`{self.name}` at step {step}", batch)
        if self._form is None:
            self._form = form
            return
        raise ValueError(
            f"`{self.name}` returned another kind of batch at step {step}: {_words(form)}, before "
            f"it {_words(self._form)}. Every step must return the same tree, with arrays of the "
            "same dtypes and numbers of axes."
        )


def _sizes(inner: Batch, outer: Batch) -> tuple[int, int] | None:
    """How many examples two constant trees hold; None where that cannot be told.

    The inner tree has one axis more, of its training steps, which may all read the same.
    """
    stacks, batches = jax.tree.leaves(inner), jax.tree.leaves(outer)
    if jax.tree.structure(inner) != jax.tree.structure(outer) or not stacks:
        return None
    for stack, batch in zip(stacks, batches, strict=True):
        if jnp.ndim(batch) < 1 or jnp.shape(stack)[2:] != jnp.shape(batch)[1:]:
            return None
        if jnp.ndim(stack) != jnp.ndim(batch) + 1 or not stack.is_fully_addressable:
            return None
    steps, size = stacks[0].shape[:2]
    outer_size = batches[0].shape[0]
    if outer_size >= MANY * size and all(bool(jnp.all(x == x[:1])) for x in stacks):
        steps = 1
    return steps * size, outer_size


def _dtype(leaf: Any) -> Any:
    """The dtype JAX gives a number or an array of them, or None for what is neither."""
    if isinstance(leaf, jax.Array):  # in every step, and `result_type` is slow
        return leaf.dtype
    if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
        return None
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError):
        return None


def _check_arrays(name: str, where: str, batch: Any) -> None:
    """Refuse leaves that are not arrays of numbers or keys."""
    for path, leaf in paths(batch, ""):
        if _dtype(leaf) is None:
            place = f"{where}{' holds at ' + path if path else ' is'}"
            kind = type(leaf).__name__
            if not path and isinstance(leaf, Iterable) and not isinstance(leaf, (str, bytes)):
                raise TypeError(
                    f"{place} a {kind}, neither a function of the step nor a tree of arrays. "
                    f"{_RULE}: `lambda step: loader[step]`, or draw the batch from the step."
                )
            raise TypeError(
                f"{place} a {kind}: batches are trees of JAX or NumPy arrays of numbers. Convert "
                f"it with `np.asarray(...)`, or leave it out of `{name}`."
            )


def _words(form: Any) -> str:
    structure, leaves = form
    kinds = ", ".join(f"{dtype} with {ndim} axes" for dtype, ndim in leaves)
    return f"{structure} of ({kinds})"
