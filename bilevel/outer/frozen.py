r"""Frozen leaves: parameters that the inner optimizer does not train do not respond either.

``optax.multi_transform`` with ``set_to_zero``, ``optax.freeze`` and the like keep some leaves of
the parameters where they are. The system that an implicit response solves, and the network of a
best response, are then those of the other leaves, with the frozen ones as constants.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams, Key, Params
from bilevel.ground.traced import depends
from bilevel.hypergradient.base import Response
from bilevel.inner.network import Network
from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.two_losses import Problem


def trained_leaves(tx: optax.GradientTransformation, params: Params) -> tuple[bool, ...] | None:
    """For each leaf, whether its update depends on the gradients; ``None`` for all or none.

    Asked of the traced update, so that it costs no computation. Two updates are looked at,
    because one may only put a gradient into the state. An optimizer that trains no leaf at all
    (``optax.set_to_zero()``) is not the one that trains, so that it freezes nothing.
    """
    tx = optax.with_extra_args_support(tx)

    def two_updates(grads: Params, params: Params) -> list[Any]:
        def value_fn(w: Params) -> Any:
            return tree.norm(w)

        value = jnp.zeros((), tree.norm(params).dtype)
        state, moves = tx.init(params), []
        for _ in range(2):
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=value_fn
            )
            moves.append(jax.tree.leaves(updates))
        return moves

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    try:
        first, second = depends(two_updates, shapes, shapes, blocked=_multiplies_by_zero)
    except TypeError as error:
        if "keyword-only argument" not in str(error):
            raise
        return None  # it reads the batch as well, as `gauss_newton`, which trains all leaves
    flags = tuple(a or b for a, b in zip(first, second, strict=True))
    return None if all(flags) or not any(flags) else flags


def _multiplies_by_zero(equation: Any) -> bool:
    """``optax.scale(0.0)`` freezes as ``set_to_zero`` does."""
    return equation.primitive.name == "mul" and any(
        isinstance(x, core.Literal) and np.ndim(x.val) == 0 and x.val == 0 for x in equation.invars
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters in two parts: the trained leaves, and where the frozen ones stand.

    Attributes:
      params: all leaves, those of now.
      flags: for each leaf, whether it is trained; ``None`` for all.
    """

    params: Params
    flags: tuple[bool, ...] | None

    def of(self, params: Params) -> Params:
        """The trained leaves, in a tree that has ``None`` in place of the frozen ones."""
        if self.flags is None:
            return params
        leaves, treedef = jax.tree.flatten(params)
        kept = [leaf if flag else None for leaf, flag in zip(leaves, self.flags, strict=True)]
        return jax.tree.unflatten(treedef, kept)

    def whole(self, trained: Params) -> Params:
        """All parameters: the trained leaves as given, the frozen ones from ``params``."""
        if self.flags is None:
            return trained
        leaves, treedef = jax.tree.flatten(self.params)
        given = iter(jax.tree.leaves(trained))
        merged = [
            next(given) if flag else leaf for leaf, flag in zip(leaves, self.flags, strict=True)
        ]
        return jax.tree.unflatten(treedef, merged)

    def problem(self, problem: Problem) -> Problem:
        """``problem``, whose losses read the trained leaves."""
        if self.flags is None:
            return problem
        outer, inner = _of_part(problem.outer, self), _of_part(problem.inner, self)
        return dataclasses.replace(problem, outer=outer, inner=inner)

    def response(self, response: Response) -> Response:
        """``response`` with every model it holds reading the trained leaves."""
        if self.flags is None or not dataclasses.is_dataclass(response):
            return response
        changed = {
            name: self._split(getattr(response, name))
            for name in ("operator", "linearize")
            if isinstance(getattr(response, name, None), GaussNewton)
        }
        return dataclasses.replace(response, **changed)  # type: ignore[type-var]

    def _split(self, split: GaussNewton) -> GaussNewton:
        penalty = None if split.penalty is None else _of_part(split.penalty, self)
        return dataclasses.replace(split, model=_of_part(split.model, self), penalty=penalty)


def _of_part(function: Callable[..., Any], part: Part) -> Callable[..., Any]:
    @functools.wraps(function, updated=())  # whoever asks for the signature gets that of `function`
    def of_part(params: Params, *rest: Any) -> Any:
        return function(part.whole(params), *rest)

    return of_part


@dataclasses.dataclass(frozen=True)
class PartialNetwork:
    """A network in weight space that moves the trained leaves only."""

    network: Any
    flags: tuple[bool, ...]

    @property
    def centred(self) -> bool:
        """As that of the whole network."""
        return self.network.centred

    def init(self, key: Key, params: Params, hparams: Hparams) -> Any:
        """Parameters of the network for the trained leaves."""
        return self.network.init(key, Part(params, self.flags).of(params), hparams)

    def apply(self, network_params: Any, params: Params, displacement: Hparams, /) -> Params:
        """All parameters, of which the trained ones follow ``displacement``."""
        part = Part(params, self.flags)
        moved = self.network.apply(network_params, part.of(params), displacement)
        return part.whole(moved)


def partial_network(network: Network, tx: optax.GradientTransformation, params: Params) -> Network:
    """``network``, restricted to the leaves of ``params`` that ``tx`` trains."""
    flags = trained_leaves(tx, params)
    if flags is None:
        return network
    if getattr(network, "per_example", False):
        frozen = [
            path
            for (path, _), flag in zip(tree.paths(params, "params"), flags, strict=True)
            if not flag
        ]
        raise ValueError(
            f"`inner_tx` freezes {', '.join(frozen)}, but layers respond inside the model: build "
            "these layers as plain ones (`nnx.Linear`), or use `StructuredResponse`."
        )
    return PartialNetwork(network, flags)
