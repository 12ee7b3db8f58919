r"""``H := I / scale``: the cheapest inverse, which never looks at the operator."""

import dataclasses

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.settings import check_settings, real
from bilevel.ground.status import Status, code
from bilevel.linear.base import LinearSolution, as_map, finish


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity:
    r"""The T1–T2 approximation :math:`q = s g`, which puts :math:`H := I/s`.

    Exact when :math:`H = I/s`; otherwise not even a descent direction in general, which
    ``stats["residual_norm"]`` shows. Useful far from convergence, and with an adaptive outer
    optimizer where only the direction counts.

    Args:
      scale: :math:`s > 0`, in units of 1/curvature. With a direct term or a plain SGD outer
        step it decides the size of the indirect part: the inner learning rate gives the
        one-step look-ahead.

    Cost: no products. Raises ``ValueError`` for ``scale <= 0``.

    Reference: Luketina, Berglund, Greff, Raiko, "Scalable gradient-based tuning of continuous
    regularization hyperparameters", ICML 2016.
    """

    scale: float | jax.Array = real(1.0, low=0, strict=True)

    def __post_init__(self) -> None:
        check_settings(self)

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """:math:`q = s g`; ``x0`` and ``key`` are not used."""
        rhs = tree.accumulate(rhs)
        value = tree.scale(self.scale, rhs)
        stats = {"num_matvecs": jnp.zeros((), jnp.int32)}
        return finish(as_map(mv, rhs), rhs, value, stats, code(Status.ok), certify)
