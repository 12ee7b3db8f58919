r"""Building blocks of a cycle of self-tuning: its settings, weights and losses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar
from bilevel.ground.cost import Cost
from bilevel.ground.leaves import select
from bilevel.hypergradient.best_response import mean_over_groups, perturbed_loss
from bilevel.inner.groups import batch_size, draw_noise
from bilevel.inner.network import gradient_cost
from bilevel.outer.frozen import partial_network
from bilevel.outer.self_tuning.state import Moved, SelfTuningState, Trained, entropy_of
from bilevel.outer.variable import Mover
from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.two_losses import Problem


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The settings of :func:`~bilevel.self_tuning`, checked, and the losses they make."""

    problem: Problem
    inner_tx: optax.GradientTransformation
    mover: Mover
    inner_steps: int
    outer_steps: int
    network: Any  # a Network; one for layers also has `plain`, `everywhere` and `change`
    response_tx: optax.GradientTransformation
    scale_mover: Mover
    scale: Any
    tune_scales: bool
    entropy: float
    groups: int
    shared: tuple[str, ...]
    linearize: GaussNewton | None
    warm_up: int
    seed: int
    unroll: bool | None

    @property
    def per_example(self) -> bool:
        """Whether the network perturbs every example, inside its layers."""
        return getattr(self.network, "per_example", False)

    def for_params(self, params: Params) -> "Tuning":
        """These settings with a network that leaves alone what ``inner_tx`` freezes."""
        network = partial_network(self.network, self.inner_tx, params)
        return dataclasses.replace(self, network=network)

    def undisplaced(self, trained: Trained) -> Params:
        """What the losses read as weights where a centred network is not displaced."""
        network, weights = trained.network.params, trained.weights.params
        return self.network.plain(network, weights) if self.per_example else weights

    def weights(self, trained: Trained, raw: Hparams) -> Params:
        """What the losses read as weights at ``raw``, and nothing perturbed."""
        if self.network.centred:
            return self.undisplaced(trained)
        # A network of layers takes a displacement per example; here one serves them all.
        apply = self.network.everywhere if self.per_example else self.network.apply
        return apply(trained.network.params, trained.weights.params, raw)

    def raw_of(self, state: SelfTuningState, hparams: Hparams) -> Hparams:
        """The unconstrained hyperparameters that the losses read as ``hparams``."""
        space = self.mover.space
        if space is None:
            return hparams

        def gives_them(raw: Hparams) -> Scalar:
            same = jax.tree.map(lambda a, b: jnp.all(a == b), self.mover.read(raw), hparams)
            return jnp.all(jnp.stack(jax.tree.leaves(same)))

        which = jnp.where(gives_them(state.raw), 1, 2)
        which = jnp.where(gives_them(state.measured), 0, which)
        # Traced, so that a value that rounding put on an open bound is no error.
        return jax.lax.switch(
            which,
            [
                lambda h: state.measured,
                lambda h: state.raw,
                lambda h: tree.cast_like(space.unconstrain(h), state.raw),
            ],
            hparams,
        )

    def general(
        self, trained: Trained, hparams: Hparams, batch: Batch
    ) -> tuple[Scalar, ModelState]:
        """The inner loss of the weights that are not displaced, and the advanced statistics."""
        weights, model_state = self.undisplaced(trained), trained.weights.model_state
        return self.problem.inner_loss_and_state(weights, hparams, batch, model_state)

    def perturbed(
        self, trained: Trained, moved: Moved, noise: Hparams, batch: Batch, unroll: bool
    ) -> Scalar:
        """The inner loss of the displaced weights, the mean over the draws in ``noise``."""
        problem = self.problem.at(trained.weights.model_state)

        def loss(d: Hparams, h: Hparams, part: Batch) -> Scalar:
            network, weights = trained.network.params, trained.weights.params
            return perturbed_loss(
                problem, self.network, network, weights, d, h, part, self.linearize
            )

        return self._expected(loss, moved.outer.moving, moved.widths.moving, noise, batch, unroll)

    def objective(
        self,
        raw: Hparams,
        raw_scales: Hparams,
        trained: Trained,
        noise: Hparams,
        batch: Batch,
        unroll: bool,
    ) -> tuple[Scalar, Scalar]:
        """The outer objective, and its part without the entropy.

        With fixed scales nothing is perturbed, and its gradient is that of ``hypergrad_solve``
        with ``BestResponse(network)`` at the trained network (but for bounds).
        """
        problem = self.problem.at(trained.weights.model_state)

        def loss(d: Hparams, h: Hparams, part: Batch) -> Scalar:
            weights = self.network.apply(trained.network.params, trained.weights.params, d)
            return problem.outer_loss(weights, h, part)[0]

        if self.tune_scales:
            value = self._expected(loss, raw, raw_scales, noise, batch, unroll)
            entropy = entropy_of(jax.tree.map(jax.nn.softplus, raw_scales))
            return value - self.entropy * entropy.astype(value.dtype), value
        centre = jax.lax.stop_gradient(raw)
        d = tree.sub(raw, centre) if self.network.centred else raw
        h = self.mover.read(raw)
        if self.per_example:
            count = batch_size(batch)
            d, h = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), (d, h))
        value = loss(d, h, batch)
        return value, value

    def _expected(
        self,
        loss: Callable[[Hparams, Hparams, Batch], Scalar],
        raw: Hparams,
        raw_scales: Hparams,
        noise: Hparams,
        batch: Batch,
        unroll: bool,
    ) -> Scalar:
        """Mean over draws of ``loss(displacement, T(perturbed), part of the batch)``."""
        centre = jax.lax.stop_gradient(raw)
        scales = jax.tree.map(jax.nn.softplus, raw_scales)

        def perturb(eps: Hparams) -> tuple[Hparams, Hparams]:
            lam = jax.tree.map(lambda x, s, e: x + (s * e).astype(x.dtype), raw, scales, eps)
            d = tree.sub(lam, centre) if self.network.centred else lam
            return d, self.mover.read(lam)

        perturbed = jax.vmap(perturb)(noise)
        if self.per_example:
            return loss(perturbed[0], perturbed[1], batch)
        return mean_over_groups(
            lambda pair, part: loss(pair[0], pair[1], part), perturbed, batch, self.groups, unroll
        )

    def noise(self, key: Key, raw: Hparams, batch: Batch) -> Hparams:
        """Standard normal draws, one for each group or example."""
        count = batch_size(batch) if self.per_example else self.groups
        return draw_noise(key, raw, count, self.shared_flags(raw))

    def shared_flags(self, hparams: Hparams) -> Any:
        """Which hyperparameters are perturbed once a batch."""
        found = select(hparams, self.shared, "shared") if self.shared else []
        named = {path for path, _ in found}
        flags = [path in named for path, _ in tree.paths(hparams, "")]
        return jax.tree.unflatten(jax.tree.structure(hparams), flags)

    def response_norm(self, trained: Trained, raw: Hparams, scales: Hparams) -> Scalar:
        """Length of the weights' move for one scale, over their own."""
        network, weights = trained.network.params, trained.weights.params
        scales = jax.tree.map(lambda s, x: s.astype(x.dtype), scales, raw)
        if self.per_example:
            change = self.network.change(network, weights, scales)
        else:
            origin = jax.tree.map(jnp.zeros_like, raw) if self.network.centred else raw
            change = tree.sub(
                self.network.apply(network, weights, tree.add(origin, scales)),
                self.network.apply(network, weights, origin),
            )
        return tree.norm(change) / tree.norm(weights)

    def cost(self) -> Cost:
        """What a cycle costs, after the warm-up."""
        return cycle_cost(
            self.network, self.inner_steps, self.outer_steps, self.linearize is not None
        )


def cycle_cost(
    network: Any, inner_steps: int, outer_steps: int = 1, linearized: bool = False
) -> Cost:
    """What a cycle with this network costs: for budgets that are made before a loop is."""
    if not network.centred:
        step = gradient_cost(network, learns=2)
    else:
        step = 1 + (2 if linearized else gradient_cost(network, learns=1))
    return Cost(inner_steps * step, 0, outer_steps * gradient_cost(network, learns=0))
