r"""Stein's unbiased estimate of the risk: tune a denoiser on its own noisy data.

.. math::
    E SURE = E ‖\hat y(y) - μ‖^2,
    SURE = ‖\hat y - y‖^2 - nσ^2
        + 2σ^2 tr\frac{∂\hat y}{∂y}
    \text{for } y ∼ \mathcal N(μ, σ^2 I)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar
from bilevel.ground.settings import check_settings, check_settings_used, concrete, count, real
from bilevel.hypergradient.implicit import Implicit
from bilevel.linear.dense import Dense
from bilevel.objectives.sensitivity import (
    Push,
    check_solution,
    matrix_of,
    observations,
    probes_like,
    push_function,
    push_solution,
)
from bilevel.problem.conditions import Condition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SURE:
    r"""Stein's unbiased risk estimate of a fit to :math:`y = μ + σε`.

    .. math::
        ‖\hat y - y‖^2 - nσ^2 + 2σ^2 tr J,
        J = \frac{∂\hat y}{∂y}

    No validation data: the data that are fitted tell the error of the fit, because the noise is
    known. Two ways to use it:

    * ``SURE(sigma).risk(estimate, y)`` for a function ``estimate(y) -> fit`` that JAX can
      differentiate: a formula, steps of an algorithm (unrolled), a network, or a solver made
      differentiable by :func:`~bilevel.with_response` (implicit). ``jax.grad`` of it in whatever
      ``estimate`` closes over.
    * ``SURE(sigma, predict, inner).outer``, a loss ``outer(params, hparams, batch)`` for
      ``hypergrad_solve`` and every outer loop, with :math:`\hat y` = ``predict(params, hparams,
      batch)`` at the solution of ``inner``. J comes from the implicit function theorem at
      ``params``. Both losses read the same batch.

    Args:
      sigma: standard deviation of the noise, above 0; may be traced.
      predict: ``predict(params, hparams, batch) -> fit``, shaped like the observations.
      inner: the training loss, or its condition.
      forward: a matrix A for observations :math:`y = A x + σε` of an unknown x. The
        fit is :math:`A\hat x`, and the estimate that of the error of x in what A sees,
        :math:`‖A^+A(\hat x - x)‖^2` (projected SURE). Without it the estimate is that of
        :math:`‖A(\hat x - x)‖^2`, the prediction (least-squares form).
      probes: number of random sign vectors that estimate the trace,
        :math:`tr J ≈ bᵀ J b`; ``None`` computes it exactly, with one
        product per observation.
      seed: of the probes: the same in every call, so that the estimate is a smooth function of the
        hyperparameters.
      observed: ``observed(batch) -> y`` selects the observations; by default the last leaf of the
        batch.
      response: how J is found for ``outer``: an ``Implicit(...)``.

    The trace of one probe has standard deviation about :math:`\sqrt{2∑_{i≠ j} J_{ij}^2}`,
    small beside n for many observations. The estimate itself varies too, and with very many
    hyperparameters its minimum fits the noise.

    Raises:
      TypeError, ValueError: for a noise that is not above 0, functions and shapes that do not fit.

    Cost: one product :math:`J b` per probe (one linear solve for ``outer``), and for a
    hypergradient about twice that.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> y = 2.0 + jax.random.normal(jax.random.key(0), (1000,))
      >>> risk = lambda shrink: bilevel.objectives.SURE(1.0).risk(lambda y: shrink * y, y) / 1000
      >>> bool(abs(risk(1.0) - 1.0) < 0.01)  # no shrinkage leaves the noise
      True
      >>> bool(risk(0.8) < risk(1.0))
      True

    Reference: Stein, "Estimation of the mean of a multivariate normal distribution", Annals of
    Statistics 1981; Ramani, Blu, Unser, "Monte-Carlo SURE", IEEE TIP 2008; Eldar, "Generalized
    SURE for exponential families", IEEE TSP 2009; Deledalle et al., "Stein Unbiased GrAdient
    estimator of the Risk", SIAM J. Imaging Sciences 2014.
    """

    sigma: Any = real(low=0, strict=True)
    predict: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    inner: Loss | Condition | None = dataclasses.field(default=None, metadata={"static": True})
    forward: Any = None
    probes: int | None = count(None, optional=True)
    seed: int = count(0, low=0)
    observed: Callable[[Batch], jax.Array] = dataclasses.field(
        default=observations, metadata={"static": True}
    )
    response: Any = Implicit(Dense())

    def __post_init__(self) -> None:
        check_settings(self)
        check_solution(self.inner, self.predict, self.observed, self.response)
        if concrete(self.forward) and np.ndim(self.forward) != 2:
            raise ValueError(
                f"`forward` has shape {np.shape(self.forward)}, expected a matrix (observations, "
                "unknowns)."
            )

    def outer(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        """The estimated risk of the fit at ``params``, an outer loss."""
        check_settings_used(self, "SURE")
        return self._of(*self._parts(params, hparams, batch))

    def risk(self, estimate: Callable[[jax.Array], jax.Array], y: jax.Array) -> Scalar:
        """The estimated risk of ``estimate(y)``, a function of the observations."""
        check_settings_used(self, "SURE")
        fit, push = push_function(estimate, y)
        return self._of(y, fit, push)

    def init(self, params: Params) -> Params:
        """``params``: there is one fit."""
        return params

    def inner_batch(self, data: Batch) -> Batch:
        """``data``: all of it is fitted."""
        return data

    outer_batch = inner_batch

    def _parts(self, params: Params, hparams: Hparams, batch: Batch) -> tuple[Any, Any, Push]:
        if self.predict is None or self.inner is None:
            raise ValueError(
                "`outer` needs the fit: pass `predict` and `inner` too, as in "
                "`SURE(sigma, predict, inner)`."
            )
        return push_solution(
            self.inner, self.predict, self.observed, self.response, params, hparams, batch
        )

    def _of(self, y: jax.Array, fit: jax.Array, push: Push) -> Scalar:
        sigma = jnp.asarray(self.sigma, y.dtype)
        # A traced noise that cannot be gives no number that looks like one.
        variance = jnp.where(sigma > 0, sigma, jnp.nan) ** 2
        residual, weight = fit - y, self._weight(y)
        if weight is None:
            size, total = jnp.sum(residual**2), float(y.size)
        else:
            size = residual.ravel() @ weight @ residual.ravel()
            total = jnp.trace(weight)
        return size - variance * total + 2 * variance * self._trace(y, push, weight)

    def _trace(self, y: jax.Array, push: Push, weight: jax.Array | None) -> Scalar:
        r""":math:`tr W J`."""
        if self.probes is None:
            matrix = matrix_of(push, y)
            return jnp.trace(matrix) if weight is None else jnp.sum(weight * matrix.T)
        signs = probes_like(y, self.probes, self.seed)
        pushed = jax.vmap(push)(signs).reshape(self.probes, -1)
        signs = signs.reshape(self.probes, -1)
        if weight is not None:
            signs = signs @ weight
        return jnp.sum(signs * pushed) / self.probes

    def _weight(self, y: jax.Array) -> jax.Array | None:
        r""":math:`(A Aᵀ)^+`, in which the residual of the prediction is measured."""
        if self.forward is None:
            return None
        forward = jnp.asarray(self.forward, y.dtype)
        if forward.shape[0] != y.size:
            raise ValueError(
                f"`forward` has shape {forward.shape}, but there are {y.size} observations: "
                "expected (observations, unknowns)."
            )
        return jnp.linalg.pinv(forward @ forward.T, hermitian=True)
