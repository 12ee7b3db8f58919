r"""A training run on the host, forwards and backwards: one compiled step, one compiled pullback."""

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Params
from bilevel.ground.loops import strong_types
from bilevel.inner.descend import GRADIENT, InnerState, descend, start
from bilevel.inner.mixed import is_float
from bilevel.inner.optimizer import InnerTx, build_tx, refresh_injected
from bilevel.inner.reversal import Reversal, plan
from bilevel.problem.two_losses import Problem


class Steps(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      begin: ``(params, hparams, model_state, opt_state) -> state``; ``opt_state`` may be None.
      advance: ``(state, hparams, batch) -> (state, told)``: the loss, and the two numbers of
        ``StepInfo.rounded``, zeros where no parameter has a half precision.
      end: ``(point, hparams, batch, model_state)``: the outer loss and its gradients.
      pull: ``(state, hparams, batch, cotangents, found) -> (cotangents, found)``: through the
        step that begins at ``state``; cotangents are those of its floats, in a list, and
        ``found`` accumulates the gradient in the hyperparameters.
      link: ``advance`` that also returns what the derivative of the step needs beside its own
        arguments, products and the gradient: ``(state, told, kept)``.
      follow: ``(kept, state, hparams, batch, cotangents, found)``: ``pull`` by what ``link``
        returned, which computes no product of the step again.
      pull_begin: ``(params, hparams, model_state, opt_state, cotangents)``: the derivatives in
        parameters and hyperparameters, through ``begin``.
      checked: forms of arguments for which the checks were made, which trace the step anew.
    """

    begin: Callable[..., InnerState]
    advance: Callable[..., tuple[InnerState, jax.Array]]
    end: Callable[..., Any]
    pull: Callable[..., tuple[list[Any], Hparams]]
    link: Any
    follow: Callable[..., tuple[list[Any], Hparams]]
    pull_begin: Callable[..., tuple[Params, Hparams]]
    checked: set[Any]


def compiled_steps(problem: Problem, inner_tx: InnerTx) -> Steps:
    """The functions of ``problem``, without a model state; compiled once for equal arguments."""
    try:
        return _cached_steps(problem, inner_tx)
    except TypeError:  # a loss or an optimizer that cannot be hashed
        return _compiled_steps(problem, inner_tx)


def _compiled_steps(problem: Problem, inner_tx: InnerTx) -> Steps:
    def begin(params: Params, hparams: Hparams, model_state: Any, opt_state: Any) -> InnerState:
        tx = build_tx(inner_tx, hparams)
        fresh = start(tx, params, model_state)
        if opt_state is None:
            return fresh
        return fresh._replace(opt_state=refresh_injected(strong_types(opt_state), tx, params))

    def step(state: InnerState, hparams: Hparams, batch: Batch, mixed: bool) -> Any:
        stack = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
        tx = build_tx(inner_tx, hparams)
        state, info = descend(problem, tx, state, hparams, stack, steps=1, mixed=mixed, unroll=True)
        dtype = jnp.result_type(jnp.float32, info.loss)
        rounded = (jnp.zeros(1), jnp.zeros(1)) if info.rounded is None else info.rounded
        return state, jnp.stack([x[0].astype(dtype) for x in (info.loss, *rounded)])

    def end(point: Any, hparams: Hparams, batch: Batch, model_state: Any) -> Any:
        return problem.at(model_state).outer_grads(point, hparams, batch)

    def pull(state: InnerState, hparams: Hparams, batch: Batch, given: Any, found: Any) -> Any:
        def floats(values: list[Any], hparams: Hparams) -> list[Any]:
            return floats_of(step(with_floats(state, values), hparams, batch, True)[0])

        given, more = jax.vjp(floats, floats_of(state), hparams)[1](given)
        return given, tree.add(found, more)

    def link(state: InnerState, hparams: Hparams, batch: Batch) -> Any:
        def floats(values: list[Any], hparams: Hparams) -> Any:
            # Reverse over reverse: with all activations at hand it has the fewest products.
            new, told = step(with_floats(state, values), hparams, batch, False)
            return floats_of(new), (new, told)

        # The two are programs of their own, so nothing needs to be kept from being merged.
        kept = jax.checkpoint(floats, prevent_cse=False, policy=_is_kept)
        _, pullback, (new, told) = jax.vjp(kept, floats_of(state), hparams, has_aux=True)
        return new, told, Kept.of(pullback, (state, hparams, batch))

    def follow(
        kept: Kept, state: InnerState, hparams: Hparams, batch: Batch, given: Any, found: Any
    ) -> Any:
        given, more = kept.pullback((state, hparams, batch))(given)
        return given, tree.add(found, more)

    def pull_begin(params: Params, hparams: Hparams, model_state: Any, old: Any, given: Any) -> Any:
        def floats(params: Params, hparams: Hparams) -> list[Any]:
            return floats_of(begin(params, hparams, model_state, old))

        return jax.vjp(floats, params, hparams)[1](given)

    return Steps(
        jax.jit(begin),
        jax.jit(lambda state, hparams, batch: step(state, hparams, batch, False)),
        jax.jit(end),
        # Cotangents are read to the end of a pullback: to donate them would have them copied.
        jax.jit(pull),
        jax.jit(link),
        jax.jit(follow),
        jax.jit(pull_begin),
        set(),
    )


def _is_kept(primitive: Any, *_: Any, **params: Any) -> bool:
    """Of what a step computes: products and the gradient, what is cheap is computed again."""
    return primitive.name in ("dot_general", "conv_general_dilated") or (
        primitive.name == "name" and params["name"] == GRADIENT
    )


@jax.tree_util.register_pytree_node_class
class Kept:
    """What a pullback reads, without those arrays that its step was given: they are not copied.

    ``places`` tells for each array of the pullback which argument it is; None: one of ``arrays``.
    """

    def __init__(self, arrays: list[Any], places: tuple[int | None, ...], treedef: Any):
        self.arrays, self._places, self._treedef = arrays, places, treedef

    @classmethod
    def of(cls, pullback: Any, args: Any) -> "Kept":
        """While traced: an array of ``pullback`` is an argument if it is the same tracer."""
        leaves, treedef = jax.tree.flatten(pullback)
        given = {id(x): i for i, x in enumerate(jax.tree.leaves(args))}
        places = tuple(given.get(id(x)) for x in leaves)
        return cls([x for x, p in zip(leaves, places, strict=True) if p is None], places, treedef)

    def pullback(self, args: Any) -> Any:
        """The pullback, with the arguments that its step had."""
        given, rest = jax.tree.leaves(args), iter(self.arrays)
        leaves = [next(rest) if p is None else given[p] for p in self._places]
        return jax.tree.unflatten(self._treedef, leaves)

    def tree_flatten(self) -> Any:
        return (self.arrays,), (self._places, self._treedef)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "Kept":
        return cls(*children, *static)


_cached_steps = functools.lru_cache(maxsize=8)(_compiled_steps)


def floats_of(state: Any) -> list[Any]:
    """The leaves of a state that carry derivatives."""
    return [x for x in jax.tree.leaves(state) if is_float(x)]


def with_floats(state: Any, values: list[Any]) -> Any:
    """``state`` with these floats in place of its own."""
    rest = iter(values)
    return jax.tree.map(lambda x: next(rest) if is_float(x) else x, state)


class Batches:
    """The batches of a run, by step; some of them are read again later and must be the same.

    Args:
      source: ``step -> batch``.
      first, steps: the run. About 16 of its steps, the last one included, are compared.

    ``seen`` holds their check sums, by step; those of an earlier process may be added.
    """

    def __init__(self, source: Callable[[int], Batch], first: int, steps: int):
        self._source, self._first = source, first
        self._every = max(1, steps // 16)
        self._last = first + steps - 1
        self.seen: dict[int, int] = {}

    def compare(self, step: int) -> None:
        """Read the batch of a step again, if it is one of those that are compared."""
        if self._is_compared(step):
            self(step)

    def _is_compared(self, step: int) -> bool:
        return step == self._last or (step - self._first) % self._every == 0

    def __call__(self, step: int) -> Batch:
        batch = self._source(step)
        if self._is_compared(step):
            found = _check_sum(batch)
            if self.seen.setdefault(step, found) != found:
                raise ValueError(
                    f"`batches` is not a function of the step: step {step} gave another batch when "
                    "it was read again for the backward pass, and the gradient would belong to no "
                    "run. Draw from the step, `np.random.default_rng((seed, step))` or "
                    "`jax.random.fold_in(key, step)`, not from an iterator or a generator that "
                    "goes on. Checkpoints are as they were."
                )
        return batch


def digest_of(arrays: Any) -> str:
    """SHA-256 of the numbers of a tree, their dtypes and shapes."""
    found = hashlib.sha256(str(jax.tree.structure(arrays)).encode())
    for leaf in _numbers(arrays):
        found.update(f"{leaf.dtype}{leaf.shape}".encode())
        found.update(leaf.tobytes())
    return found.hexdigest()


def _check_sum(arrays: Any) -> int:
    """A check sum of the numbers of a tree, twenty times faster than a digest.

    CRC-32 of sums along both axes of a table of words: which words there are, and where.
    """
    found = 0
    for leaf in _numbers(arrays):
        bytes_ = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        whole = bytes_.size // 4096 * 4096
        words = bytes_[:whole].view(np.uint64).reshape(-1, 512)
        for part in (words.sum(0), words.sum(1), bytes_[whole:]):
            found = zlib.crc32(part.tobytes(), found)
    return found


def _numbers(arrays: Any) -> Iterator[np.ndarray]:
    for leaf in jax.tree.leaves(arrays):
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        leaf = jax.random.key_data(leaf) if is_key else leaf
        if getattr(leaf, "is_fully_addressable", True):
            yield np.asarray(leaf)
        else:  # of several processes, each compares its own part
            yield from (np.asarray(part.data) for part in leaf.addressable_shards)


class Segment:
    """Consecutive steps of a run, whose states are kept where their reversal needs them.

    Args:
      first, steps: which.
      places: how many states may be kept beside the first.
    """

    def __init__(self, first: int, steps: int, places: int):
        self.first, self.steps = first, steps
        self._plan: Reversal = plan(steps, min(places, steps))
        self.kept: dict[int, Any] = {}
        self.links: list[Any] = []
        at, self._keeps = first, {}
        for count, place in self._plan.forward:
            at += count
            self._keeps[at] = place

    def pass_by(self, step: int, state: InnerState) -> None:
        """On the way forward: keep the state before ``step`` if the reversal begins with it."""
        if step == self.first:
            self.kept = {0: state}
        elif step in self._keeps:
            self.kept[self._keeps[step]] = state

    def last_kept(self) -> int:
        """The step whose state is the last that the way forward keeps."""
        return max(self._keeps, default=self.first)

    def is_filled(self) -> bool:
        """Whether every state is there with which the reversal begins."""
        return 0 in self.kept and all(place in self.kept for place in self._keeps.values())

    def reverse(
        self,
        advance: Callable[[InnerState, int], InnerState],
        pull: Callable[[InnerState, int], None],
    ) -> None:
        """Pull every step back, the last first; ``advance(state, step)`` makes one again."""
        for phase in self._plan.phases:
            state, step = self.kept[phase.place], self.first + phase.first
            for count, place in (*phase.runs, (phase.tail, None)):
                for _ in range(count):
                    state = advance(state, step)
                    step += 1
                if place is not None:
                    self.kept[place] = state
            pull(state, step)
