"""Optimizers that read hyperparameters: how they are built, refreshed and asked for a step."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.ground.aliases import Batch, Hparams, Params, Scalar, Vector
from bilevel.ground.settings import check_takes, is_function
from bilevel.ground.traced import contains_primitive, depends
from bilevel.inner.roots import flat_roots

InnerTx = optax.GradientTransformation | Callable[[Hparams], optax.GradientTransformation]


def check_inner_tx(inner_tx: Any) -> None:
    """Refuse what is neither an optax transformation nor a function of hyperparameters."""
    if hasattr(inner_tx, "init") and hasattr(inner_tx, "update"):
        return
    if not is_function(inner_tx):
        raise TypeError(
            "`inner_tx` must be an optax transformation, or a function hparams -> transformation, "
            f"got {inner_tx!r}."
        )
    check_takes(
        "inner_tx",
        inner_tx,
        "inner_tx(hparams)",
        "Pass the optimizer itself, such as `optax.sgd(0.1)` (not its `update`), or a function "
        "`lambda hparams: optax.sgd(hparams['rate'])`.",
    )


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


def build_tx(inner_tx: InnerTx, hparams: Hparams) -> optax.GradientTransformation:
    """The inner optimizer at these hyperparameters."""
    given: Any = inner_tx
    if hasattr(given, "init") and hasattr(given, "update"):
        return given
    try:
        tx = given(hparams)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        raise concrete_setting(error) from error
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"`inner_tx(hparams)` must return an optax transformation, got {tx!r}.")
    return tx


def concrete_setting(error: Exception) -> TypeError:
    """What to say when an optimizer wants a Python number where it got a tuned one."""
    return TypeError(
        "`inner_tx` uses a hyperparameter where the optimizer needs a concrete Python number: an "
        "integer setting (a number of steps, an order, `every_k_schedule`) or a branch on its "
        "value. An integer has no derivative: keep it out of `hparams`. The peak of a warm-up "
        "schedule is tested in Python by optax: build the schedule with peak 1 and scale it, "
        "`lambda count: hparams['peak'] * schedule(count)`, or join the parts with "
        "`optax.join_schedules`. Write other schedules with `jnp` operations on a real number, "
        "and build optimizers that test their arguments through `optax.inject_hyperparams`. "
        f"({type(error).__name__})"
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


def compute_updates(
    tx: optax.GradientTransformation,
    grads: Vector,
    opt_state: Any,
    params: Params,
    *,
    value: Scalar,
    value_fn: Callable[[Params], Scalar],
    name: str = "inner_tx",
    given: dict[str, Any] | None = None,
) -> tuple[Vector, Any]:
    """``tx.update``, with the loss for optimizers that ask for it; differentiable at zero.

    Args:
      value: the loss whose gradient ``grads`` is (``polyak_sgd``, ``reduce_on_plateau``).
      value_fn: ``value_fn(params) -> loss`` on the same batch (line searches: ``lbfgs``).
      name: of ``tx``, for messages.
      given: what the loss reads beside the parameters, for optimizers that read it themselves:
        ``hparams`` and ``batch``.

    Roots are taken as in :mod:`bilevel.inner.roots`, except where the update evaluates the
    loss again: the user's function keeps its own derivatives.
    """
    evaluated = False

    def counted_value_fn(params: Params) -> Scalar:
        nonlocal evaluated
        evaluated = True
        return value_fn(params)

    def update(grads: Vector, opt_state: Any, params: Params, value: Scalar) -> tuple[Vector, Any]:
        extra = {"value": value, "grad": grads, "value_fn": counted_value_fn}
        return _update(tx, grads, opt_state, params, extra, given or {}, name)

    grads = _gradient_of_fast(grads, opt_state, params)
    return flat_roots(update, unless=lambda: evaluated)(grads, opt_state, params, value)


def _update(
    tx: optax.GradientTransformation,
    grads: Vector,
    opt_state: Any,
    params: Params,
    extra: dict[str, Any],
    given: dict[str, Any],
    name: str,
) -> tuple[Vector, Any]:
    """``tx.update`` with ``extra``, and with ``given`` too if it does not go without."""
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return tx.update(grads, opt_state, params)
    accepted = inspect.signature(tx.update).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted)
    names = {p.name for p in accepted}
    failure = None
    # What is given not at once: a line search refuses arguments that it does not know.
    for arguments in (extra, {**extra, **given}):
        taken = {k: v for k, v in arguments.items() if takes_any or k in names}
        try:
            return tx.update(grads, opt_state, params, **taken)
        except (TypeError, ValueError) as error:
            words = ("keyword-only argument", "must be provided")
            if not any(word in str(error) for word in words):
                raise
            failure = error
    raise TypeError(
        f"`{name}` needs an argument that steps do not have: they pass `value`, "
        "`grad` and `value_fn`, and those of training on a loss (`descend`, `alternate`, "
        "`Unroll`) `hparams` and `batch`. Use an optimizer that needs the gradient alone, or "
        f"bind the argument in a transformation of your own. ({failure})"
    ) from failure


def _gradient_of_fast(grads: Vector, opt_state: Any, params: Params) -> Vector:
    """``optax.lookahead`` moves a pair of parameters by the gradient of the fast ones."""

    def is_lookahead(node: Any) -> bool:
        return isinstance(node, optax.LookaheadState)

    if not any(map(is_lookahead, jax.tree.leaves(opt_state, is_leaf=is_lookahead))):
        return grads
    if not isinstance(params, optax.LookaheadParams):
        raise TypeError(
            "`inner_tx` is `optax.lookahead`, which moves a pair: pass `optax.LookaheadParams."
            "init_synced(params)` as `params`, and write `inner` with `params.fast`, `outer` with "
            f"`params.slow`. Got {jax.tree.structure(params)}."
        )
    return grads.fast  # pyright: ignore[reportAttributeAccessIssue]


def reads_value(
    tx: optax.GradientTransformation,
    params: Params,
    loss: Scalar,
    hparams: Hparams = None,
    batch: Batch = None,
) -> bool:
    """Whether a step of ``tx`` depends on the loss it is told, not only on its gradient."""
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return False

    def step(value: Scalar, params: Params, batch: Batch) -> Any:
        return compute_updates(
            tx, params, tx.init(params), params, value=value, value_fn=lambda _: 1.0 * value,
            given={"hparams": hparams, "batch": batch},
        )  # fmt: skip

    return any(jax.tree.leaves(depends(step, loss, params, batch)))


def explain_search(error: Exception, tx: optax.GradientTransformation, params: Params) -> Exception:
    """``error``, or what to say where it comes from a loop of unknown length in ``tx``.

    Line searches hold one, which reverse mode cannot differentiate.
    """

    def step(params: Params) -> Any:
        def value_fn(w: Params) -> Scalar:
            return optax.tree.norm(w, squared=True)

        return compute_updates(
            tx, params, tx.init(params), params, value=value_fn(params), value_fn=value_fn
        )

    def searches() -> bool:
        try:
            return contains_primitive(step, params, prefix="while")
        except TypeError:  # it reads the batch as well, as `gauss_newton`: the loop is its own
            return True

    if "while_loop" not in str(error) or not searches():
        return error
    return ValueError(
        "`inner_tx` has a loop whose length is decided while it runs (a line search), which "
        "reverse mode cannot differentiate. Use `Unroll(..., mode='forward')` or `Evolution`, or "
        "an optimizer without a search, as `optax.lbfgs(learning_rate, linesearch=None)`."
    )
