r"""``diagnose``: is this inner problem ready for a hypergradient?"""

import dataclasses
import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params
from bilevel.ground.batches import check_batch
from bilevel.ground.keys import check_key
from bilevel.ground.loops import must_unroll
from bilevel.ground.settings import check_count, check_flag, check_settings_used
from bilevel.hypergradient.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.lanczos import Extremes, Tridiagonal, extremes, lanczos
from bilevel.linear.neumann import Neumann
from bilevel.problem.conditions import Composite
from bilevel.problem.operators.base import Operator
from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.operators.hessian import Hessian
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import (
    SPLIT_MODEL,
    check_inexact,
    check_inner,
    check_inner_problem,
    check_losses,
)

STATIONARY = 1e-3
CONDITION = 1e4  # beyond it a float32 solve loses four of its seven digits
ACCURACY = 1e-4
SWAPPED = 2  # times as large a loss on what was trained on is no accident of a small batch
FEW = 10  # products that a network in training is worth: what they leave out is not its error
LARGE = 50  # inputs beyond it are seldom meant: pixels from 0 to 255, features in raw units
READY = "Ready for implicit differentiation."


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    r"""What :func:`diagnose` found; plain Python numbers.

    Attributes:
      num_params: n.
      support: parameters that respond: n, or those on the support of a ``Composite``, of which
        curvature, solver and advice speak.
      loss: the inner loss, of a ``Composite`` its smooth part.
      grad_norm: :math:`‖∇_w h‖`, or the norm of the condition.
      stationarity: :math:`‖∇_w h‖ / (λ_{max}‖w‖)`: by how much, relative to
        their length, one gradient step of size :math:`1/λ_{max}` would move the parameters.
      stationary: whether that is at most 1e-3.
      min_curvature, max_curvature: extreme eigenvalues of the operator as given.
      min_error, max_error: an eigenvalue lies within this distance of each. A large
        ``min_error`` asks for more ``num_steps``.
      damping: what to *add* so that the condition number is at most 1e4; 0 if nothing.
      condition: the condition number with that damping.
      step_size: :math:`1/λ_{max}`, damping included: for ``Neumann`` and for plain SGD.
      cg_steps: CG steps to a relative error of 1e-4 by the classical bound, at most n.
      solver: the linear solver advised.
      operator: the operator advised, damping included.
      advice: sentences, the most urgent first.
    """

    num_params: int
    support: int
    loss: float
    grad_norm: float
    stationarity: float
    stationary: bool
    min_curvature: float
    max_curvature: float
    min_error: float
    max_error: float
    damping: float
    condition: float
    step_size: float
    cg_steps: int
    solver: Any
    operator: Operator
    advice: tuple[str, ...]

    @property
    def response(self) -> Implicit:
        """The response advised, ready for ``hypergrad``."""
        return Implicit(self.solver, self.operator)


def diagnose(
    inner: Loss | Composite,
    params: Params,
    hparams: Hparams,
    *,
    inner_batch: Batch,
    key: Key | None = None,
    num_steps: int = 30,
    operator: Operator | None = None,
    outer: Loss | None = None,
    outer_batch: Batch = None,
    has_state: bool = False,
    model_state: ModelState = None,
    print: bool = True,
) -> Diagnosis:
    r"""Is w stationary, how is the curvature spread, and which solver and damping suit it?

    Extreme eigenvalues come from Lanczos' method with full reorthogonalization; damping and
    expected steps from

    .. math:: ρ = max \Bigl(0, \frac{λ_{max} - κλ_{min}}{κ - 1}\Bigr),
        \ κ = 10^4,
        k = \left ⌈½ \sqrt{κ_ρ} ln \frac{2}{10^{-4}} \right⌉

    Args:
      inner: ``inner(params, hparams, batch) -> scalar``, or a ``Composite``.
      params, hparams, inner_batch: the point, as for :func:`~bilevel.hypergrad`.
      key: of the random start; fixed by default, so that a call repeats itself.
      num_steps: Lanczos steps, at most n.
      operator: ``Hessian()`` by default, or a ``GaussNewton(...)``.
      outer, outer_batch: if given, the outer loss is read on both batches, where both have the
        same tree: trained parameters that fit ``outer_batch`` far better tell a swap.
      has_state, model_state: as for :func:`~bilevel.hypergrad`.
      print: write the table to the standard output, with ``rich`` where it is installed.

    Returns:
      :class:`Diagnosis`.

    Raises:
      TypeError, ValueError: as ``hypergrad``; the message names the argument.

    Cost: ``num_steps`` products, ``num_steps`` + 2 vectors of memory, and a compilation. A tool
    for the host: not for use under ``jit``.

    Reference: Ghorbani, Krishnan, Xiao, "An investigation into neural net optimization via
    Hessian eigenvalue density", ICML 2019.
    """
    check_count("num_steps", num_steps)
    check_flag("has_state", has_state)
    check_flag("print", print)
    if isinstance(inner, Composite):
        check_inner_problem(inner, has_state)
    else:
        check_losses(inner=inner)
    if outer is not None:
        check_losses(outer=outer)
        check_batch(outer_batch, "outer_batch")
    check_key(key)
    check_inexact(params, "params", SPLIT_MODEL)
    check_inexact(hparams, "hparams", "Hyperparameters are real numbers.")
    check_batch(inner_batch, "inner_batch")
    if not tree.size(params):
        raise ValueError("`params` has no numbers: there is nothing to diagnose. Pass the weights.")
    operator = Hessian() if operator is None else operator
    if isinstance(operator, type) or not hasattr(operator, "bind"):
        raise TypeError(
            f"`operator` must be `Hessian()`, `GaussNewton(...)` or None, got {operator!r}."
        )
    check_settings_used(operator, "operator")
    steps = min(num_steps, tree.size(params))
    key = jax.random.key(0) if key is None else key

    loss, grad_norm, length, support, coefficients = _measure(
        inner, has_state, steps, operator, params, hparams, inner_batch, model_state, key
    )
    found = _conclude(
        tree.size(params),
        int(support),
        float(loss),
        float(grad_norm),
        float(length),
        extremes(coefficients),
        operator,
    )
    read = (lambda *_: None) if outer is None else outer
    problem = Problem(read, inner, has_state=has_state, model_state=model_state)
    further = [*_of_batch(inner_batch), *_of_compilation(problem, params, hparams, inner_batch)]
    if outer is not None:
        further += _of_swap(problem, params, hparams, inner_batch, outer_batch)
    if further:
        ready = (READY,) == found.advice
        found = dataclasses.replace(found, advice=(*(() if ready else found.advice), *further))
    if print:
        _show(found)
    return found


