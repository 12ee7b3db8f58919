r"""What defines the inner solution where it is not a stationary point of a smooth loss.

A condition stands in the place of ``inner``. With :math:`R(w, λ) = 0` at the solution,

.. math::
    \frac{∂w^*}{∂λ}
        = -\Bigl(∂R/∂w \Bigr)^{-1} ∂R/∂λ

and for a loss :math:`R = ∇_w h`. The matrix of a condition need not be symmetric; that of a
:class:`Composite` is solved through one that is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar
from bilevel.ground.settings import check_one_real, check_takes, concrete, is_function

Prox: TypeAlias = Callable[[Params, Hparams, Scalar], Params]


@dataclasses.dataclass(frozen=True)
class Composite:
    r"""The inner solution as :math:`w^* = argmin_w f(w, λ) + r(w, λ)`.

    f is smooth and r convex, known by its proximal operator: L1 and group penalties, constraints.
    The condition is :math:`0 ∈ ∇f + ∂r`, as an equation

    .. math:: R(w, λ) = 1/s (w - prox_{s r}(w - s∇f(w)))

    in units of the gradient, for any :math:`s > 0`. The Jacobian J of a proximal operator is
    symmetric with eigenvalues in [0, 1] (for L1 and bounds the projector on the support), so that
    the system of the fixed point is solved through a symmetric one, with H the Hessian of f:

    .. math:: (J H J + 1/s J(I - J)) z = J g,
        q = J z + s (g - H J z)

    that of the smooth problem on the support, :math:`H_{SS}`, whose condition number decides the
    number of products. ``CG``, ``Dense``, ``Lineax``, ``Neumann`` solve it, with every operator;
    its residual, curvatures and status speak of the support. Nothing is cut out: the support may
    change without a compilation.

    Args:
      loss: the smooth part f, ``loss(params, hparams, batch) -> scalar``.
      prox: ``prox(params, hparams, step_size) -> params``, of r times the step size:
        :mod:`bilevel.prox` has some, ``optax.projections`` those of many constraints. It must be
        the proximal operator of a convex function in the Euclidean norm.
      step_size: s. The solution, and the system where J is a projector, do not depend on it; it
        is the scale on which a weight counts as near its threshold, and where J is no projector
        (groups, an elastic net) the system is best conditioned for s of about one over the
        largest curvature. ``None`` finds it by three power iterations in each solve: for a
        fixed loss, give :math:`1/λ_{max}` and save them.

    Cost: one gradient and two or three products to bind (none with ``step_size``), then one product
    with H and two with J (one derivative of ``prox``) for each product. Exact at the solution; the
    number of weights at their threshold is in ``stats["knots"]`` (status ``knot``).

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> def error(w, lam, y):
      ...     return 0.5 * jnp.sum((w - y) ** 2)
      >>> def soft(w, lam, step):
      ...     return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * lam, 0)
      >>> lasso, y, lam = bilevel.Composite(error, soft), jnp.array([2.0, -3.0, 0.1]), 0.5
      >>> w = bilevel.minimize(lasso, jnp.zeros(3), lam, y).params
      >>> valid = lambda w, lam, batch: 0.5 * jnp.sum(w**2)
      >>> g = bilevel.hypergrad(valid, lasso, bilevel.Implicit(bilevel.CG(rtol=1e-6)))
      >>> bool(jnp.allclose(g(w, lam, inner_batch=y, outer_batch=y), -4.0))  # -|2 - .5| - |3 - .5|
      True

    Reference: Bertrand et al., "Implicit differentiation for fast hyperparameter selection in
    non-smooth convex learning", JMLR 2022; Moreau, "Proximite et dualite dans un espace
    hilbertien", 1965.
    """

    loss: Loss
    prox: Prox
    step_size: Any = None

    def __post_init__(self) -> None:
        _check("loss", self.loss)
        call = "prox(params, hparams, step_size)"
        if not is_function(self.prox):
            raise TypeError(f"`prox` must be a function {call}, got {self.prox!r}.")
        check_takes("prox", self.prox, call)
        if self.step_size is not None:
            check_one_real("step_size", self.step_size, 0, strict=True)
            if concrete(self.step_size):  # a value: problems are compared and hashed
                object.__setattr__(self, "step_size", float(self.step_size))


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    r"""The inner solution as :math:`w^* = T(w^*, λ)`.

    Proximal and projected gradient steps, mirror maps, equilibrium models, Sinkhorn's iteration:
    whatever a solver repeats until nothing changes. The system that is solved is the true
    transpose of :math:`I - ∂_w T`, which :math:`½ ‖w - T(w)‖^2` as a loss would
    square.

    Args:
      step: ``step(params, hparams, batch) -> params``, a tree like ``params``.

    On the support that a proximal step identifies the derivative is exact; where a weight is just
    at its threshold the solution has no derivative: one of the two sides is returned, with status
    ``knot``. For proximal steps :class:`Composite` has the symmetric system.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> def soft(v, threshold):
      ...     return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)
      >>> def step(w, lam, y):  # of the lasso 0.5 |w - y|^2 + lam |w|_1
      ...     return soft(w - 0.5 * (w - y), 0.5 * lam)
      >>> y, lam = jnp.array([2.0, -3.0, 0.1]), 0.5
      >>> w = soft(y, lam)
      >>> valid = lambda w, lam, batch: 0.5 * jnp.sum(w**2)
      >>> g = bilevel.hypergrad(valid, bilevel.FixedPoint(step), bilevel.Implicit(bilevel.Dense()))
      >>> bool(jnp.allclose(g(w, lam, inner_batch=y, outer_batch=y), -4.0))  # -|2 - .5| - |3 - .5|
      True

    Reference: Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022;
    Bertrand et al., "Implicit differentiation of Lasso-type models", ICML 2020.
    """

    step: Callable[[Params, Hparams, Batch], Params]

    def __post_init__(self) -> None:
        _check("step", self.step)


@dataclasses.dataclass(frozen=True)
class Root:
    r"""The inner solution as :math:`R(w^*, λ) = 0`: KKT conditions and other equations.

    Args:
      equation: ``equation(params, hparams, batch) -> residual``, a tree like ``params``.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> def kkt(w, lam, b):  # min 0.5 |x|^2 - b'x with sum(x) = lam; w holds its multiplier too
      ...     return {"x": w["x"] - b + w["nu"], "nu": jnp.sum(w["x"]) - lam}
      >>> b, lam = jnp.array([1.0, 3.0]), 2.0
      >>> w = {"x": b - 1.0, "nu": jnp.array(1.0)}
      >>> valid = lambda w, lam, batch: w["x"][0] ** 2
      >>> g = bilevel.hypergrad(valid, bilevel.Root(kkt), bilevel.Implicit(bilevel.Dense()))
      >>> float(g(w, lam, inner_batch=b, outer_batch=b))  # x = b + (lam - sum(b)) / 2, x[0] = 0
      0.0
    """

    equation: Callable[[Params, Hparams, Batch], Params]

    def __post_init__(self) -> None:
        _check("equation", self.equation)


Condition = Composite | FixedPoint | Root


def _check(name: str, function: object) -> None:
    call = f"{name}(params, hparams, batch)"
    if not is_function(function):
        raise TypeError(f"`{name}` must be a function {call}, got {function!r}.")
    check_takes(name, function, call)
