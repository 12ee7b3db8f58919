r"""What a cycle of self-tuning is made of: its settings, weights and losses."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar
from bilevel.hypergradient.best_response import mean_over_groups, perturbed_loss
from bilevel.inner.groups import batch_size, draw_noise
from bilevel.leaves import select
from bilevel.operators import GaussNewton
from bilevel.outer.constrain import Space
from bilevel.outer.frozen import partial_network
from bilevel.outer.tuning_state import SelfTuningState, entropy_of, weights_at
from bilevel.problem import Problem


class Moved(NamedTuple):
    """What the validation steps move."""

    raw: Hparams
    outer_opt_state: Any
    raw_scales: Hparams
    scale_opt_state: Any


class Trained(NamedTuple):
    """What the training steps move."""

    params: Params
    model_state: ModelState
    inner_opt_state: Any
    response: Any
    response_opt_state: Any


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The settings of :func:`~bilevel.self_tuning`, checked, and the losses they make."""

    outer: Loss
    inner: Loss
    inner_tx: optax.GradientTransformation
    outer_tx: optax.GradientTransformation
    inner_steps: int
    outer_steps: int
    network: Any  # a Network; one for layers also has `plain` and `change`
    response_tx: optax.GradientTransformation
    scale_tx: optax.GradientTransformation
    scale: Any
    tune_scales: bool
    entropy: float
    groups: int
    shared: tuple[str, ...]
    linearize: GaussNewton | None
    constrain: Space | None
    warm_up: int
    has_state: bool
    seed: int

    @property
    def per_example(self) -> bool:
        """Whether the network perturbs every example, inside its layers."""
        return getattr(self.network, "per_example", False)

    def real(self, raw: Hparams) -> Hparams:
        """T: what the losses read."""
        if self.constrain is None:
            return raw
        return self.constrain.round(self.constrain.constrain(raw))

    def undisplaced(self, params: Params, response: Any) -> Params:
        """What the losses read as weights where a centred network is not displaced."""
        return self.network.plain(response, params) if self.per_example else params

    def weights(self, params: Params, response: Any, raw: Hparams) -> Params:
        """What the losses read as weights at ``raw``, and nothing perturbed."""
        if self.network.centred:
            return self.undisplaced(params, response)
        return weights_at(self.network, response, params, raw)

    def raw_of(self, state: SelfTuningState, hparams: Hparams) -> Hparams:
        """The unconstrained hyperparameters that the losses read as ``hparams``."""
        space = self.constrain
        if space is None:
            return hparams

        def gives_them(raw: Hparams) -> Scalar:
            same = jax.tree.map(lambda a, b: jnp.all(a == b), self.real(raw), hparams)
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

    def for_params(self, params: Params) -> "Tuning":
        """These settings with a network that leaves alone what ``inner_tx`` freezes."""
        network = partial_network(self.network, self.inner_tx, params)
        return dataclasses.replace(self, network=network)

    def problem(self, model_state: ModelState) -> Problem:
        """The two losses, which read ``model_state`` frozen."""
        return Problem(self.outer, self.inner, has_state=self.has_state, model_state=model_state)

    def general(
        self,
        params: Params,
        response: Any,
        hparams: Hparams,
        batch: Batch,
        model_state: ModelState,
    ) -> tuple[Scalar, ModelState]:
        """The inner loss of the weights that are not displaced, and the advanced statistics."""
        weights = self.undisplaced(params, response)
        return self.problem(None).inner_loss_and_state(weights, hparams, batch, model_state)

    def perturbed(
        self,
        response: Any,
        params: Params,
        model_state: ModelState,
        raw: Hparams,
        scales: Hparams,
        noise: Hparams,
        batch: Batch,
        straight: bool,
    ) -> Scalar:
        """The inner loss of the displaced weights, the mean over the draws in ``noise``."""
        problem = self.problem(model_state)

        def loss(d: Hparams, h: Hparams, part: Batch) -> Scalar:
            return perturbed_loss(
                problem, self.network, response, params, d, h, part, self.linearize
            )

        return self.expected(loss, raw, scales, noise, batch, straight)

    def expected(
        self,
        loss: Callable[[Hparams, Hparams, Batch], Scalar],
        raw: Hparams,
        scales: Hparams,
        noise: Hparams,
        batch: Batch,
        straight: bool,
    ) -> Scalar:
        """Mean over draws of ``loss(displacement, T(perturbed), part of the batch)``."""
        centre = jax.lax.stop_gradient(raw)

        def perturb(eps: Hparams) -> tuple[Hparams, Hparams]:
            lam = jax.tree.map(lambda x, s, e: x + (s * e).astype(x.dtype), raw, scales, eps)
            return (tree.sub(lam, centre) if self.network.centred else lam), self.real(lam)

        perturbed = jax.vmap(perturb)(noise)
        if self.per_example:
            return loss(perturbed[0], perturbed[1], batch)
        return mean_over_groups(
            lambda pair, part: loss(pair[0], pair[1], part),
            perturbed,
            batch,
            self.groups,
            straight,
        )

    def noise(self, key: Key, raw: Hparams, batch: Batch) -> Hparams:
        count = batch_size(batch) if self.per_example else self.groups
        return draw_noise(key, raw, count, self.shared_flags(raw))

    def shared_flags(self, hparams: Hparams) -> Any:
        found = select(hparams, self.shared, "shared") if self.shared else []
        named = {path for path, _ in found}
        flags = [path in named for path, _ in tree.paths(hparams, "")]
        return jax.tree.unflatten(jax.tree.structure(hparams), flags)

    def objective(
        self,
        raw: Hparams,
        raw_scales: Hparams,
        trained: Trained | SelfTuningState,
        noise: Hparams,
        batch: Batch,
        straight: bool,
    ) -> tuple[Scalar, Scalar]:
        """The outer objective, and its part without the entropy."""
        problem = self.problem(trained.model_state)

        def loss(d: Hparams, h: Hparams, part: Batch) -> Scalar:
            weights = self.network.apply(trained.response, trained.params, d)
            return problem.outer_loss(weights, h, part)[0]

        if self.tune_scales:
            scales = jax.tree.map(jax.nn.softplus, raw_scales)
            value = self.expected(loss, raw, scales, noise, batch, straight)
            return value - self.entropy * entropy_of(scales).astype(value.dtype), value
        centre = jax.lax.stop_gradient(raw)
        d, h = (tree.sub(raw, centre) if self.network.centred else raw), self.real(raw)
        if self.per_example:
            count = batch_size(batch)
            d, h = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), (d, h))
        value = loss(d, h, batch)
        return value, value

    def response_norm(self, trained: Trained, raw: Hparams, raw_scales: Hparams) -> Scalar:
        """Length of the weights' move for one scale, over their own."""
        scales = jax.tree.map(lambda s, x: jax.nn.softplus(s).astype(x.dtype), raw_scales, raw)
        if self.per_example:
            change = self.network.change(trained.response, trained.params, scales)
        else:
            origin = jax.tree.map(jnp.zeros_like, raw) if self.network.centred else raw
            at = tree.add(origin, scales)
            change = tree.sub(
                self.network.apply(trained.response, trained.params, at),
                self.network.apply(trained.response, trained.params, origin),
            )
        return tree.norm(change) / tree.norm(trained.params)
