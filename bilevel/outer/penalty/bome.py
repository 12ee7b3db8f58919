r"""BOME: descent on the outer loss that also lowers the suboptimality of training."""

from typing import Literal, TypeAlias

import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Loss
from bilevel.ground.cost import Cost
from bilevel.ground.settings import check_one_real
from bilevel.ground.status import Status, status_of
from bilevel.outer.base import Algorithm, own_params
from bilevel.outer.penalty.difference import both_node, inner_node
from bilevel.outer.penalty.loop import Move, Penalty, PenaltyState, make
from bilevel.outer.penalty.pbgd import move_penalized
from bilevel.space.space import Space

Barrier: TypeAlias = Literal["gradient", "gap"]


def bome(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int,
    *,
    eta: float = 0.5,
    barrier: Barrier = "gradient",
    penalized_tx: optax.GradientTransformation | None = None,
    constrain: Space | None = None,
    has_aux: bool = False,
    has_state: bool = False,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Bilevel optimization made easy: a penalty that is computed anew in each step.

    .. math::
        z &= y \text{ after } T \text{ steps on } h(·, λ),
        q = h(y, λ) - h(z, λ),
        ∇q = \bigl(∇_w h(y, λ),
            ∇_λ h(y, λ) - ∇_λ h(z, λ)\bigr) \\
        σ &= max \Bigl(\frac{φ - ⟨∇f, ∇q⟩}{‖∇q‖^2}, 0\Bigr),
            φ = η ‖∇q‖^2 \\
        (y, λ) &← (y, λ) - v(∇f(y, λ) + σ ∇q)

    :math:`σ` is the least multiplier by which a step lowers q at a rate of :math:`φ`: the
    pair descends on f while the suboptimality q of y shrinks, and no penalty is to be chosen.
    Where :math:`∇q` is zero, so is :math:`σ`.

    Args:
      outer, inner, inner_tx, outer_tx: as in :func:`~bilevel.f2sa`; the optimizer of z begins
        anew in every step.
      inner_steps: T, at least 1.
      eta: :math:`η`, at least 0.
      barrier: ``"gradient"`` for :math:`φ` as above, ``"gap"`` for :math:`φ = η q`.
      penalized_tx: of y; ``None`` for ``inner_tx``. The rule is derived for plain gradient steps
        with one rate for y and the hyperparameters (``penalized_tx`` and ``outer_tx`` both
        ``optax.sgd(rate)``); other optimizers turn the direction.
      constrain, has_aux, has_state, unroll: as in :func:`~bilevel.alternate`; with bounds
        :math:`∇_λ` is that of the unconstrained variable.

    Returns:
      ``Algorithm(init, step, deploy)`` with batches as :func:`~bilevel.f2sa`. ``deploy`` gives
      z, and ``info.value`` is :math:`f(z)`.

    ``info.hypergrad_norm`` is the length of :math:`∇_λ f + σ∇_λ q`.
    That is no estimate of the hypergradient: it falls to zero with it, at the solution, but on the
    way y moves as well. ``info.stats``: ``penalty`` (:math:`σ`), ``gap`` (q; below zero where
    T steps do not lower the inner loss: their rate is too high, or the batches differ),
    ``gap_slope`` (:math:`‖∇q‖`) and ``slope_norm``, the length of the direction in y and
    the hyperparameters together, which is zero at the solution.

    Raises:
      TypeError, ValueError: as :func:`~bilevel.f2sa`.

    Cost: T + 2 inner gradients and one outer gradient; no products. Memory: two copies of the
    parameters and of the state of their optimizer.

    Reference: Ye, Liu, Wright, Stone, Liu, "BOME! Bilevel optimization made easy: a simple
    first-order approach", NeurIPS 2022.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.bome(
      ...     valid, train, optax.sgd(0.2), optax.sgd(0.05), inner_steps=10,
      ...     penalized_tx=optax.sgd(0.05), constrain=bilevel.Space(bilevel.Positive()))
      >>> state = alg.init(jnp.zeros(1), 1.5)
      >>> step = jax.jit(alg.step, donate_argnums=0)
      >>> for _ in range(400):
      ...     state, info = step(
      ...         state, inner_batches=jnp.full((10, 1), 2.0), outer_batch=jnp.array([1.0]))
      >>> bool(abs(info.value) < 0.01)  # the decay that halves the mean of the data is 1
      True
    """
    check_one_real("eta", eta, 0)
    if barrier not in ("gradient", "gap"):
        raise ValueError(f"`barrier` must be 'gradient' or 'gap', got {barrier!r}.")

    def advance(
        run: Penalty, state: PenaltyState, batches: Batch, batch: Batch, outer_batch: Batch
    ) -> Move:
        hparams, part = state.hparams, run.part(state.params)
        (y,) = state.penalized
        start = run.begin(run.inner_tx, y.params, y.model_state)
        trained, inner_value = run.train(start, hparams, batches)
        high = both_node(run.problem, y, hparams, batch, outer_batch)
        low = inner_node(run.problem, trained, hparams, batch)
        wide = tree.accumulate
        slope_q, slope_f = wide(high.inner[0]), wide(high.outer[0])
        q_hparams = tree.sub(wide(high.inner[1]), wide(low.inner[1]))
        # In what moves: with bounds both products are of the unconstrained variable.
        pulled = [
            wide(run.mover.pull(state.outer, tree.cast_like(x, hparams)))
            for x in (q_hparams, high.outer[1])
        ]
        grad_q = (part.of(slope_q), pulled[0])
        grad_f = (part.of(slope_f), pulled[1])
        square, gap = tree.vdot(grad_q, grad_q), high.value - low.value
        phi = eta * (square if barrier == "gradient" else gap)
        # A gradient that is not finite stays so: only an exact zero is guarded.
        multiplier = (phi - tree.vdot(grad_f, grad_q)) / jnp.where(square == 0, 1, square)
        multiplier = jnp.where(square == 0, 0, jnp.maximum(multiplier, 0))
        grads = tree.axpy(multiplier, q_hparams, wide(high.outer[1]))
        moved = move_penalized(run, y, high, tree.axpy(multiplier, slope_q, slope_f))
        stats = {
            "penalty": multiplier,
            "gap": gap,
            "gap_slope": jnp.sqrt(square),
            "slope_norm": tree.norm(tree.axpy(multiplier, grad_q, grad_f)),
        }
        finite = jnp.isfinite(gap) & jnp.isfinite(multiplier) & tree.all_finite(grad_f)
        result = status_of(Status.ok, (~finite, Status.nonfinite_input))
        cost = Cost(run.inner_steps + 2, 0, 1)
        return Move(trained, (moved,), inner_value, grads, result, stats, cost)

    run = make(
        outer, inner, inner_tx, outer_tx, inner_steps, penalized_tx, constrain, has_aux, has_state,
        unroll, 1, advance,
    )  # fmt: skip
    return Algorithm(run.init, run.step, own_params)
