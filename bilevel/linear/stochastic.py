r"""Any optax optimizer on the quadratic whose minimizer solves the system."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Key, MatVec, Vector
from bilevel.ground.loops import loop
from bilevel.ground.settings import check_settings, count
from bilevel.ground.status import Status, status_of
from bilevel.linear.base import LinearSolution, as_map, finish, require_symmetric, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stochastic:
    r"""Minimizes :math:`½ qᵀ A q - gᵀ q` with one product per step.

    With ``fresh_batches=True`` product i uses batch i, so the solve never holds more than one
    batch and its noise averages out instead of being solved for. On one fixed batch,
    ``Stochastic(optax.sgd(a), K)`` from zero equals ``Neumann(K, a)`` exactly.

    Args:
      tx: an optax transformation; its step size must suit the curvature of the worst batch
        (below :math:`2/λ_{max}` for SGD).
      steps: K, the number of products.
      unroll: write the loop out step by step; ``None`` decides by itself.

    From zero the first gradient is :math:`-g` and costs no product, so K products make K+1
    updates; from a warm start they make K. A residual of the last step above the first one
    gives status ``diverged``.

    Cost: K products, the optimizer's state and two vectors. Raises ``TypeError`` if ``tx`` is
    no optax transformation.

    Reference: Grazzi, Pontil, Salzo, "Convergence properties of stochastic hypergradients",
    AISTATS 2021; Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced
    design", ICML 2021.
    """

    tx: optax.GradientTransformation = dataclasses.field(metadata={"static": True})
    steps: int = count(20)
    unroll: bool | None = dataclasses.field(default=None, metadata={"static": True})

    uses_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (hasattr(self.tx, "init") and hasattr(self.tx, "update")):
            raise TypeError(f"`tx` must be an optax gradient transformation, got {self.tx!r}.")
        check_settings(self)

    def num_products(self) -> int:
        """Products per solve (static)."""
        return self.steps

    def solve(
        self,
        mv: MatVec,
        rhs: Vector,
        x0: Vector | None = None,
        *,
        key: Key | None = None,
        certify: bool = True,
    ) -> LinearSolution:
        """Run the optimizer from ``x0`` (from zero for ``None``); ``key`` is not used."""
        rhs = tree.accumulate(rhs)
        amap = as_map(mv, rhs)
        require_symmetric(amap, "Stochastic")
        unroll = amap.unroll if self.unroll is None else self.unroll
        product = amap.fresh or (lambda v, i: amap(v))

        def update(q: Vector, gradient: Vector, opt_state):
            change, opt_state = self.tx.update(gradient, opt_state, q)
            return tree.add(q, tree.cast_like(change, q)), opt_state

        if x0 is None:
            q = jax.tree.map(jnp.zeros_like, rhs)
            q, opt_state = update(q, tree.scale(-1, rhs), self.tx.init(q))
        else:
            # See `cg._start`: a zero start must not be a compile-time constant.
            x0 = jax.lax.optimization_barrier(tree.cast_like(x0, rhs))
            # What an earlier solve spoilt must not spoil this one. Number by number: any start will
            # do, and one flag for all would be two passes over them.
            q = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), x0)
            opt_state = self.tx.init(q)

        def body(i, carry):
            q, opt_state, low, high, first, _ = carry
            image = product(q, i)
            low, high = widen(low, high, q, image)
            gradient = tree.sub(image, rhs)
            length = tree.norm(gradient)
            q, opt_state = update(q, gradient, opt_state)
            first = jnp.where(i == 0, length, first)
            return q, opt_state, low, high, first, length

        zero = jnp.zeros_like(tree.norm(rhs))
        carry = (q, opt_state, zero + jnp.inf, zero - jnp.inf, zero, zero)
        q, _, low, high, first, last = loop(self.steps, body, carry, unroll)
        stats = {
            "num_matvecs": jnp.asarray(self.steps, jnp.int32),
            "min_curvature": low,
            "max_curvature": high,
        }
        norm = tree.norm(rhs)
        result = status_of(Status.ok, (last > jnp.maximum(first, norm), Status.diverged))
        return finish(amap, rhs, q, stats, result, certify)
