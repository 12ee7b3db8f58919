r"""A problem whose hypergradient is known: what every method is held against.

The truth of a :class:`Case` never goes through the code it judges: closed forms are worked out in
NumPy, in float64, on flat vectors in the order of the tree's leaves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Hparams, Key, Loss, Params, Vector
from bilevel.hypergradient import Hypergradient, Response, hypergrad_solve
from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.two_losses import Problem


def flatten(tree: Any) -> np.ndarray:
    """All leaves of ``tree``, in order, as one float64 vector."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def unflatten(flat: np.ndarray, like: Any) -> Any:
    """The inverse of :func:`flatten`: a tree with the shapes and dtypes of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([np.size(x) for x in leaves])[:-1]
    parts = zip(np.split(np.asarray(flat), ends), leaves, strict=True)
    return jax.tree.unflatten(
        treedef, [jnp.asarray(p.reshape(np.shape(x)), jnp.result_type(x)) for p, x in parts]
    )


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal numbers from a stream that every draw advances, so no two arrays are equal."""
    return scale * rng.standard_normal(shape)


@dataclasses.dataclass(frozen=True)
class Exact:
    r"""The minimizer and the derivatives there, as flat float64 arrays.

    Attributes:
      params: :math:`w^*(λ)`, (n,).
      hessian: :math:`H = ∇^2_{ww} h`, (n, n); of a condition :math:`∂_w R`, which need
        not be symmetric.
      cross: :math:`B = ∂_λ ∇_w h`, (n, p).
      outer_grad: :math:`g = ∇_w f`, (n,).
      direct: :math:`∂_λ f`, (p,).
    """

    params: np.ndarray
    hessian: np.ndarray
    cross: np.ndarray
    outer_grad: np.ndarray
    direct: np.ndarray

    def adjoint(self, damping: float = 0.0) -> np.ndarray:
        r""":math:`q = (Hᵀ + ρ I)^{-1} g`, (n,)."""
        matrix = self.hessian.T + damping * np.eye(len(self.hessian))
        return np.linalg.solve(matrix, self.outer_grad)

    def series(self, num_matvecs: int, step_size: float) -> np.ndarray:
        r""":math:`a ∑_{j=0}^{K} (I - aH)^j g` summed term by term: K products, K + 1 terms."""
        term = total = self.outer_grad
        for _ in range(num_matvecs):
            term = term - step_size * self.hessian.T @ term
            total = total + term
        return step_size * total

    def hypergrad(self, adjoint: np.ndarray | None = None) -> np.ndarray:
        r""":math:`∂_λ f - Bᵀ q`, (p,), for the exact q or the one given."""
        return self.direct - self.cross.T @ (self.adjoint() if adjoint is None else adjoint)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Two losses, their data at the exact minimizer, and the exact hypergradient.

    Attributes:
      name: what messages call it.
      inner, outer: ``loss(params, hparams, batch) -> scalar``; or a condition for ``inner``.
      params: the minimizer of ``inner`` at ``hparams``; two leaves or more, coupled by H.
      hparams: the hyperparameters; ``outer`` depends on them directly.
      inner_batch, outer_batch: what the losses read.
      exact: the truth, a function of the flattened hyperparameters.
      tags: ``quadratic`` and ``convex`` describe the inner loss; ``gauss_newton`` says that
        the operator of that name is given, ``gauss_newton_exact`` that it equals the Hessian,
        ``linear_model`` that its model is a :class:`~bilevel.LinearModel`,
        ``separable_penalty`` that its penalty alone makes it definite (what ``Woodbury``
        needs without damping), ``swappable`` that both batches have the same shapes;
        ``condition`` that the inner problem is one, ``symmetric`` that its system is.
      gauss_newton: the operator, where the tag is present.
    """

    name: str
    inner: Any
    outer: Loss
    params: Params
    hparams: Hparams
    inner_batch: Batch
    outer_batch: Batch
    exact: Callable[[np.ndarray], Exact]
    tags: frozenset[str]
    gauss_newton: GaussNewton | None = None

    @property
    def problem(self) -> Problem:
        """The two losses as the :class:`~bilevel.Problem` that responses receive."""
        return Problem(self.outer, self.inner)

    def truth(self) -> Exact:
        """The exact quantities at this case's own hyperparameters."""
        return self.exact(flatten(self.hparams))

    def solution(self, hparams: Hparams) -> Params:
        r""":math:`w^*(λ)` at other hyperparameters, shaped like ``params``."""
        return unflatten(self.exact(flatten(hparams)).params, self.params)

    def hypergrad(self, hparams: Hparams | None = None) -> Hparams:
        """The exact hypergradient, shaped like ``hparams`` (at the case's own by default)."""
        hparams = self.hparams if hparams is None else hparams
        return unflatten(self.exact(flatten(hparams)).hypergrad(), hparams)

    def adjoint(self, damping: float = 0.0) -> Vector:
        r""":math:`(H + ρ I)^{-1}∇_w f`, shaped like ``params``."""
        return unflatten(self.truth().adjoint(damping), self.params)

    def astype(self, dtype: Any) -> "Case":
        """The same case with all floating-point arrays in ``dtype``; the truth stays float64."""

        def cast(tree: Any) -> Any:
            return jax.tree.map(
                lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
            )

        return dataclasses.replace(
            self,
            params=cast(self.params),
            hparams=cast(self.hparams),
            inner_batch=cast(self.inner_batch),
            outer_batch=cast(self.outer_batch),
        )

    def solve(
        self,
        response: Response,
        *,
        key: Key | None = None,
        state: Any = None,
        copies: int | None = None,
    ) -> Hypergradient:
        """What ``response`` makes of this case: :func:`~bilevel.hypergrad_solve` on its data.

        Args:
          response, key, state: handed on.
          copies: for a response that reads a stack of batches, its length: so often the same one.
        """
        inner_batch = self.inner_batch
        if copies is not None:
            inner_batch = jax.tree.map(lambda x: jnp.stack([x] * copies), inner_batch)
        return hypergrad_solve(
            self.outer,
            self.inner,
            response,
            self.params,
            self.hparams,
            inner_batch=inner_batch,
            outer_batch=self.outer_batch,
            state=state,
            key=key,
        )