def _of_batch(batch: Batch) -> list[str]:
    """What the numbers of a batch tell: floats far from one make a problem that is badly scaled."""
    said = []
    for path, leaf in tree.paths(batch, "inner_batch"):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and jnp.size(leaf):
            largest = float(jnp.max(jnp.abs(leaf)))
            if largest > LARGE:
                said.append(
                    f"`{path}` holds numbers as large as {largest:.3g}: scale inputs to about one "
                    "(pixels by 1/255, features by their standard deviation)."
                )
    return said


def _of_swap(
    problem: Problem, params: Params, hparams: Hparams, inner_batch: Batch, outer_batch: Batch
) -> list[str]:
    """Whether the parameters fit the outer batch as one does what it was trained on."""
    if jax.tree.structure(inner_batch) != jax.tree.structure(outer_batch):
        return []
    loss = jax.jit(lambda *args: problem.outer_loss(*args)[0])
    trained, other = (float(loss(params, hparams, b)) for b in (inner_batch, outer_batch))
    if not 0 <= SWAPPED * other < trained:
        return []
    return [
        f"The outer loss is {other:.3g} on `outer_batch` and {trained:.3g} on `inner_batch`, which "
        "parameters are trained on: the two are swapped, or share examples, or are not "
        "preprocessed alike."
    ]


def _of_compilation(problem: Problem, params: Params, hparams: Hparams, batch: Batch) -> list[str]:
    """Where loops are unrolled, compiling is what a first call costs."""
    if not must_unroll(problem.smooth.inner_loss, params, hparams, batch):
        return []
    return [
        "The model has convolutions and runs on CPU, so loops are unrolled and compile slowly, "
        "about in proportion to their steps: keep `max_steps` and `inner_steps` at 10 or so, and "
        "see `memory_report(...)` for the seconds."
    ]


# Compiled once for a loss and a number of steps, not once a call.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
    inner: Any,
    has_state: bool,
    steps: int,
    operator: Any,
    params: Params,
    hparams: Hparams,
    batch: Batch,
    state: ModelState,
    key: Key,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | int, Tridiagonal]:
    problem = Problem(lambda *_: None, inner, has_state=has_state, model_state=state)
    check_inner(problem, params, hparams, batch)
    system = Implicit(operator=operator).bind(problem, params, hparams, batch)
    loss = problem.smooth.inner_loss(params, hparams, batch)
    mv, some, _ = system.equation(tree.random_like(key, params, jax.random.normal))
    # Where the system of a `Composite` is zero the random vector is.
    parts = [jnp.count_nonzero(x) for x in jax.tree.leaves(some)]
    support = tree.size(params) if system.form is None else sum(parts)
    found = lanczos(mv, params, steps, key, lambda v: system.equation(v)[1])
    return loss, tree.norm(system.inner_grad), tree.norm(params), support, found


