"""Checks of losses, trees and batches, made when a function is traced.

Every check costs at most an abstract evaluation, never a computation on the device.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Batch, Hparams, Params
from bilevel.ground.batches import array_dtype, check_batch
from bilevel.ground.settings import check_takes, is_function
from bilevel.ground.traced import depends
from bilevel.ground.tree import accumulator_dtype, paths
from bilevel.problem.conditions import Composite, Condition, FixedPoint
from bilevel.problem.two_losses import Problem

SPLIT_MODEL = (
    "Split the model into its trainable floats and the rest (keys, counters, masks): `params, "
    "rest, merge = bilevel.split_nnx(model)`, or `split_linen`, `split_equinox`."
)


def check_inexact(tree: Any, name: str, remedy: str) -> None:
    """Refuse leaves that are not real floating-point arrays, named by their path.

    ``remedy`` is what to do about whole numbers; other kinds have remedies of their own.
    """
    for path, leaf in paths(tree, name):
        try:
            dtype = array_dtype(leaf)
        except TypeError:
            raise TypeError(
                f"{path} is a {type(leaf).__name__}, expected a real floating-point array. "
                + (SPLIT_MODEL if name.endswith("params") and name != "hparams" else _NO_NUMBER)
            ) from None
        if jnp.issubdtype(dtype, jnp.floating):
            continue
        if jnp.issubdtype(dtype, jnp.complexfloating):
            remedy = (
                "Pass the real and the imaginary part as two real leaves, and join them with "
                "`jax.lax.complex` inside the loss."
            )
        elif jnp.issubdtype(dtype, jnp.bool_) and name == "hparams":
            remedy = (
                "A switch has no derivative: give both cases a real weight, or keep it out of "
                "`hparams` and compare two runs."
            )
        raise TypeError(f"{path} has dtype {dtype}, expected a real floating-point dtype. {remedy}")


_NO_NUMBER = (
    "It is not a number: keep it out of the tree, in a closure of the losses or in a static part "
    "of the model."
)


def check_response(response: Any) -> None:
    """Refuse what is not a value with a ``vjp``: a solver, or a class without its brackets."""
    if isinstance(response, type) or not hasattr(response, "vjp"):
        raise TypeError(
            "`response` must be a response such as `Implicit(CG())` (a solver alone is none, and a "
            f"class must be called), got {response!r}."
        )


def check_losses(**losses: Any) -> None:
    """Refuse losses that cannot be called."""
    for name, loss in losses.items():
        if not is_function(loss):
            hint = (
                " A condition is differentiated by `hypergrad` and `with_response`; this trains."
                if isinstance(loss, Condition)
                else ""
            )
            raise TypeError(
                f"`{name}` must be a function loss(params, hparams, batch), got {loss!r}.{hint}"
            )


_OUTER = (
    " If it returns (scalar, aux), pass `has_aux=True`; if (scalar, model_state), `has_state=True`."
)
_INNER = (
    " The inner loss has no auxiliary output; with `has_state=True` it returns (scalar, "
    "model_state)."
)


def check_inner_problem(inner: Any, has_state: bool = False) -> None:
    """Refuse what is neither a loss nor a condition."""
    if not isinstance(inner, Condition):
        check_losses(inner=inner)
    elif has_state:
        raise ValueError(
            f"`has_state=True` goes with losses, but `inner` is a {type(inner).__name__}: leave "
            "it out, and read frozen statistics from `hparams`, `batch` or a closure."
        )


def require_loss(problem: Problem, who: str) -> None:
    """Refuse a condition where a loss is needed."""
    if not problem.has_loss:
        raise TypeError(
            f"`inner` is a {type(problem.inner).__name__}, but {who} needs a loss: use `Implicit("
            "...)`, which differentiates conditions."
        )


def check_scalar(shape: Any, name: str, hint: str = "") -> None:
    """Refuse a loss that is not one real floating-point number."""
    leaf = shape
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"`{name}` must return a scalar, got {jax.tree.structure(shape)}.{hint}")
    if leaf.shape != ():
        raise TypeError(
            f"`{name}` must return a scalar, got an array of shape {leaf.shape}: "
            f"take the mean or the sum over examples.{hint}"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            hint = (
                " Where `inner_batch` or `outer_batch` holds complex numbers, end the loss with "
                "the real part, or with `jnp.abs(...) ** 2`."
            )
        raise TypeError(
            f"`{name}` must return a real floating-point scalar, got {leaf.dtype}.{hint}"
        )


def _raw_shape(problem: Problem, which: str, *args: Any) -> Any:
    """Shape of the scalar slot of a loss, with the structure it promised checked."""
    loss = getattr(problem, which)
    pair = problem.has_state or (which == "outer" and problem.has_aux)
    args = (*args, *problem.state_arguments)
    check_loss_arguments(loss, which, problem.has_state)
    numbers: list[Any] = []

    def call(*args: Any) -> Any:
        out = loss(*args)
        for leaf in jax.tree.leaves(out):
            if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
                raise TypeError(
                    f"`{which}` must return a scalar, got {leaf!r} of type {type(leaf).__name__}: "
                    "return JAX arrays only."
                )
        numbers.append(out[0] if pair and isinstance(out, tuple) and out else out)
        return out

    shape = jax.eval_shape(call, *args)
    if isinstance(numbers[-1], (bool, int, float, complex)):
        raise TypeError(
            f"`{which}` must return a JAX scalar, got the Python number {numbers[-1]!r}: it does "
            "not depend on the parameters. Compute the loss with `jnp` operations on the "
            "arguments, without `float(...)` or `.item()`."
        )
    if not pair:
        return shape
    if not isinstance(shape, tuple) or len(shape) != 2:
        promised = "(scalar, model_state)" if problem.has_state else "(scalar, aux)"
        raise TypeError(
            f"`{which}` must return a pair {promised} as `has_state`/`has_aux` promise, "
            f"got {jax.tree.structure(shape)}."
        )
    if problem.has_state:
        new_state = shape[1]
        if which == "outer" and problem.has_aux:
            if not isinstance(new_state, tuple) or len(new_state) != 2:
                raise TypeError(
                    "with `has_state` and `has_aux`, `outer` must return "
                    f"(scalar, (model_state, aux)), got {jax.tree.structure(shape)}."
                )
            new_state = new_state[0]
        check_same_tree(new_state, problem.model_state, f"model state returned by `{which}`")
    return shape[0]


def check_loss_arguments(loss: Any, which: str, has_state: bool, positions: int = 1) -> None:
    """Refuse a loss that cannot be called with as many arguments as it will get.

    ``positions``: how many hyperparameter arguments there are.
    """
    names = ["hparams"] if positions == 1 else [f"hparams_{i + 1}" for i in range(positions)]
    call = f"loss({', '.join(['params', *names, 'batch', *['model_state'] * has_state])})"
    hint = (
        "With `has_state=True` both losses receive the model state: add the argument, or leave "
        "`has_state` out."
        if has_state
        else "If it reads and returns mutable model state, pass `has_state=True` and "
        "`model_state=...`; bind other arguments with `functools.partial`."
    )
    check_takes(which, loss, call, hint)


def check_same_tree(got: Any, expected: Any, name: str) -> None:
    """Refuse another tree structure or other leaf shapes, naming the first leaf that differs."""
    if jax.tree.structure(got) != jax.tree.structure(expected):
        raise ValueError(
            f"{name} has another tree structure than expected: got {jax.tree.structure(got)}, "
            f"expected {jax.tree.structure(expected)}."
        )
    for (path, a), (_, b) in zip(paths(got, name), paths(expected, name), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"{path} has shape {jnp.shape(a)}, expected {jnp.shape(b)}.")


def check_returned(returned: Any, like: Any, name: str) -> None:
    """Refuse what the function ``name`` gave in place of a tree of arrays shaped like ``like``."""
    if returned is None:
        raise TypeError(f"`{name}` returned None: end it with a `return`.")
    result = f"the result of `{name}`"
    for path, leaf in paths(returned, result):
        try:
            array_dtype(leaf)
        except TypeError:
            raise TypeError(
                f"{path} is a {type(leaf).__name__}, expected an array of numbers: return a tree "
                "of JAX arrays."
            ) from None
    check_same_tree(returned, like, result)


def check_split(
    split: Any, problem: Problem, params: Params, hparams: Hparams, batch: Batch
) -> None:
    """Refuse the parts of an inner loss (``GaussNewton``) that are not of the declared form."""

    def parts(params: Params, hparams: Hparams, batch: Batch, *state: Any) -> None:
        z = split.model(params, hparams, batch, *state)
        if not jax.tree.leaves(z):
            raise TypeError(
                f"`model` must return the outputs (arrays), got {jax.tree.structure(z)}: end it "
                "with a `return`."
            )
        values = {"output_loss": split.output_loss(z, hparams, batch)}
        if split.penalty is not None:
            values["penalty"] = split.penalty(params, hparams)
        for name, value in values.items():
            if not isinstance(value, float):  # a constant has a derivative, zero
                check_scalar(value, name, " End it with a `return` of a sum or a mean.")

    check_takes(
        "model", split.model, f"model(params, hparams, batch{', model_state' * problem.has_state})"
    )
    check_takes("output_loss", split.output_loss, "output_loss(outputs, hparams, batch)")
    if split.penalty is not None:
        check_takes("penalty", split.penalty, "penalty(params, hparams)")
    jax.eval_shape(parts, params, hparams, batch, *problem.state_arguments)


def check_problem(
    problem: Problem, params: Params, hparams: Hparams, inner_batch: Batch, outer_batch: Batch
) -> None:
    """All checks that need no response: trees, dtypes, batches, and the two losses' outputs."""
    check_point(params, hparams)
    check_batch(inner_batch, "inner_batch")
    check_batch(outer_batch, "outer_batch")
    check_scalar(_raw_shape(problem, "outer", params, hparams, outer_batch), "outer", _OUTER)


