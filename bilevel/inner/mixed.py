r"""The inner gradient as one primitive whose backward rule is forward-over-reverse.

Differentiating an unrolled step in reverse needs, for a cotangent v of the gradient,

.. math:: v ↦ H v,  v ↦ Bᵀ v .

Automatic reverse-over-reverse keeps the activations of every step's backward pass for that.
Second derivatives commute, so one JVP of :math:`∇_{(w,λ)} h` along :math:`(v, 0)`
gives both products from nothing but the step's inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, ModelState, Params
from bilevel.ground.traced import BACKWARD_RULE, contains_primitive, pushes_tangents
from bilevel.problem.two_losses import Problem


def is_float(leaf: Any) -> bool:
    """Whether a leaf can carry a derivative (not an integer, a boolean or a PRNG key)."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def close_loss(
    problem: Problem, params: Params, hparams: Hparams, batch: Batch, model_state: ModelState
) -> tuple[Callable[..., Any], list[Any]]:
    """The inner loss with everything it closes over turned into an argument.

    Returns ``loss(consts, params, hparams, batch, model_state) -> (value, model_state)`` and
    ``consts``. A custom rule that closes over the tracers of an enclosing ``jit`` cannot be
    used inside a ``scan``; one that receives them can. The user's function is traced once.
    """
    args = (params, hparams, batch, model_state)
    closed, shape = jax.make_jaxpr(problem.inner_loss_and_state, return_shape=True)(*args)
    treedef = jax.tree.structure(shape)

    def loss(consts: list[Any], *args: Any) -> Any:
        run = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))
        return jax.tree.unflatten(treedef, run(*jax.tree.leaves(args)))

    return loss, list(closed.consts)


def mixed_gradient(
    loss: Callable[..., Any],
    select: Callable[[Batch, Any], Batch],
    with_state: bool,
    with_value: bool = False,
) -> Callable[..., Any]:
    r"""``gradient(consts, params, hparams, model_state, batches, index)``.

    Returns ``(grads, value, model_state)``. The batches travel whole, with an index, so that
    what a scan saves for its backward pass is a number per step instead of a copy of the data.
    No derivative flows through ``value``, which is there to be looked at, unless ``with_value``.

    Args:
      loss: from :func:`close_loss`.
      select: ``select(batches, index) -> batch``.
      with_state: whether the returned model state depends on anything.
      with_value: whether the value is used (by an optimizer that asks for the loss).

    Cost of the backward rule: about 3 gradients, one forward-over-reverse pass of memory, plus
    a backward pass through the model state where there is one.
    """

    def evaluate(consts, params, hparams, model_state, batches, index):
        return loss(consts, params, hparams, select(batches, index), model_state)

    def forward_only(*args):
        (value, new_state), grads = jax.value_and_grad(evaluate, argnums=1, has_aux=True)(*args)
        return grads, value, new_state

    gradient = jax.custom_vjp(forward_only)

    def forward(*args):
        return forward_only(*args), args

    def backward(args, cotangents):
        v, value_cotangent, state_cotangent = cotangents
        leaves, treedef = jax.tree.flatten(args)
        floats = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

        def rebuilt(values: list[Any]) -> tuple:
            new = list(leaves)
            for i, value in zip(floats, values, strict=True):
                new[i] = value
            return jax.tree.unflatten(treedef, new)

        def all_grads(params):
            values = [jax.tree.leaves((args[0], params, *args[2:]))[i] for i in floats]
            return jax.grad(lambda values: evaluate(*rebuilt(values))[0])(values)

        def gradient_in_params(values: list[Any]) -> Params:
            return jax.grad(lambda *args: evaluate(*args)[0], argnums=1)(*rebuilt(values))

        v = tree.cast_like(v, args[1])
        has_rule = contains_primitive(evaluate, *args, prefix=BACKWARD_RULE)
        if has_rule and not pushes_tangents(all_grads, args[1], v):
            # No tangent can be pushed: reverse-over-reverse, which is the same product.
            values = [leaves[i] for i in floats]
            found = jax.vjp(gradient_in_params, values)[1](v)[0]
            first = all_grads(args[1]) if with_value else None
        else:
            first, found = jax.jvp(all_grads, (args[1],), (v,))
        if with_value:
            found = tree.axpy(value_cotangent, first, found)
        if with_state:

            def new_state(values):
                state = jax.tree.leaves(evaluate(*rebuilt(values))[1])
                return [leaf for leaf in state if is_float(leaf)]

            through = [c for c in jax.tree.leaves(state_cotangent) if is_cotangent(c)]
            if through:
                pull = jax.vjp(new_state, [leaves[i] for i in floats])[1]
                found = [a + b for a, b in zip(found, pull(through)[0], strict=True)]
        out = [None] * len(leaves)
        for i, value in zip(floats, found, strict=True):
            out[i] = value
        return jax.tree.unflatten(treedef, out)

    gradient.defvjp(forward, backward)
    return gradient


def is_cotangent(leaf: Any) -> bool:
    """Whether a cotangent leaf belongs to a float (integers have the empty dtype float0)."""
    return getattr(leaf, "dtype", None) != jax.dtypes.float0
