r"""Micro-batches: a loss, its gradient and its products, one part of the batch after another."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar
from bilevel.ground.batches import is_single_key
from bilevel.ground.loops import unrolls
from bilevel.ground.settings import check_count, check_flag
from bilevel.ground.tree import paths
from bilevel.problem.validate import check_losses, check_scalar


def accumulate(loss: Loss, parts: int, *, unroll: bool | None = None) -> Loss:
    r"""The same loss, read in ``parts`` micro-batches, in the memory of one.

    .. math:: h(w, λ; b) = 1/n ∑_{i=1}^{n} h(w, λ; b_i)

    A function of the same arguments, for every place that takes a loss: training steps, products
    of a solve, outer losses, all loops. Its gradient is the mean of the gradients of the parts,
    and so are the products :math:`Hv` and :math:`Bᵀ v`: activations of one part are alive at a
    time. Equal to the loss on the full batch where that is a mean over examples (plus what does
    not depend on the batch); a sum, or a mean over a number of tokens that differs from part to
    part, is not.

    Args:
      loss: ``loss(params, hparams, batch) -> scalar``.
      parts: n. The leading axis of every array of the batch must be a multiple of it. Part i has
        the examples i, i + n, i + 2 n, ...: of a batch that is divided over devices, each has a
        share of every part. Numbers without an axis go to every part, a single key is folded with
        the number of the part.
      unroll: write the parts out one by one; None decides by itself (convolutions on CPU).

    Returns:
      ``accumulated(params, hparams, batch) -> scalar``.

    Raises:
      ValueError: when traced, for a leading axis that ``parts`` does not divide, and for parts
        that an explicit mesh cannot divide over its devices.

    Cost: that of ``loss``, in a loop; derivatives of the first and second order cost what they
    do on the full batch.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((batch - w) ** 2) + lam * w**2
      >>> args = jnp.array(1.0), jnp.array(0.125), jnp.arange(6.0)
      >>> same = bilevel.accumulate(train, 3)
      >>> float(jax.grad(train)(*args)), float(jax.grad(same)(*args))
      (-2.75, -2.75)
    """
    check_losses(loss=loss)
    check_count("parts", parts)
    check_flag("unroll", unroll, optional=True)

    @functools.wraps(loss)
    def accumulated(params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        stacks, whole = _split(batch, parts)
        leaves, treedef = jax.tree.flatten((params, hparams))

        def part(leaves: list[Any], stacks: dict[int, Any], i: Any) -> Scalar:
            return loss(*jax.tree.unflatten(treedef, leaves), _part(batch, stacks, whole, i))

        one = _at(stacks, jnp.int32(0))
        closed, shape = jax.make_jaxpr(part, return_shape=True)(leaves, one, jnp.int32(0))
        check_scalar(shape, "loss")

        def run(known: list[Any], stacks: dict[int, Any], i: Any) -> Scalar:
            split = len(closed.consts)
            program = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, known[:split]))
            return program(*known[split:], *jax.tree.leaves(stacks), i)[0]

        at_once = parts if unrolls(unroll, loss, params, hparams, batch) else 1
        return _mean(run, parts, at_once)([*closed.consts, *leaves], stacks)

    return accumulated


def _split(batch: Batch, parts: int) -> tuple[dict[int, Any], list[Any]]:
    """Leaves with an axis of B examples as ``(B / parts, parts, ...)``, by place; all leaves."""
    leaves = jax.tree.leaves(batch)
    stacks = {}
    for place, (path, leaf) in enumerate(paths(batch, "batch")):
        if jnp.ndim(leaf) == 0:
            continue
        n = jnp.shape(leaf)[0]
        if n % parts:
            raise ValueError(
                f"{path} has {n} examples, which {parts} micro-batches do not divide: use a batch "
                "whose length is a multiple of `parts`, or other `parts`."
            )
        devices = tree.devices_of_examples(leaf)
        if (n // parts) % devices:
            raise ValueError(
                f"`parts`={parts} leaves {n // parts} of {n} examples for a micro-batch, but "
                f"{path} is divided over {devices} devices along its examples: choose a divisor "
                f"of {n // devices}, or a larger batch."
            )
        # Every parts-th example: each device holds some of each part, and none moves.
        stacks[place] = jnp.reshape(leaf, (n // parts, parts, *jnp.shape(leaf)[1:]))
    if not stacks:
        raise ValueError(
            "`accumulate` divides the leading axis of the arrays of a batch, and this batch has "
            "none: pass the loss itself where it reads no batch."
        )
    return stacks, leaves


def _at(stacks: dict[int, Any], i: Any) -> dict[int, Any]:
    """Part i: cut out where it is read, since laying the parts out first would copy the batch."""
    return {
        place: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for place, x in stacks.items()
    }


def _part(batch: Batch, stacks: dict[int, Any], whole: list[Any], i: Any) -> Batch:
    leaves = [
        stacks[place] if place in stacks
        else jax.random.fold_in(leaf, i) if is_single_key(leaf)
        else leaf
        for place, leaf in enumerate(whole)
    ]  # fmt: skip
    return jax.tree.unflatten(jax.tree.structure(batch), leaves)


def _mean(run: Callable[..., Scalar], parts: int, unroll: int) -> Callable[..., Scalar]:
    """``mean(known, stacks)`` of ``run(known, part, i)``, differentiated part by part."""

    def scan(body: Callable[..., Any], start: Any) -> Any:
        return jax.lax.scan(body, start, jnp.arange(parts), unroll=unroll)

    @jax.custom_jvp
    def mean(known: list[Any], stacks: dict[int, Any]) -> Scalar:
        values = scan(lambda _, i: ((), run(known, _at(stacks, i), i)), ())[1]
        return jnp.mean(values, dtype=values.dtype)

    def rule(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
        """The tangent is a product with the gradient, so its transpose is the gradient."""
        known, stacks = primals
        moved = [i for i, t in enumerate(tangents[0]) if not _is_zero(t)]
        slid = [i for i, t in tangents[1].items() if not _is_zero(t)]

        def body(total: Any, i: Any) -> tuple[Any, Any]:
            here = _at(stacks, i)

            def value(some: list[Any], data: list[Any]) -> Scalar:
                every = dict(enumerate(known)) | dict(zip(moved, some, strict=True))
                return run([*every.values()], here | dict(zip(slid, data, strict=True)), i)

            at = [known[i] for i in moved], [here[i] for i in slid]
            found, (grads, of_data) = jax.value_and_grad(value, argnums=(0, 1))(*at)
            total = [a + g.astype(a.dtype) for a, g in zip(total, grads, strict=True)]
            return total, (found, of_data)

        start = tree.zeros_accumulated([known[i] for i in moved])
        total, (values, of_data) = scan(body, start)
        of_data = [jnp.swapaxes(g, 0, 1) for g in of_data]
        grads = tree.cast_like(total, [known[i] for i in moved]) + of_data
        pushed = [tangents[0][i] for i in moved] + [tangents[1][i] for i in slid]
        tangent = tree.vdot(grads, pushed) / parts
        value = jnp.mean(values, dtype=values.dtype)
        return value, jnp.asarray(tangent).astype(value.dtype)

    mean.defjvp(rule, symbolic_zeros=True)
    return mean


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
