r"""What defines the inner solution where it is no stationary point of a smooth loss.

A condition stands in the place of ``inner``. With :math:`R(w, \lambda) = 0` at the solution,

.. math::
    \frac{\partial w^*}{\partial\lambda}
        = -\Bigl(\frac{\partial R}{\partial w}\Bigr)^{-1} \frac{\partial R}{\partial\lambda}

and for a loss :math:`R = \nabla_w h`. The matrix of a condition need not be symmetric.
"""

import dataclasses
from collections.abc import Callable

from bilevel.ground.aliases import Batch, Hparams, Params
from bilevel.ground.settings import check_takes, is_function


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    r"""The inner solution as :math:`w^* = T(w^*, \lambda)`.

    Proximal and projected gradient steps, mirror maps, equilibrium models, Sinkhorn's iteration:
    whatever a solver repeats until nothing changes. The system that is solved is the true
    transpose of :math:`I - \partial_w T`, which :math:`\tfrac12\|w - T(w)\|^2` as a loss would
    square.

    Args:
      step: ``step(params, hparams, batch) -> params``, a tree like ``params``.

    On the support that a proximal step identifies the derivative is exact; where a weight is just
    at its threshold the solution has no derivative, and one of the two sides is returned.

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
    r"""The inner solution as :math:`R(w^*, \lambda) = 0`: KKT conditions and other equations.

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


Condition = FixedPoint | Root


def _check(name: str, function: object) -> None:
    call = f"{name}(params, hparams, batch)"
    if not is_function(function):
        raise TypeError(f"`{name}` must be a function {call}, got {function!r}.")
    check_takes(name, function, call)