def check_point(params: Params, hparams: Hparams) -> None:
    """Refuse parameters and hyperparameters that are not trees of real floating-point arrays."""
    check_inexact(
        params,
        "params",
        SPLIT_MODEL,
    )
    check_inexact(
        hparams,
        "hparams",
        "A gradient exists for real numbers only: relax the integer to a float, or tune it "
        "through `BestResponse`, which samples it.",
    )
    if not jax.tree.leaves(params):
        raise ValueError(
            "`params` has no leaves: there is no inner variable to respond. Pass the parameters of "
            "the model."
        )
    if not jax.tree.leaves(hparams):
        raise ValueError(
            "`hparams` has no leaves: there is no hyperparameter to differentiate. Pass at least "
            "one number."
        )


def check_inner(problem: Problem, params: Params, hparams: Hparams, batch: Batch) -> None:
    """The inner loss on *one* batch (a response that takes several checks its first)."""
    if isinstance(problem.inner, Composite):
        check_scalar(_raw_shape(problem.smooth, "inner", params, hparams, batch), "inner", _INNER)
        check_prox(problem.inner.prox, params, hparams)
        return
    if not problem.has_loss:
        name = "step" if isinstance(problem.inner, FixedPoint) else "equation"
        function = getattr(problem.inner, name)

        def returned(*args: Any) -> Any:
            out = function(*args)
            check_returned(out, params, name)
            check_inexact(out, f"the result of `{name}`", "Return real floating-point arrays.")
            return out

        jax.eval_shape(returned, params, hparams, batch)
        return
    check_scalar(_raw_shape(problem, "inner", params, hparams, batch), "inner", _INNER)


