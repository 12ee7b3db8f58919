r"""``jax.grad`` through a solver of the user's own, by a response at the point it returns."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, Params, Scalar, Stats, Vector
from bilevel.ground.batches import check_batch, select_batch
from bilevel.ground.keys import check_key
from bilevel.ground.settings import (
    check_flag,
    check_number,
    check_real,
    check_settings_used,
    check_takes,
    concrete,
    is_function,
    out_of_range,
)
from bilevel.ground.status import STATIONARITY, Status, status_of
from bilevel.ground.traced import BACKWARD_RULE, contains_primitive
from bilevel.hypergradient.attach import attach_implicit, attach_response, differentiates_fully
from bilevel.hypergradient.base import Response
from bilevel.hypergradient.best_response import BestResponse
from bilevel.hypergradient.implicit import Implicit
from bilevel.hypergradient.rules import Marks
from bilevel.problem.conditions import Condition
from bilevel.problem.knots import knots
from bilevel.problem.two_losses import Problem, largest_curvature
from bilevel.problem.validate import (
    check_inexact,
    check_inner,
    check_inner_problem,
    check_response,
    check_same_tree,
)


class SolveInfo(NamedTuple):
    r"""What ``with_response(..., has_status=True)`` says of the point that ``solve`` returned.

    Attributes:
      result: int32 :class:`~bilevel.Status`: ``not_stationary`` where an implicit response would
        differentiate a point that is not a minimum, ``nonfinite_input`` for NaN or infinite
        parameters or inner gradients, ``invalid_setting`` for a traced setting of the response,
        ``knot`` where a condition has no derivative.
        :func:`~bilevel.raise_for_status` takes it.
      stats: for an implicit response ``stationarity`` :math:`‖∇_w h‖` and
        ``relative_stationarity`` :math:`‖∇_w h‖ / (c ‖w‖)`, with c the curvature that
        three power iterations find; of a condition ``knots``, how many numbers are at a threshold.
        Empty for others, which assume no minimum.
    """

    result: jax.Array
    stats: Stats


def with_response(
    solve: Callable[[Params, Hparams, Batch], Any],
    inner: Loss | Condition,
    response: Response,
    *,
    has_aux: bool = False,
    has_status: bool = False,
    on_failure: Literal["nan", "keep"] = "nan",
    residual: float | None = None,
) -> Callable[..., Any]:
    r"""``solve``, made differentiable with respect to the hyperparameters and the data.

    .. math::
        w = solve(w_0, λ, batch),
        \bar θ = (∂w/∂θ)ᵀ \bar w
        for  θ = λ, batch,  \bar w_0 = 0

    Args:
      solve: ``solve(params, hparams, inner_batch) -> params``, from a start to (near) a
        minimizer of ``inner``. It is only called, never differentiated: outside ``jit`` it may
        be ordinary Python (a loop with an early stop, another library), inside it must trace.
      inner: the loss that ``solve`` minimizes, ``inner(params, hparams, batch) -> scalar``; or
        the condition that it solves, a :class:`~bilevel.Composite`, :class:`~bilevel.FixedPoint` or
        :class:`~bilevel.Root`.
      response: applied at the point that ``solve`` returns, e.g. ``Implicit(CG())``. It starts
        cold in every call.
      has_aux: ``solve`` returns ``(params, aux)``; ``aux`` is passed on without a derivative.
      has_status: return a :class:`SolveInfo` too: arrays, under every transformation.
      on_failure: what a derivative is where its linear solve fails (status ``singular``,
        ``negative_curvature``, ``diverged`` or ``invalid_setting``): NaN, or what the solver has
        (``"keep"``). At a ``knot`` it is that of one side: a generalized derivative, and no failure
        of the solve.
      residual: the largest ``residual_norm / rhs_norm`` of a derivative's linear solve that is no
        failure; beyond, the derivative is NaN. ``None`` accepts any: solves that spent their
        budget, short series, and ``Identity()``, which never looks at the matrix.

    Returns:
      ``fn(params, hparams, inner_batch, *, key=None) -> params``, with the values of ``solve``;
      ``(params, aux)``, ``(params, info)`` or ``(params, aux, info)`` with the options above.
      ``key`` goes to a response that draws random numbers. The derivative with respect to the
      starting ``params`` is zero, because a minimizer does not depend on where the search began.

    **Derivatives.** With ``Implicit(...)`` on one fixed batch, in ``hparams`` and in the floating
    leaves of ``inner_batch`` (``jax.grad(..., argnums=...)`` chooses, and what it does not choose
    costs nothing), of every order and in both modes (``jax.grad``, ``jax.jvp``, ``jax.hessian``,
    ``jax.grad`` of ``jax.grad``), under ``jit``, ``vmap`` and ``scan`` (of an ``inner`` that
    contains a function with ``jax.custom_vjp`` the first, in reverse mode). Those in the data
    give influences of examples, degrees of freedom, and Stein's unbiased risk. The rule is applied
    again to its own derivative, so each order costs further solves by the same solver. All of them
    are exact where the solver and the operator are. A truncated solver (``Neumann(5)``,
    ``Identity()``) approximates :math:`A^{-1}` in each of these solves: higher derivatives then
    approximate those of the solution, and are not the derivatives of the approximate first one (a
    Hessian need not be symmetric). Other responses, and ``fresh_batches=True``, have a first
    derivative in ``hparams``, in reverse mode; more raises ``TypeError``, and one in the data
    ``ValueError``.

    **Trust.** Outside ``jit`` a solution that is not finite warns (``RuntimeWarning``), as does
    an implicit response at a point that is not a minimum; inside, ask for ``has_status=True``. The
    linear solve of a derivative happens inside automatic differentiation, where there is no place
    for a status, so a derivative whose solve fails is NaN: at a saddle, at a maximum, or where the
    inner loss is flat in a direction in which the outer one has a gradient. A solve that only
    spent its budget, or a truncated one, is marked where ``residual`` is given.
    :func:`~bilevel.hypergrad_solve` tells more, at ``params=w``.

    Raises:
      TypeError, ValueError: for trees, dtypes and shapes that do not fit; when a derivative is
        asked with respect to ``key`` or a value that ``inner`` or ``response`` closes over (the
        answer would silently be wrong); and for a leaf that the response cannot see, whose
        derivative would be zero by structure.

    Cost: that of ``solve``, and for each derivative what ``response`` costs, however many
    arguments it is asked in. ``residual`` takes one product more. The check of an
    implicit point takes one inner gradient and three products, outside ``jit`` or where its
    status is used.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def ridge(w, lam, batch):
      ...     x, y = batch
      ...     return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * lam * jnp.sum(w**2)
      >>> def exact(w, lam, batch):
      ...     x, y = batch
      ...     return jnp.linalg.solve(x.T @ x + lam * jnp.eye(x.shape[1]), x.T @ y)
      >>> solve = bilevel.with_response(exact, ridge, bilevel.Implicit(bilevel.Dense()))
      >>> x, y = jnp.eye(2), jnp.array([1.0, 2.0])
      >>> total = lambda lam: jnp.sum(solve(jnp.zeros(2), lam, (x, y)))  # 3 / (1 + lam)
      >>> bool(jnp.allclose(jax.grad(total)(1.0), -0.75))
      True
      >>> bool(jnp.allclose(jax.grad(jax.grad(total))(1.0), 0.75))
      True
      >>> jacobian = jax.jacfwd(lambda y: solve(jnp.zeros(2), 1.0, (x, y)))(y)  # I / (1 + lam)
      >>> float(jnp.trace(x @ jacobian))  # the degrees of freedom of the fit
      1.0

    Reference: Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022
    (``custom_root``); here for any response, and with the inner loss as the condition.
    """
    if not is_function(solve):
        form = "solve(params, hparams, inner_batch) -> params"
        raise TypeError(f"`solve` must be callable, as `{form}`, got {solve!r}.")
    check_inner_problem(inner)
    check_takes("solve", solve, "solve(params, hparams, inner_batch)")
    check_flag("has_aux", has_aux)
    check_flag("has_status", has_status)
    if on_failure not in ("nan", "keep"):
        raise ValueError(f"`on_failure` must be 'nan' or 'keep', got {on_failure!r}.")
    if residual is not None:
        check_number("residual", residual)
        check_real("residual", residual, 0)
        if on_failure == "keep":
            raise ValueError(
                "`residual` marks derivatives as NaN, which `on_failure='keep'` forbids: pass one "
                "of the two."
            )
    check_response(response)
    check_settings_used(response, "response")
    _refuse_untrained(response)
    problem = Problem(outer=_no_outer, inner=inner)

    def solved(
        params: Params, hparams: Hparams, inner_batch: Batch, *, key: Key | None = None
    ) -> Any:
        _check_arguments(params, hparams, inner_batch)
        check_key(key)
        hparams, inner_batch = jax.tree.map(_as_array, (hparams, inner_batch))
        hparams, inner_batch = jax.tree.map(_copy_traced, (hparams, inner_batch))
        if not getattr(response, "fresh_batches", False):
            check_inner(problem, params, hparams, inner_batch)
        # Cut here and not around the call: `solve` then runs on plain values, is never
        # differentiated, and may close over tracers as any other function.
        start, fixed, batch = jax.lax.stop_gradient((params, hparams, inner_batch))
        w, aux = _unpacked(solve(start, fixed, batch), params, has_aux)
        w = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, w))
        info = None
        if has_status:
            info = jax.lax.stop_gradient(_judge(problem, response, w, fixed, batch))
        elif _known((w, fixed, batch, response)):
            _warn(_judge(problem, response, w, fixed, batch))
        marks = Marks(on_failure == "nan", residual)
        attach: Callable[..., Params] = attach_response
        # JAX gives no derivative of a derivative through a backward rule of the user's own.
        if differentiates_fully(response) and not contains_primitive(
            problem.condition, w, fixed, batch, prefix=BACKWARD_RULE
        ):
            attach = attach_implicit
        out = (attach(problem, response, w, hparams, inner_batch, key, marks),)
        out += (aux,) * has_aux + (info,) * has_status
        return out if len(out) > 1 else out[0]

    return solved


def _as_array(x: Any) -> Any:
    """Numbers and NumPy arrays as JAX's own: transformations keep no others as constants."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _copy_traced(x: Any) -> Any:
    """A copy that the compiler removes: ``vmap`` of NumPy arrays leaves them in its tracers, where
    a custom rule would find them as they are."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jnp.copy(x) if isinstance(x, Tracer) and not is_key else x


def _no_outer(*_: Any) -> Any:
    raise TypeError("`with_response` has no outer loss: a response may read `inner` only.")


def _refuse_untrained(response: Response) -> None:
    if isinstance(response, BestResponse) and response.steps == 0:
        raise ValueError(
            "`response` is a BestResponse with `steps=0`, which takes its `state` as trained, but "
            "`with_response` starts cold in every call: its network would be untrained, and the "
            "derivative wrong. Set `steps`, or pass the trained state to `hypergrad_solve`."
        )


def _check_arguments(params: Params, hparams: Hparams, inner_batch: Batch) -> None:
    if not jax.tree.leaves(params):
        raise ValueError(
            f"`params` {_empty(params)}: pass the start of the search, shaped like what `solve` "
            "returns."
        )
    if not jax.tree.leaves(hparams):
        raise ValueError(
            f"`hparams` {_empty(hparams)}: pass the real numbers that `inner` reads and "
            "derivatives are taken in."
        )
    check_inexact(params, "params", "Split the model into its trainable floats and the rest.")
    check_inexact(
        hparams,
        "hparams",
        "A gradient exists for real numbers only: write `1.0` for `1`, or relax the integer to a "
        "float. What is not differentiated may be closed over by `solve` and `inner`.",
    )
    check_batch(inner_batch, "inner_batch")


def _empty(tree: Any) -> str:
    return "is None" if tree is None else f"has no leaves (it is {tree!r})"


def _unpacked(returned: Any, params: Params, has_aux: bool) -> tuple[Params, Any]:
    """Parameters and auxiliary output of ``solve``, refused where they cannot be the solution."""
    aux = None
    if has_aux:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                "`solve` must return a pair (params, aux), as `has_aux=True` promises, got "
                f"{jax.tree.structure(returned)}."
            )
        returned, aux = returned
        aux = jax.tree.map(
            lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, aux
        )
    if returned is None:
        raise TypeError("`solve` returned None: end it with `return params`, its solution.")
    name = "the result of `solve`"
    try:
        check_same_tree(returned, params, name)
    except ValueError as error:
        hint = "Return parameters of the same structure and shapes as the `params` it starts from"
        if isinstance(returned, list):
            hint += "; a list is a tree of its own: return `jnp.asarray(...)` of it for an array"
        elif isinstance(returned, tuple) and not has_aux:
            hint += "; if it returns (params, aux), pass `has_aux=True`"
        raise ValueError(f"`solve` returned another tree than expected: {error} {hint}.") from None
    check_inexact(returned, name, "Return the solution as floating-point arrays.")
    return returned, aux


def _judge(
    problem: Problem, response: Response, w: Params, hparams: Hparams, batch: Batch
) -> SolveInfo:
    stats: Stats = {}
    far = jnp.asarray(False)
    finite = tree.all_finite((w, hparams))
    if isinstance(response, Implicit):
        gradient, relative = _stationarity(problem, response, w, hparams, batch)
        stats = {"stationarity": tree.norm(gradient), "relative_stationarity": relative}
        far = ~(relative <= STATIONARITY)
        finite &= jnp.isfinite(stats["stationarity"])
        if not problem.has_loss and not response.fresh_batches:
            stats["knots"] = knots(problem, w, hparams, batch)
    result = status_of(
        Status.ok,
        (~finite, Status.nonfinite_input),
        (out_of_range(response), Status.invalid_setting),
        (far, Status.not_stationary),
        (stats.get("knots", 0) > 0, Status.knot),
    )
    return SolveInfo(result, stats)


def _stationarity(
    problem: Problem, response: Implicit, w: Params, hparams: Hparams, batch: Batch
) -> tuple[Vector, Scalar]:
    r"""The inner gradient, and its length over the largest curvature times that of ``w``."""
    fresh = response.fresh_batches
    gradient, mv = response.bind(problem, w, hparams, batch).bound
    if fresh:  # that of the mean loss, or the noise of one batch would count
        count = response.num_inner_batches() or 1
        each = jax.lax.map(
            lambda i: problem.condition(w, hparams, select_batch(batch, i)), jnp.arange(count)
        )
        gradient = jax.tree.map(lambda x: jnp.mean(x, 0), each)
    gradient, w = tree.accumulate(gradient), tree.accumulate(w)
    length, scale = tree.norm(gradient), largest_curvature(mv, w, gradient) * tree.norm(w)
    return gradient, jnp.where(length == 0, 0, length / scale)


def _known(values: Any) -> bool:
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(values))


def _warn(info: SolveInfo) -> None:
    # A loss that closes over a tracer makes even these traced.
    if not all(concrete(x) for x in jax.tree.leaves(info)):
        return
    status = Status(int(info.result))
    if status == Status.ok:
        return
    if status == Status.nonfinite_input:
        what = (
            "The result of `solve`, or the gradient of `inner` there, is NaN or infinite, and so "
            "are the derivatives: look at `solve`, the batch and the hyperparameters."
        )
    elif status == Status.knot:
        what = (
            f"knots={int(info.stats['knots'])} numbers of the result of `solve` are just at a "
            "threshold of their condition, where the solution has no derivative: those given are "
            "of one side. Solve to a tighter tolerance, or move the hyperparameters a little."
        )
    else:
        what = (
            "The result of `solve` is not a minimum of `inner`, as an implicit response assumes: "
            f"relative_stationarity={float(info.stats['relative_stationarity']):.3g} is above "
            f"{STATIONARITY}, and the derivatives may be far off. Solve to a tighter tolerance; "
            "make sure that `inner` is the loss that `solve` minimizes, on this batch; where "
            "parameters are held by a constraint or a kink (L1, hinge, bounds) use a response that "
            "knows of it."
        )
    warnings.warn(
        f"{status.name}: {what} `with_response(..., has_status=True)` returns this as a status.",
        RuntimeWarning,
        stacklevel=3,
    )
