"""Does a hyperparameter reach the responded parameters at all? Asked of the traced program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.aliases import Batch, Hparams, Params
from bilevel.inner.mixed import is_float
from bilevel.problem import Problem
from bilevel.traced import depends
from bilevel.tree import paths

InnerTx = optax.GradientTransformation | Callable[[Hparams], optax.GradientTransformation]


def check_inner_tx(inner_tx: Any) -> None:
    """Refuse what is neither an optax transformation nor a function of hyperparameters."""
    if hasattr(inner_tx, "init") and hasattr(inner_tx, "update"):
        return
    if not callable(inner_tx):
        raise TypeError(
            "`inner_tx` must be an optax transformation, or a function hparams -> transformation, "
            f"got {inner_tx!r}."
        )


def build_tx(inner_tx: InnerTx, hparams: Hparams) -> optax.GradientTransformation:
    """The inner optimizer at these hyperparameters."""
    given: Any = inner_tx
    if hasattr(given, "init") and hasattr(given, "update"):
        return given
    try:
        tx = given(hparams)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        raise integer_setting(error) from error
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"`inner_tx(hparams)` must return an optax transformation, got {tx!r}.")
    return tx


def integer_setting(error: Exception) -> TypeError:
    """What to say when an optimizer wants a Python number where it got a tuned one."""
    return TypeError(
        "`inner_tx` uses a hyperparameter where the optimizer needs a concrete Python number: an "
        "integer setting (a number of steps, an order, `every_k_schedule`) or a branch on its "
        "value. Such a setting has no derivative: keep it out of `hparams`, write the schedule "
        "with `jnp` operations on a real number, or build optimizers that test their arguments "
        f"in Python through `optax.inject_hyperparams`. ({type(error).__name__})"
    )


def refresh_injected(opt_state: Any, tx: optax.GradientTransformation, params: Params) -> Any:
    """``opt_state`` with injected hyperparameters taken from ``tx`` as it is now.

    ``optax.inject_hyperparams`` keeps its values in the state and reads them there. A state
    carried from an earlier call would hide the current hyperparameters behind the old ones.
    """
    fresh = jax.tree_util.tree_flatten_with_path(tx.init(params))[0]
    old, treedef = jax.tree.flatten(opt_state)

    def injected(path: tuple[Any, ...]) -> bool:
        return any(getattr(part, "name", None) == "hyperparams" for part in path)

    leaves = [
        jnp.asarray(new).astype(jnp.result_type(value)) if injected(path) else value
        for (path, new), value in zip(fresh, old, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def _loses_derivative(equation: Any) -> bool:
    """Operations that hide a dependence a user would want differentiated.

    ``sign`` is not among them: its derivative is truthfully zero (lion's b1).
    """
    name = equation.primitive.name
    if name == "convert_element_type":
        return not jnp.issubdtype(equation.params["new_dtype"], jnp.inexact)
    return name in ("stop_gradient", "floor", "ceil", "round", "lt", "le", "gt", "ge", "eq", "ne")


def check_reaches(
    problem: Problem,
    advance: Callable[[Hparams], Any],
    params: Params,
    hparams: Hparams,
    outer_batch: Batch,
    *,
    differentiable: bool = True,
) -> None:
    """Refuse hyperparameters that nothing depends on: their derivative would be silently zero.

    Args:
      advance: ``advance(hparams)``, one training step, everything it changes.
      differentiable: a derivative must reach them (reverse and forward modes); otherwise any
        dependence will do (evolution strategies).
    """

    def through_outer(ct: Any, lam: Hparams) -> Hparams:
        value, pull = jax.vjp(lambda lam: problem.outer_loss(params, lam, outer_batch)[0], lam)
        return pull(ct.astype(value.dtype))[0]

    def floats(lam: Hparams) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(advance(lam)) if is_float(leaf)]

    def through_steps(cts: Any, lam: Hparams) -> Hparams:
        return jax.vjp(floats, lam)[1](cts)[0]

    try:
        shapes = jax.eval_shape(floats, hparams)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        raise integer_setting(error) from error
    one = jax.ShapeDtypeStruct((), jnp.float32)
    alive = jax.tree.leaves(depends(through_outer, one, hparams))
    if differentiable:
        stepped = jax.tree.leaves(depends(through_steps, shapes, hparams))
        alive = [a or b for a, b in zip(alive, stepped, strict=True)]
    leaves, treedef = jax.tree.flatten(hparams)

    def read(i: int) -> bool:
        def value(leaf: Any, others: list[Any]) -> Any:
            return floats(jax.tree.unflatten(treedef, [*others[:i], leaf, *others[i:]]))

        others = leaves[:i] + leaves[i + 1 :]
        blocked = _loses_derivative if differentiable else None
        return any(jax.tree.leaves(depends(value, leaves[i], others, blocked=blocked)))

    names = [path for path, _ in paths(hparams, "hparams")]
    dead = [name for i, name in enumerate(names) if not alive[i] and not read(i)]
    if dead:
        raise ValueError(
            f"No derivative reaches {', '.join(dead)}: neither a training step nor the outer loss "
            "depends on it differentiably, so its hypergradient would be silently zero. Usual "
            "causes: `inner_tx` is a fixed transformation (pass a function `lambda hparams: "
            "optax.sgd(hparams['lr'])`); a schedule given to `optax.inject_hyperparams`, which "
            "is recomputed at every update and ignores a value set in the state; a "
            "`stop_gradient`, a rounding or a comparison on the way. Remove it from `hparams` if "
            "it is not to be tuned, or use `Evolution` for what has no derivative."
        )