def check_prox(prox: Any, params: Params, hparams: Hparams) -> None:
    """Refuse a proximal operator that does not return a tree like ``params``."""
    one = jnp.ones(
        (), jnp.result_type(*map(accumulator_dtype, map(jnp.result_type, jax.tree.leaves(params))))
    )

    def returned(*args: Any) -> Any:
        out = prox(*args)
        check_returned(out, params, "prox")
        return out

    jax.eval_shape(returned, params, hparams, one)


def check_is_read(
    problem: Problem, params: Params, hparams: Hparams, inner_batch: Batch, outer_batch: Batch
) -> None:
    r"""Refuse hyperparameters whose hypergradient is zero by structure under implicit responses.

    A leaf counts as read when :math:`Bᵀ v` depends on :math:`v` in it, or
    :math:`∂_λ f` on the outer cotangent.
    """

    def direct(cotangent: Any, params: Params, hparams: Hparams, batch: Batch) -> Hparams:
        value, pull = jax.vjp(lambda lam: problem.outer_loss(params, lam, batch)[0], hparams)
        return pull(cotangent.astype(value.dtype))[0]

    def indirect(v: Any, params: Params, hparams: Hparams, batch: Batch) -> Hparams:
        return problem.cross_vjp(params, hparams, batch, v)

    one = jax.ShapeDtypeStruct((), jnp.float32)
    through_outer = depends(direct, one, params, hparams, outer_batch)
    through_inner = depends(indirect, params, params, hparams, inner_batch)
    dead = [
        path
        for (path, a), (_, b) in zip(
            paths(through_outer, "hparams"), paths(through_inner, "hparams"), strict=True
        )
        if not (a or b)
    ]
    if dead:
        raise ValueError(
            unread_message(
                dead,
                "neither the outer loss nor the gradient of the inner loss depends on it",
            )
        )


def unread_message(dead: list[str], why: str) -> str:
    """What to say of hyperparameters that an implicit response cannot see."""
    return (
        f"No derivative reaches {', '.join(dead)}: {why} differentiably, so its implicit "
        "hypergradient is zero by structure. A learning rate, a momentum or another setting of "
        "the inner optimizer needs `Unroll(inner_tx=lambda hparams: ..., steps=...)`; a sampled "
        "or discrete one (dropout by a mask, a number of holes) needs `BestResponse`. Remove it "
        "from `hparams` if it is not to be tuned."
    )
