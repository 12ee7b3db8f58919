r"""A run's hyperparameters as a function of its step: recorded, saved, replayed."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.ground.aliases import Hparams
from bilevel.ground.tree import paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HyperSchedule:
    r"""Hyperparameters over training steps, piecewise constant.

    What self-tuning finds is a schedule, not a value: a plain network trained with
    ``schedule(step)`` in place of fixed hyperparameters nearly matches it.

    Args:
      steps: ``(K,)`` increasing integers: the training step at which each entry comes in force.
      values: a tree like ``hparams`` whose leaves have a leading axis of K.

    Raises:
      ValueError: leaves of another length, or concrete steps that do not increase.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> schedule = bilevel.HyperSchedule(jnp.array([0, 10]), {"rate": jnp.array([0.1, 0.5])})
      >>> [round(float(schedule(t)["rate"]), 2) for t in (0, 9, 10, 99)]
      [0.1, 0.1, 0.5, 0.5]
    """

    steps: jax.Array
    values: Hparams

    def __post_init__(self) -> None:
        if isinstance(self.steps, (str, bytes, list, tuple, dict)):
            raise TypeError(
                f"`steps` must be an array of whole numbers, got {self.steps!r}: pass "
                "`jnp.array([...])`."
            )
        if type(self.steps) is object or not hasattr(self.steps, "shape"):
            return  # a placeholder of a tree transformation
        if isinstance(self.steps, np.ndarray) or (
            isinstance(self.steps, jax.Array) and not isinstance(self.steps, Tracer)
        ):
            steps = np.asarray(self.steps)
            if steps.ndim == 1 and np.any(np.diff(steps) <= 0):
                raise ValueError("`steps` must increase: each entry comes in force after the last.")
        for path, leaf in paths(self.values, "values"):
            if hasattr(leaf, "shape") and jnp.shape(leaf)[:1] != jnp.shape(self.steps)[-1:]:
                if jnp.ndim(self.steps) != 1:
                    continue  # a batch of schedules under vmap
                raise ValueError(
                    f"{path} has shape {jnp.shape(leaf)}, expected a leading axis of "
                    f"{jnp.shape(self.steps)[0]}, one entry for each of `steps`."
                )

    @classmethod
    def from_infos(cls, infos: Any, steps_each: int) -> "HyperSchedule":
        """The schedule of a run from its stacked ``info`` records.

        Args:
          infos: ``info`` of every step of :func:`~bilevel.alternate`,
            :func:`~bilevel.self_tuning` or another loop, stacked on a leading axis (what
            ``lax.scan`` returns).
          steps_each: training steps in each of them: ``inner_steps``, and those of a response
            that trains (``Unroll(steps=...)``).
        """
        count = jax.tree.leaves(infos.hparams)[0].shape[0]
        return cls(steps_each * jnp.arange(count), infos.hparams)

    def __call__(self, step: Any) -> Hparams:
        """The hyperparameters in force at ``step`` (an integer, traced or not)."""
        self._check_used(step)
        index = jnp.searchsorted(self.steps, step, side="right") - 1
        index = jnp.clip(index, 0, self.steps.shape[0] - 1)
        return jax.tree.map(lambda x: jnp.asarray(x)[index], self.values)

    def _check_used(self, step: Any) -> None:
        """What cannot be told where JAX leaves placeholders."""
        for name, value, ndim in (("steps", self.steps, 1), ("step", step, 0)):
            whole = isinstance(value, int) or hasattr(value, "dtype")
            if not whole or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
                raise TypeError(f"`{name}` must be of whole numbers, got {value!r}.")
            if jnp.ndim(value) != ndim:
                raise ValueError(
                    f"`{name}` has shape {jnp.shape(value)}, expected "
                    f"{'(K,)' if ndim else 'one number: map over several with `jax.vmap`'}."
                )
        entries = paths(self.values, "values")
        if not entries or not jnp.size(self.steps):
            raise ValueError("`values` has no entries: pass those of at least one step.")
        for path, leaf in entries:
            numeric = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.number)
            if not numeric or jnp.ndim(leaf) == 0:
                raise TypeError(
                    f"{path} must be an array of numbers with a leading axis, one entry for each "
                    f"of `steps`, got {leaf!r}."
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file of plain arrays."""
        arrays: dict[str, Any] = {"steps": np.asarray(self.steps)}
        for i, leaf in enumerate(jax.tree.leaves(self.values)):
            arrays[f"value_{i}"] = np.asarray(leaf)
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], like: Hparams) -> "HyperSchedule":
        """Read what :meth:`save` wrote, into the tree of ``like`` (any hyperparameters of it).

        Raises:
          ValueError: the file holds another number of hyperparameters than ``like``.
        """
        treedef = jax.tree.structure(like)
        with np.load(path, allow_pickle=False) as file:
            count = sum(name.startswith("value_") for name in file.files)
            if count != treedef.num_leaves:
                raise ValueError(
                    f"{os.fspath(path)} holds {count} hyperparameters, `like` has "
                    f"{treedef.num_leaves}."
                )
            values = [jnp.asarray(file[f"value_{i}"]) for i in range(count)]
            return cls(jnp.asarray(file["steps"]), jax.tree.unflatten(treedef, values))
