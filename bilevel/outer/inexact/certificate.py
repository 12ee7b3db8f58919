r"""What makes the error of an inexact hypergradient known: the constants of a convex problem."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams, Params, Scalar
from bilevel.ground.settings import check_one_real, check_takes, concrete, is_function

Constant = float | jax.Array | Callable[[Params, Hparams], Any]


class Constants(NamedTuple):
    """The numbers of a :class:`Certificate` at one point."""

    convexity: Scalar
    outer_smoothness: Scalar
    mixed_norm: Scalar
    mixed_lipschitz: Scalar
    hessian_lipschitz: Scalar
    direct_lipschitz: Scalar


@dataclasses.dataclass(frozen=True)
class Certificate:
    r"""Constants by which the error of a hypergradient is bounded from what was computed.

    At the computed :math:`w, q`, with :math:`e = ‖∇_w h‖ / μ ≥ ‖w - w^*‖`,
    :math:`d = ‖H q - g‖` and :math:`z = ∂_λ f - Bᵀ q`,

    .. math::
        ‖z - ∇F‖ ≤ \frac{‖B‖ d}{μ}
            + e \Bigl(\frac{‖B‖ L_f}{μ} + \frac{‖B‖ L_H ‖g‖}{μ^2}
                + \frac{L_B ‖g‖}{μ} + L_d\Bigr)
            + e^2 \frac{L_B L_f}{μ}

    which holds for the true F as long as the constants do. Each is a number or a function
    ``(params, hparams) -> number``; one that is too small makes the bound a guess.

    Args:
      convexity: :math:`μ > 0`: no eigenvalue of the inner Hessian is smaller, at any parameters.
      outer_smoothness: :math:`L_f`, of the outer gradient in the parameters.
      mixed_norm: :math:`‖B‖` at these parameters, :math:`B = ∂_λ ∇_w h`.
      mixed_lipschitz: :math:`L_B`, of B in the parameters.
      hessian_lipschitz: :math:`L_H`, of the inner Hessian in the parameters; zero for a quadratic.
      direct_lipschitz: :math:`L_d`, of :math:`∂_λ f` in the parameters.

    Reference: Ehrhardt and Roberts, "Analyzing inexact hypergradients for bilevel learning", IMA
    Journal of Applied Mathematics 2023.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> ridge = bilevel.Certificate.of_log_decays(outer_smoothness=2.0)
      >>> now = ridge.at(jnp.array([3.0, 4.0]), jnp.array(0.0))
      >>> float(now.convexity), float(now.mixed_norm)
      (1.0, 5.0)
    """

    convexity: Constant
    outer_smoothness: Constant
    mixed_norm: Constant
    mixed_lipschitz: Constant = 0.0
    hessian_lipschitz: Constant = 0.0
    direct_lipschitz: Constant = 0.0

    def __post_init__(self) -> None:
        if not is_function(self.convexity):
            self._check_convexity(self.convexity)
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if is_function(given):
                check_takes(field.name, given, f"{field.name}(params, hparams)")
            else:
                check_one_real(field.name, given, 0)

    @classmethod
    def of_log_decays(
        cls, outer_smoothness: Constant, hessian_lipschitz: Constant = 0.0
    ) -> "Certificate":
        r"""For a convex loss plus :math:`½ ∑_j e^{λ_j} w_j^2`.

        ``hparams`` is one number for all weights, or a tree like ``params`` with one number per
        leaf or per weight.
        """

        def parts(params: Params, hparams: Hparams) -> list[tuple[jax.Array, jax.Array]]:
            lam = jax.tree.leaves(hparams)
            if len(lam) == 1 and jnp.ndim(lam[0]) == 0:
                return [(jnp.exp(lam[0]), tree.norm(params))]
            if jax.tree.structure(hparams) != jax.tree.structure(params):
                raise ValueError(
                    "`of_log_decays` needs `hparams` that are one number, or a tree like `params`, "
                    f"got {jax.tree.structure(hparams)} for {jax.tree.structure(params)}: write "
                    "the constants as functions of your own."
                )
            return [
                (jnp.exp(x), tree.norm(w) if jnp.ndim(x) == 0 else jnp.abs(w))
                for w, x in zip(jax.tree.leaves(params), lam, strict=True)
            ]

        def greatest(values: list[jax.Array]) -> jax.Array:
            return jnp.max(jnp.stack([jnp.max(x) for x in values]))

        def convexity(params: Params, hparams: Hparams) -> jax.Array:
            return -greatest([-decay for decay, _ in parts(params, hparams)])

        def mixed_norm(params: Params, hparams: Hparams) -> jax.Array:
            return greatest([decay * w for decay, w in parts(params, hparams)])

        def mixed_lipschitz(params: Params, hparams: Hparams) -> jax.Array:
            return greatest([decay for decay, _ in parts(params, hparams)])

        return cls(convexity, outer_smoothness, mixed_norm, mixed_lipschitz, hessian_lipschitz)

    def at(self, params: Params, hparams: Hparams) -> Constants:
        """The constants at a point, in the accumulator dtype; what is known to be wrong raises."""
        dtype = tree.norm(params).dtype

        def value(name: str) -> Scalar:
            given = getattr(self, name)
            number = given(params, hparams) if is_function(given) else given
            if name == "convexity":
                self._check_convexity(number)
            else:
                check_one_real(name, number, 0)
            return jnp.asarray(number).astype(dtype)

        return Constants(*(value(name) for name in Constants._fields))

    @staticmethod
    def _check_convexity(value: Any) -> None:
        check_one_real("convexity", value)
        if concrete(value) and not float(value) > 0:
            raise ValueError(
                f"`convexity` must be greater than 0, got {value}: no error can be bounded where "
                "the inner loss is not strongly convex. Add a penalty to it (`0.5 * mu * "
                "jnp.sum(w**2)` gives mu), or use `hoag`, which needs no constant."
            )


def error_bound(c: Constants, distance: Scalar, residual: Scalar, g_norm: Scalar) -> Scalar:
    """The bound of :class:`Certificate`, from e, d and the norm of the outer gradient."""
    b, mu = c.mixed_norm, c.convexity
    linear = (
        b * c.outer_smoothness / mu
        + b * c.hessian_lipschitz * g_norm / mu**2
        + c.mixed_lipschitz * g_norm / mu
        + c.direct_lipschitz
    )
    quadratic = c.mixed_lipschitz * c.outer_smoothness / mu
    return b * residual / mu + distance * linear + distance**2 * quadratic