def _conclude(
    size: int,
    n: int,
    loss: float,
    grad_norm: float,
    length: float,
    found: Extremes,
    operator: Operator,
) -> Diagnosis:
    low, high = found.smallest, found.largest
    broken = not all(map(math.isfinite, (loss, grad_norm, low, high)))
    certain_low = low - found.smallest_error
    damping = max(0.0, (high - CONDITION * certain_low) / (CONDITION - 1))
    if broken or high <= 0:
        damping = math.nan if broken else abs(certain_low) * 1.1
    top, bottom = high + damping, max(certain_low + damping, 0.0)
    condition = top / bottom if bottom > 0 and top > 0 else math.inf
    cg_steps = n
    if math.isfinite(condition):
        cg_steps = min(n, math.ceil(0.5 * math.sqrt(condition) * math.log(2 / ACCURACY)))
    scale = max(high, -low)
    stationarity = grad_norm / (scale * length) if scale * length > 0 else math.inf
    if grad_norm == 0:
        stationarity = 0.0
    stationary = stationarity <= STATIONARY

    solver: Any
    if n <= 500:
        solver = Dense()
    elif condition <= 10 and top > 0:
        solver = Neumann(max(1, math.ceil(condition * math.log(1 / ACCURACY))), 1 / top)
    elif isinstance(operator, GaussNewton) and not stationary:
        solver = CG(max_steps=min(cg_steps, FEW))
    else:
        solver = CG(max_steps=cg_steps, rtol=ACCURACY)
    advised = operator
    if damping > 0 and isinstance(operator, (Hessian, GaussNewton)):
        advised = dataclasses.replace(operator, damping=float(operator.damping) + damping)

    advice = []
    if not n:
        advice.append("No parameter is on the support: none follows the hyperparameters.")
    if broken:
        advice.append("Loss, gradient or curvature is NaN or infinite: trust no number here.")
    if not broken and not stationary:
        advice.append(
            f"The parameters are not at a minimum (a gradient step would move them by "
            f"{stationarity:.1e} of their length): train further on this `inner_batch` (is it the "
            "training data?), or use a response that does not assume a minimum, such as "
            "`Unroll(...)` (whether the derivative of a training run is of use, "
            "`metasmoothness(...)` tells before it is taken)."
        )
    if low < -1e-4 * scale:
        advice.append(
            f"The curvature is negative in some direction ({low:.2e}), as it is in most networks "
            "during training: use `Implicit(CG(max_steps=10), GaussNewton(model, output_loss, "
            f"damping=0.1))`. On this operator, damping of at least {damping:.1e} would be needed."
        )
    elif damping > 0:
        advice.append(
            f"Some direction is nearly flat: damping of {damping:.1e} bounds the condition number "
            f"by {CONDITION:.0e}; a penalty on all weights does the same without a bias."
        )
    if found.smallest_error > 0.1 * max(abs(low), 1e-6 * abs(high)) and found.steps < n:
        advice.append("The smallest eigenvalue has not settled: raise `num_steps`.")
    if isinstance(solver, CG) and solver.rtol is None:
        advice.append(
            "Away from a minimum a tight solve does not make the hypergradient right: a few steps "
            "of CG are enough (the recipe for networks), warm-started from step to step."
        )
    elif isinstance(solver, CG) and condition > 100:
        advice.append("`CG(preconditioner=Diagonal())` often halves the steps.")
    return Diagnosis(
        num_params=size,
        support=n,
        loss=loss,
        grad_norm=grad_norm,
        stationarity=stationarity,
        stationary=stationary,
        min_curvature=low,
        max_curvature=high,
        min_error=found.smallest_error,
        max_error=found.largest_error,
        damping=damping,
        condition=condition,
        step_size=1 / top if top > 0 else math.inf,
        cg_steps=cg_steps,
        solver=solver,
        operator=advised,
        advice=tuple(advice) or (READY,),
    )


def _rows(d: Diagnosis) -> list[tuple[str, str]]:
    return [
        ("parameters", f"{d.num_params}"),
        *([("on the support", f"{d.support}")] if d.support < d.num_params else []),
        ("inner loss", f"{d.loss:.6g}"),
        ("gradient norm", f"{d.grad_norm:.3g}"),
        ("stationarity", f"{d.stationarity:.2e} ({'yes' if d.stationary else 'NO'})"),
        ("smallest eigenvalue", f"{d.min_curvature:.4g} (± {d.min_error:.1e})"),
        ("largest eigenvalue", f"{d.max_curvature:.4g} (± {d.max_error:.1e})"),
        ("add damping", f"{d.damping:.3g}"),
        ("condition number then", f"{d.condition:.3g}"),
        ("step size 1/λmax", f"{d.step_size:.3g}"),
        (f"CG steps to {ACCURACY:.0e}", f"{d.cg_steps}"),
        ("solver", f"{d.solver}"),
    ]


def _show(d: Diagnosis) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [f"{name:<24}{value}" for name, value in _rows(d)]
        sys.stdout.write("\n".join([*lines, *(f"- {a}" for a in d.advice)]) + "\n")
        return
    table = Table(title="Inner problem", show_header=False)
    for row in _rows(d):
        table.add_row(*row)
    console = Console(file=sys.stdout, markup=False)
    console.print(table)
    for sentence in d.advice:
        console.print(f"- {sentence}", soft_wrap=True)