DIRECT = 0.3


def add_direct(data_loss: Loss, direction: Any) -> Loss:
    r"""``data_loss`` plus :math:`τ (∑_k sin λ_k)(aᵀ w)`.

    The term makes the outer loss depend on the hyperparameters, and its gradient in the
    parameters depend on them too.
    """

    def outer(params: Params, hparams: Hparams, batch: Batch) -> jax.Array:
        sines = sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(hparams))
        along = sum(
            jnp.sum(jnp.asarray(a).astype(w.dtype) * w)
            for a, w in zip(jax.tree.leaves(direction), jax.tree.leaves(params), strict=True)
        )
        return data_loss(params, hparams, batch) + DIRECT * sines * along

    return outer


def direct_grads(
    direction: np.ndarray, w: np.ndarray, lam: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of :func:`add_direct`'s term: in the parameters, in the hyperparameters."""
    return DIRECT * np.sin(lam).sum() * direction, DIRECT * np.cos(lam) * (direction @ w)


def newton(
    derivatives: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], w: np.ndarray
) -> np.ndarray:
    """Newton's method on ``w -> (gradient, Hessian)``, kept downhill by a shift of the spectrum.

    Raises:
      RuntimeError: if the gradient does not fall to rounding within 200 steps.
    """
    gradient, hessian = derivatives(w)
    for _ in range(200):
        size = np.linalg.norm(gradient)
        if size <= 1e-13 * max(1.0, float(np.abs(hessian).max())):
            return w
        low = float(np.linalg.eigvalsh(hessian)[0])
        shift = max(0.0, 1e-3 - low) + (0.1 * size if low < 1e-3 or size > 1e-2 else 0.0)
        w = w - np.linalg.solve(hessian + shift * np.eye(len(w)), gradient)
        gradient, hessian = derivatives(w)
    if np.linalg.norm(gradient) <= 1e-10:
        return w
    raise RuntimeError(f"Newton's method stopped at a gradient of {np.linalg.norm(gradient):.2e}.")
